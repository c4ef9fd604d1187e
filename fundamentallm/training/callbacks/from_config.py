"""Makes callbacks from a config."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fundamentallm.config.registry import resolve
from fundamentallm.config.schema import Config
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.run.folder import LOG
from fundamentallm.training.callbacks.base import Callback
from fundamentallm.training.callbacks.console import LoggingCallback, ProgressCallback
from fundamentallm.training.callbacks.curves import VisualizationCallback
from fundamentallm.training.callbacks.profiler import ProfilerCallback
from fundamentallm.training.callbacks.samples import SampleCallback
from fundamentallm.training.callbacks.save_best import SaveBestCallback


def default_callbacks(config: Config, output_dir: Path | None, has_validation: bool) -> list[Callback]:
    """Returns a progress bar, log lines (also in `output_dir`), and one that keeps the best checkpoint."""
    training = config.training
    path = None if output_dir is None else output_dir / LOG
    callbacks: list[Callback] = [ProgressCallback(), LoggingCallback(path)]
    if has_validation and training.checkpoint_dir is not None:
        callbacks.append(SaveBestCallback(training.early_stopping_metric, training.early_stopping_mode))
    return callbacks


def log_path(callbacks: Iterable[Callback]) -> Path | None:
    """Returns the file that a LoggingCallback appends the log lines to, or None."""
    return next((one.path for one in callbacks if isinstance(one, LoggingCallback) and one.path), None)


def make_callbacks(config: Config) -> list[Callback]:
    """Make the callbacks that `config` names, and the curves, which need not be named.

    Raises ConfigError, listing names that cannot be resolved and options that are wrong.
    """
    known = {"curves": VisualizationCallback, "samples": SampleCallback, "profiler": ProfilerCallback}
    callbacks: list[Callback] = []
    problems: list[str] = []
    names = config.callbacks if "curves" in config.callbacks else ["curves", *config.callbacks]
    for name in names:
        options = config.callback_options.get(name, {})
        try:
            callbacks.append(_make_callback(resolve("callbacks", name, known), name, options))
        except ConfigError as error:
            if name in config.callbacks or options:
                problems += error.problems
            elif os.environ.get("RANK", "0") == "0":  # curves that nobody asked for
                print(f"no curves.png: {error}", file=sys.stderr)
    if problems:
        raise ConfigError(problems)
    return callbacks


def _make_callback(kind: Any, name: str, options: dict[str, Any]) -> Callback:
    if not (isinstance(kind, type) and issubclass(kind, Callback)):
        raise ConfigError(Problem("callbacks", name, "subclasses of Callback", reason=f"a {type(kind).__name__}"))
    setting = f"callback_options.{name}"
    try:
        return kind(**options)
    except TypeError as error:
        raise ConfigError(Problem(setting, options, reason=f"which does not fit: {error}")) from error
    except ConfigError as error:
        raise ConfigError([problem.within(setting) for problem in error.problems]) from error
