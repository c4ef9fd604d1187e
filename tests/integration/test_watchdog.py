"""Who is gone, and who holds up the others, is said by name."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from fundamentallm import Callback, Trainer
from fundamentallm.distributed.watchdog import Beat, Hangs
from fundamentallm.errors import ProcessLostError
from tests.integration.runs import lines, make_config, make_trainer, on_processes

STEP = 5


class InStep(Callback):
    """Something happens to one process in the middle of a step."""

    def __init__(self, what: str, rank: int) -> None:
        self.what, self.rank = what, rank

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        if trainer.global_step == STEP and trainer.accelerator.process_index == self.rank:
            getattr(self, self.what)()

    def hang_here(self) -> None:
        """Until its stack has been shown. (This process ends with the test, and what is replaced in it.)"""
        shown, dump = threading.Event(), faulthandler.dump_traceback

        def dump_and_go_on(file: int) -> None:
            dump(file)
            shown.set()

        faulthandler.dump_traceback = dump_and_go_on
        assert shown.wait(100)

    def be_killed(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(self) -> None:
        raise ValueError("of its own")


def train(processes: int, folder: str, what: str, rank: int) -> None:
    """Train, and let the process that loses another one write down what it is told."""
    trainer = make_trainer(make_config(folder, hang_minutes=0.02))
    trainer.callbacks.add(InStep(what, rank))
    assert trainer.accelerator.num_processes == processes
    try:
        trainer.train()
    except ProcessLostError as error:
        (Path(folder) / f"told_{trainer.accelerator.process_index}").write_text(f"{error.ranks} {error}")
        raise
    trainer.leave_group()


@pytest.mark.slow
def test_a_process_that_hangs_is_named_and_shows_where(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rank = 1
    on_processes(2, train, str(tmp_path), "hang_here", rank)
    said = capfd.readouterr().err
    assert said.count("and the others wait for it; it says where") == 1
    assert f"process {rank} of 2 (on {os.uname().nodename}) has been at step {STEP} for 0.0" in said
    where = said.split(f"process {rank} of 2 is at step {STEP}, here:")[1]
    assert "in hang_here" in where
    assert f"process {1 - rank} of 2" not in said
    assert lines(tmp_path)[-1]["step"] == 12  # it was only slow, and the run went on


@pytest.mark.slow
def test_a_killed_process_is_named_by_those_that_lose_it(tmp_path: Path) -> None:
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        on_processes(3, train, str(tmp_path), "be_killed", 0)
    told = {path.name: path.read_text() for path in tmp_path.glob("told_*")}
    assert told  # the launcher ends the others once one of them has failed
    for text in told.values():
        assert text.startswith(f"[0] at step {STEP}, process 0 of 3 (on {os.uname().nodename}) is gone: killed")


def test_a_process_that_fails_is_named_with_its_error(tmp_path: Path) -> None:
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        on_processes(2, train, str(tmp_path), "fail", 0)
    told = (tmp_path / "told_1").read_text()
    assert f"at step {STEP}, process 0 of 2 (on {os.uname().nodename}) ended by ValueError: of its own" in told


def beats(*values: tuple[int, float, int]) -> dict[int, Beat]:
    return {rank: Beat(number, 7, moved, begun, "here") for rank, (number, moved, begun) in enumerate(values)}


def test_only_a_process_behind_the_others_is_accused_and_once() -> None:
    hangs = Hangs(3, limit=0.0)
    assert hangs.look(beats((1, 0.5, 10), (1, 0.6, 10), (1, 0.7, 10))) == ""  # all compile
    said = hangs.look(beats((2, 0.5, 12), (2, 0.6, 11), (2, 0.7, 12)))
    assert (said.count("process"), hangs.waited_for) == (1, [1])
    assert said.startswith("process 1 of 3 (on here) has been at step 7")
    assert hangs.look(beats((3, 0.5, 12), (3, 0.6, 11), (3, 0.7, 12))) == ""
    assert hangs.look(beats((4, 0.5, 14), (4, 0.9, 13), (4, 0.7, 13))).count("process") == 2  # one has moved since
    assert hangs.count == 2


def test_a_process_that_does_not_even_beat_is_said_not_to_answer() -> None:
    hangs = Hangs(2, limit=0.0)
    assert hangs.look(beats((1, 0.5, 10), (1, 0.6, 10))) == ""
    assert "it does not answer either" in hangs.look(beats((2, 0.5, 12), (1, 0.6, 10)))


@pytest.mark.parametrize("limit", [None, 1e6])
def test_nothing_is_said_before_the_limit(limit: float | None) -> None:
    hangs = Hangs(2, limit)
    for number in range(3):
        assert hangs.look(beats((number, 0.5, 12), (number, 0.6, 10))) == ""
