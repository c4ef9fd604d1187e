"""Callbacks observe the training, and never change its numbers. Here they are made from a config."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from fundamentallm.config.registry import resolve
from fundamentallm.config.schema import Config
from fundamentallm.errors import ConfigError, Problem, raise_all
from fundamentallm.run.folder import LOG
from fundamentallm.training.callbacks.base import (
    Callback as Callback,
    CallbackList as CallbackList,
    SaveBestCallback as SaveBestCallback,
)
from fundamentallm.training.callbacks.console import (
    LoggingCallback as LoggingCallback,
    ProgressCallback as ProgressCallback,
)
from fundamentallm.training.callbacks.curves import VisualizationCallback as VisualizationCallback
from fundamentallm.training.callbacks.observing import (
    ProfilerCallback as ProfilerCallback,
    SampleCallback as SampleCallback,
)

KNOWN = {"curves": VisualizationCallback, "samples": SampleCallback, "profiler": ProfilerCallback}


def default_callbacks(config: Config, output_dir: Path | None, has_validation: bool) -> list[Callback]:
    """Returns a progress bar, log lines (also in `output_dir`), and one that keeps the best checkpoint."""
    training = config.training
    callbacks: list[Callback] = [ProgressCallback(), LoggingCallback(output_dir / LOG if output_dir else None)]
    if has_validation and training.checkpoint_dir is not None:
        callbacks.append(SaveBestCallback(training.early_stopping_metric, training.early_stopping_mode))
    return callbacks


def log_path(callbacks: Iterable[Callback]) -> Path | None:
    """Returns the file that a LoggingCallback appends the log lines to, or None."""
    return next((one.path for one in callbacks if isinstance(one, LoggingCallback) and one.path), None)


def make_callbacks(config: Config) -> list[Callback]:
    """Make the callbacks that `config` names, and the curves, which need not be named. Raises ConfigError."""
    callbacks: list[Callback] = []
    problems: list[str] = []
    for name in config.callbacks if "curves" in config.callbacks else ["curves", *config.callbacks]:
        options, setting = config.callback_options.get(name, {}), f"callback_options.{name}"
        try:
            kind = resolve("callbacks", name, KNOWN)
            if not (isinstance(kind, type) and issubclass(kind, Callback)):
                raise ConfigError(Problem("callbacks", name, "subclasses of Callback"))
            callbacks.append(kind(**options))
        except TypeError as error:
            problems.append(Problem(setting, options, reason=f"which {name} does not take: {error}"))
        except ConfigError as error:
            if name in config.callbacks or options:
                problems += [one if one.setting == "callbacks" else one.within(setting) for one in error.problems]
            elif os.environ.get("RANK", "0") == "0":  # curves that nobody asked for
                print(f"no curves.png: {error}", file=sys.stderr)
    raise_all(problems)
    return callbacks
