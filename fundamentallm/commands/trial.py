"""Trial runs: short real runs of a config in temporary folders, for `doctor` and `find_lr`."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.config.registry import resolve
from fundamentallm.config.schema import Config
from fundamentallm.data.sampler import StepSampler
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.training.callbacks.base import Callback, RunView
from fundamentallm.training.callbacks.console import LoggingCallback, ProgressCallback
from fundamentallm.training.callbacks.curves import VisualizationCallback
from fundamentallm.training.trainer import Trainer

VALIDATION_ROWS = 48


def trial_config(config: Config, folder: Path, **training: Any) -> Config:
    """Returns the config of a trial in `folder`: the same run, logged at every step, with nothing due by epoch."""
    settings: dict[str, Any] = {
        "checkpoint_dir": str(folder / "checkpoints"),
        "resume": "auto",
        "log_every_n_steps": 1,
        "early_stopping_patience": None,
        "max_minutes": None,  # it would cut a check or a range test short
        "compile": None,  # each trial would spend a minute on compiling, for a few steps
        **dict.fromkeys(("eval_every_n_steps", "eval_every_n_epochs", "save_every_n_steps", "save_every_n_epochs")),
        **training,
    }
    training_config = dataclasses.replace(config.training, **settings)
    return dataclasses.replace(
        config, output_dir=str(folder), trackers=[], tracker_options={}, training=training_config
    )


def make_trainer(name: str, config: Config) -> Trainer:
    """Returns the Trainer that the function `name` (`--trainer`) makes of a trial's config.

    Raises ConfigError if it returns something else, or a Trainer that ignores the trial's config.
    """
    trainer = resolve("--trainer", name, {})(config)
    allowed = "a function from a Config to a fundamentallm.Trainer"
    if not isinstance(trainer, Trainer):
        raise ConfigError([Problem("--trainer", name, allowed, reason=f"which returned a {type(trainer).__name__}")])
    used, given = trainer.config.training, config.training
    names = ("checkpoint_dir", "micro_batch_size", "log_every_n_steps", "eval_every_n_steps", "save_every_n_steps")
    ignored = [name for name in names if getattr(used, name) != getattr(given, name)]
    if trainer.output_dir not in (None, Path(config.output_dir)):
        ignored.insert(0, "output_dir")
    if ignored:
        advice = "Pass the config that the function is given on to the Trainer, so that trials stay in their folder."
        reason = f"whose Trainer ignores {', '.join(ignored)}"
        raise ConfigError([Problem("--trainer", name, allowed, advice, reason)])
    trainer.stop_switch.ends_at_once = True  # a signal ends the command, and nothing may count a trial that it cut
    return trainer


def disable_dropout(model: nn.Module) -> None:
    """Set the probability of dropout modules, and every float attribute with dropout in its name, to 0."""
    for module in model.modules():
        is_dropout = "Dropout" in type(module).__name__
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or (is_dropout and name == "p")):
                setattr(module, name, 0.0)


def limit_validation(trainer: Trainer, batch_size: int | None = None) -> int:
    """Validate on the first few samples only; returns their number, or 0 if there is no validation data."""
    loader, samples = trainer.val_loader, trainer.val_samples
    if loader is None or samples is None:
        return 0
    size = loader.batch_size or 1
    rows = min(len(loader.dataset), 2 * size + 1, VALIDATION_ROWS)  # type: ignore[arg-type]
    trainer.val_samples = StepSampler(rows, batch_size or size, None, micro_batch_size=samples.micro_batch_size)
    return rows


class Record(Callback):
    """Records a trial run, and stops it once `is_enough(record)` is true or kills its process at the step `kill_at`."""

    def __init__(self, is_enough: Callable[[Record], bool], kill_at: int | None = None) -> None:
        self.is_enough, self.kill_at = is_enough, kill_at
        self.first_step = 0  # of this launch: 0, or the step of the checkpoint that it resumed from
        self.losses: list[float] = []  # after each step
        self.times: list[float] = []  # at the start and after each step
        self.lines: list[dict[str, float]] = []  # the log

    @property
    def seconds(self) -> float:
        """Time since the first step began."""
        return self.times[-1] - self.times[0]

    def on_train_begin(self, run: RunView) -> None:
        """Start the clock."""
        self.first_step, self.times = run.global_step, [time.perf_counter()]

    def on_step_end(self, run: RunView, loss: float) -> None:
        """Record the step. Stop if it was the last, or kill the process once it has saved a checkpoint."""
        self.losses.append(loss)
        self.times.append(time.perf_counter())
        if self.is_enough(self):
            run.request_stop("the trial run is complete")
        if run.global_step == self.kill_at:
            manager = CheckpointManager(run.config.training.checkpoint_dir or "")
            while manager.get_latest() is None:  # it is written in the background
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    def on_log(self, run: RunView, metrics: dict[str, float]) -> None:
        """Record the log line."""
        self.lines.append(dict(metrics))


def run_until(trainer: Trainer, is_enough: Callable[[Record], bool]) -> Record:
    """Train with no other callback and return the record."""
    record = Record(is_enough)
    trainer.callbacks.callbacks = [record]
    trainer.train()
    return record


def run_to(trainer: Trainer, last_step: int, kill_at: int | None = None) -> Record:
    """Train to `last_step` with the run's own callbacks, whose state a resumed run restores, and return the record."""
    record = Record(lambda record: record.first_step + len(record.losses) >= last_step, kill_at)
    writers = (ProgressCallback, VisualizationCallback, LoggingCallback)  # they have no state
    own = [callback for callback in trainer.callbacks.callbacks if not isinstance(callback, writers)]
    trainer.callbacks.callbacks = [*own, record]
    trainer.train()
    return record


def run_killed(name: str, config: Config, kill_at: int, timeout: float) -> str:
    """Run a trial in a new process that kills itself at the step `kill_at`.

    Returns:
        How it ended instead, or "" if it was killed.
    """
    context = spawn(_run_in_child, (name, config, kill_at), join=False)  # type: ignore[no-untyped-call]
    try:
        if not context.join(timeout):
            return f"it had not ended after {timeout:.0f} s"
    except ProcessExitedException as error:
        return "" if error.signal_name == "SIGKILL" else str(error)
    except ProcessRaisedException as error:
        return str(error).strip().rpartition("\n")[2]  # of a traceback, the error
    finally:
        for process in context.processes:
            process.kill()
            process.join()  # until then it may write to the folder that is about to be removed
    return f"it ended before step {kill_at}"


def _run_in_child(_: int, name: str, config: Config, kill_at: int) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    trainer = make_trainer(name, config)
    limit_validation(trainer)
    run_to(trainer, kill_at, kill_at)
