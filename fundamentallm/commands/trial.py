"""Trial runs: short real runs of a config in temporary folders, for `doctor` and `find_lr`."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fundamentallm.config.registry import resolve
from fundamentallm.config.schema import Config
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.training.callbacks.base import Callback, RunView
from fundamentallm.training.trainer import Trainer

OFF = (
    "early_stopping_patience eval_every_n_steps eval_every_n_epochs save_every_n_steps save_every_n_epochs "
    "max_minutes compile"
)
"""Settings that are null in a trial. Compiling would take a minute of each."""


def make_trial(name: str, config: Config, trials: Path, folder: str | None = None, **training: Any) -> Trainer:
    """Returns the Trainer that the function `name` (`--trainer`) makes of a trial run, logged at each step.

    The run is in a new folder in `trials`, or in `folder`, to launch a trial again. Raises ConfigError if the function
    returns something else, or a Trainer that would write to the run's own folder.
    """
    folder = folder or tempfile.mkdtemp(dir=trials)
    settings: dict[str, Any] = dict.fromkeys(OFF.split())
    settings |= {"checkpoint_dir": f"{folder}/checkpoints", "resume": "auto", "log_every_n_steps": 1}
    settings |= {"eval_at_start": False, "mirror": None}
    trained = dataclasses.replace(config.training, **(settings | training))
    trial = dataclasses.replace(config, output_dir=folder, trackers=[], tracker_options={}, training=trained)
    trainer = resolve("--trainer", name, {})(trial)
    if not isinstance(trainer, Trainer) or trainer.config.training.checkpoint_dir != trained.checkpoint_dir:
        allowed = "a function from a Config to a fundamentallm.Trainer that uses this Config"
        raise ConfigError([Problem("--trainer", name, allowed)])
    trainer.stop_switch.ends_at_once = True  # a signal ends the command, and nothing may count a trial that it cut
    return trainer


class Record(Callback):
    """Records a trial run, and stops it once `is_enough(record)` is true."""

    def __init__(self, is_enough: Callable[[Record], bool]) -> None:
        self.is_enough = is_enough
        self.first_step = self.step = 0  # the first is that of the checkpoint that this launch resumed from
        self.losses: list[float] = []  # after each step
        self.times: list[float] = []  # at the start and after each step
        self.lines: list[dict[str, float]] = []  # the log

    def on_train_begin(self, run: RunView) -> None:
        self.first_step, self.times = run.global_step, [time.perf_counter()]

    def on_step_end(self, run: RunView, loss: float) -> None:
        self.step = run.global_step
        self.losses.append(loss)
        self.times.append(time.perf_counter())
        if self.is_enough(self):
            run.request_stop("the trial run is complete")

    def on_log(self, run: RunView, metrics: dict[str, float]) -> None:
        self.lines.append(dict(metrics))


def run_until(trainer: Trainer, is_enough: Callable[[Record], bool], *others: Callback) -> Record:
    """Train with no callbacks but `others` and return the record."""
    record = Record(is_enough)
    trainer.callbacks.callbacks = [*others, record]
    trainer.train()
    return record
