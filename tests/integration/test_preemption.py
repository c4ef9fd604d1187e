"""Signals and the time limit stop a run at the same step on all processes; the same command resumes it."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fundamentallm import (
    Callback,
    CheckpointError,
    LoggingCallback,
    SaveBestCallback,
    Trainer,
    create_accelerator,
    train,
)
from fundamentallm.errors import START_AGAIN
from fundamentallm.signals import SIGNALS
from tests.integration.runs import (
    KillAfter,
    KilledError,
    assert_same_weights,
    lines,
    make_config,
    make_trainer,
    on_processes,
    timeless,
    weights,
)

SETTINGS: dict[str, Any] = {
    "dropout": 0.2, "batch_size": 64, "max_steps": 14, "log_every_n_steps": 7, "eval_every_n_steps": 3,
    "save_every_n_epochs": None,
}  # fmt: skip


class SignalAt(Callback):
    """Sends this process SIGTERM after a step, or in the validation after it."""

    def __init__(self, step: int, in_validation: bool = False) -> None:
        self.step, self.in_validation, self.has_sent = step, in_validation, False

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        if trainer.global_step == self.step and self.in_validation:
            trainer.model.register_forward_hook(self._once_in_evaluation)
        elif trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def _once_in_evaluation(self, model: torch.nn.Module, *_: object) -> None:
        if not model.training and not self.has_sent:
            self.has_sent = True
            os.kill(os.getpid(), signal.SIGTERM)


def run(folder: Path | str, *callbacks: Callback, **settings: Any) -> Trainer:
    own: list[Callback] = [LoggingCallback(Path(folder) / "metrics.jsonl"), SaveBestCallback()]
    trainer = make_trainer(make_config(folder, **{**SETTINGS, **settings}), callbacks=[*own, *callbacks])
    trainer.train()
    return trainer


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("[!.]*"))


def test_signal_stops_and_saves_and_the_run_resumes(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    first = run(tmp_path / "parts", SignalAt(5))
    assert (first.global_step, first.was_interrupted) == (5, True)
    assert checkpoints(tmp_path / "parts")[-1] == "step_00000005"
    status = json.loads((tmp_path / "parts" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("interrupted", START_AGAIN, 5)
    second = run(tmp_path / "parts")
    assert not second.was_interrupted
    assert_same_weights(weights(second), weights(whole))
    assert timeless(lines(tmp_path / "parts")) == timeless(lines(tmp_path / "whole"))


def test_signal_in_validation_repeats_it_on_resume(tmp_path: Path) -> None:
    """Step 6 ends an epoch: what is due after its validation must not be lost."""
    step = 6
    settings = {"save_every_n_epochs": 1, "keep_last_n": 9, "log_every_n_steps": 1}
    whole = run(tmp_path / "whole", **settings)
    first = run(tmp_path / "parts", SignalAt(step, in_validation=True), **settings)
    assert (first.global_step, first.was_interrupted) == (step, True)
    assert [line for line in lines(tmp_path / "parts") if line["step"] == step and "val_loss" in line] == []
    second = run(tmp_path / "parts", **settings)
    assert second.is_finished
    assert_same_weights(weights(second), weights(whole))
    assert timeless(lines(tmp_path / "parts")) == timeless(lines(tmp_path / "whole"))
    assert checkpoints(tmp_path / "parts") == checkpoints(tmp_path / "whole")


TINY = """
output_dir: run
model: {d_model: 16, num_heads: 2, num_layers: 1}
data: {sequence_length: 32}
training: {batch_size: 9, max_steps: 4, learning_rate: 1e-2, eval_every_n_epochs: null, max_minutes: 1e-9}
sample_tokens: 2
"""


@pytest.mark.parametrize(
    ("where", "number", "code", "state", "step"),
    [
        ("fundamentallm.data.corpus.load_corpus", signal.SIGUSR1, START_AGAIN, "interrupted", 1),
        ("fundamentallm.run.state.RunState.load", signal.SIGHUP, START_AGAIN, "interrupted", 1),
        ("fundamentallm.training.callbacks.observing.continuation", signal.SIGTERM, 0, "finished", 4),
    ],
)
def test_signal_outside_the_loop_has_its_exit_code_and_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int, code: int, state: str, step: int
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    assert train.main(["--config", "tiny.yaml"]) == START_AGAIN  # after its first step
    monkeypatch.setattr(where, lambda *_, **__: signal.raise_signal(number))
    assert train.main(["--config", "tiny.yaml", "--training.max_minutes", "null"]) == code
    status = json.loads(Path("run/status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == (state, step, code)


def test_second_interrupt_stops_without_saving(tmp_path: Path) -> None:
    class Twice(Callback):
        def on_step_end(self, trainer: Trainer, loss: float) -> None:
            if trainer.global_step == 5:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Twice(), save_every_n_steps=2)
    assert "step_00000005" not in checkpoints(tmp_path)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 130)


def test_kills_before_the_first_checkpoint_leave_no_copies(tmp_path: Path) -> None:
    """A launch of the same run writes the lines again. Those of another run are kept."""
    for rate in (1e-2, 1e-2, 2e-2):
        with pytest.raises(KilledError):
            run(tmp_path, KillAfter(2), learning_rate=rate, log_every_n_steps=1)
        assert len(list(tmp_path.glob("*before*"))) == (rate == 2e-2)


def test_resume_with_a_log_that_lost_lines_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, SignalAt(5), log_every_n_steps=1)
    written = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(written[:2]))
    with pytest.raises(CheckpointError, match="2 of its 6 lines up to step 5"):
        run(tmp_path, log_every_n_steps=1)
    assert run(tmp_path, log_every_n_steps=1, resume_changes=["log"]).is_finished
    assert "2 of its 6 lines" in capsys.readouterr().out
    assert run(tmp_path, log_every_n_steps=1, resume_changes=["log"]).is_finished


def test_checkpoint_of_another_folder_does_not_count_on_this_log(tmp_path: Path) -> None:
    run(tmp_path / "one", SignalAt(5), log_every_n_steps=1)
    checkpoint = str(tmp_path / "one" / "checkpoints" / "step_00000005")
    assert run(tmp_path / "two", log_every_n_steps=1, resume=checkpoint).is_finished
    assert [line["step"] for line in lines(tmp_path / "two")][:2] == [6, 6]


def test_log_is_on_the_disk_before_a_manifest_counts_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sync = list[Path](), os.fsync

    def record(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    run(tmp_path, max_steps=2, log_every_n_steps=1)
    manifest = [path.name for path in synced].index("manifest.json")
    assert {tmp_path, tmp_path / "metrics.jsonl", tmp_path / "starts.jsonl.new"} <= {*synced[:manifest]}


def test_max_minutes_ends_a_launch_and_not_the_run(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", max_steps=6)
    reached = (0, False)
    while reached != (6, False):  # each launch takes one step, or validates
        trainer = run(tmp_path / "parts", max_steps=6, max_minutes=1e-9)
        before, reached = reached, (trainer.global_step, trainer.validation_due)
        assert reached == ((before[0], False) if before[1] else (before[0] + 1, (before[0] + 1) in (3, 6)))
        assert trainer.was_interrupted is not trainer.is_finished
    assert_same_weights(weights(trainer), weights(whole))
    assert timeless(lines(tmp_path / "parts")) == timeless(lines(tmp_path / "whole"))


def signalled_on_one_process(processes: int, folder: str) -> None:
    mine = create_accelerator().process_index == 0
    trainer = run(folder, *[SignalAt(6, in_validation=True)] * mine, batch_size=8)  # five batches in a validation
    assert trainer.accelerator.num_processes == processes
    assert (trainer.was_interrupted, trainer.global_step, trainer.validation_due) == (True, 6, True)


def to_the_end(processes: int, folder: str) -> None:
    trainer = run(folder, batch_size=8)
    assert (trainer.accelerator.num_processes, trainer.is_finished) == (processes, True)


def test_signal_on_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    on_processes(2, to_the_end, str(tmp_path / "whole"))
    on_processes(2, signalled_on_one_process, str(tmp_path / "parts"))
    on_processes(2, to_the_end, str(tmp_path / "parts"))
    assert timeless(lines(tmp_path / "parts")) == timeless(lines(tmp_path / "whole"))


class SignalWorkers(Callback):
    """Sends all signals to all loader workers after a step."""

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        if trainer.global_step == 2:
            self.workers = multiprocessing.active_children()
            for worker, name in itertools.product(self.workers, SIGNALS):
                os.kill(worker.pid or 0, getattr(signal, name))
        elif trainer.global_step == 11:
            assert [worker.is_alive() for worker in self.workers] == [True, True]


def test_loader_workers_ignore_the_signals(tmp_path: Path) -> None:
    config = make_config(tmp_path, max_steps=14)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=2))
    trainer = make_trainer(config, callbacks=[SignalWorkers()])
    trainer.train()
    assert trainer.is_finished
