"""Lost and hanging processes are named, with the reason."""

import faulthandler
import os
import signal
import threading
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from fundamentallm import Callback, Trainer
from fundamentallm.errors import ProcessLostError
from tests.integration.runs import lines, make_config, make_trainer, on_processes

STEP = 5


class Fault(Callback):
    """Makes one process hang, die or fail in the middle of step 5."""

    def __init__(self, fault: str, rank: int) -> None:
        self.fault, self.rank = fault, rank

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        if trainer.global_step == STEP and trainer.accelerator.process_index == self.rank:
            getattr(self, self.fault)()

    def hang_here(self) -> None:
        """Waits until the watchdog has printed this stack. The replaced function ends with this forked process."""
        shown, dump = threading.Event(), faulthandler.dump_traceback

        def dump_and_resume(file: int) -> None:
            dump(file)
            shown.set()

        faulthandler.dump_traceback = dump_and_resume
        assert shown.wait(100)

    def be_killed(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(self) -> None:
        raise ValueError("of its own")

    def fail_in_torch(self) -> None:
        raise RuntimeError("out of memory")


def train_with_fault(processes: int, folder: str, fault: str, rank: int) -> None:
    """Trains, and records the ProcessLostError that a process raises."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which the launcher ends the others once one has failed
    trainer = make_trainer(make_config(folder, hang_minutes=0.02))
    trainer.callbacks.add(Fault(fault, rank))
    assert trainer.accelerator.num_processes == processes
    try:
        trainer.train()
    except ProcessLostError as error:
        (Path(folder) / f"error_{trainer.accelerator.process_index}").write_text(f"{error.ranks} {error}")
        raise
    trainer.leave_group()


def errors_after(folder: Path, fault: str, rank: int, processes: int) -> dict[str, str]:
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        on_processes(processes, train_with_fault, str(folder), fault, rank)
    return {path.name: path.read_text() for path in folder.glob("error_*")}


@pytest.mark.slow
def test_watchdog_prints_the_stack_of_a_hanging_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    on_processes(2, train_with_fault, str(tmp_path), "hang_here", 1)
    printed = capfd.readouterr().err
    named = f"Furthest behind: process 1 of 2 (on {os.uname().nodename}) at step {STEP}, computing. Its stack follows."
    assert printed.count(named) == 1, printed
    assert "in hang_here" in printed.split(named)[1]
    assert lines(tmp_path)[-1]["step"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_watchdog_names_a_killed_process(tmp_path: Path, rank: int) -> None:
    errors = errors_after(tmp_path, "be_killed", rank, processes=3)
    assert errors.keys() == {f"error_{other}" for other in range(3) if other != rank}
    for text in errors.values():
        assert text.startswith(f"[{rank}] at step {STEP}, process {rank} of 3 (on {os.uname().nodename}) is gone")


@pytest.mark.parametrize(
    ("fault", "rank", "cause"),
    [("fail", 0, "ValueError: of its own"), ("fail_in_torch", 1, "RuntimeError: out of memory")],
)
def test_watchdog_names_a_failed_process_with_its_error(tmp_path: Path, fault: str, rank: int, cause: str) -> None:
    errors = errors_after(tmp_path, fault, rank, processes=2)
    assert errors.keys() == {f"error_{1 - rank}"}
    assert f"process {rank} of 2 (on {os.uname().nodename}) ended by {cause}" in errors[f"error_{1 - rank}"]
