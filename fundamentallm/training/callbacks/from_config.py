"""Makes the callbacks that a config names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fundamentallm.config.registry import resolve
from fundamentallm.config.schema import Config
from fundamentallm.errors import ConfigError
from fundamentallm.training.callbacks.base import Callback
from fundamentallm.training.callbacks.console import LoggingCallback, ProgressCallback
from fundamentallm.training.callbacks.save_best import SaveBestCallback

if TYPE_CHECKING:
    from fundamentallm.training.callbacks.base import Callback


def default_callbacks(config: Config, output_dir: Path | None, has_validation: bool) -> list[Callback]:
    """A progress bar, log lines (in the output_dir, if there is one), and keeping the best checkpoint."""
    training = config.training
    path = None if output_dir is None else output_dir / "metrics.jsonl"
    callbacks: list[Callback] = [ProgressCallback(), LoggingCallback(path)]
    if has_validation and training.checkpoint_dir is not None:
        callbacks.append(SaveBestCallback(training.early_stopping_metric, training.early_stopping_mode))
    return callbacks


def _callbacks(config: Config) -> list[Callback]:
    """Those beyond the Trainer's own: the curves, and what the config names."""
    from fundamentallm.training.callbacks.base import Callback
    from fundamentallm.training.callbacks.curves import VisualizationCallback
    from fundamentallm.training.callbacks.profiler import ProfilerCallback
    from fundamentallm.training.callbacks.samples import SampleCallback
    from fundamentallm.training.callbacks.update_ratios import RatioCallback

    known: dict[str, type[Callback]] = {
        "curves": VisualizationCallback,
        "samples": SampleCallback,
        "profiler": ProfilerCallback,
        "ratios": RatioCallback,
    }
    problems: list[str] = []
    callbacks: list[Callback] = []
    curves = {"path": Path(config.output_dir) / "curves.png", **config.callback_options.get("curves", {})}
    options = config.callback_options | {"curves": curves}
    for name in [*(["curves"] if "curves" not in config.callbacks else []), *config.callbacks]:
        try:
            kind = resolve("callbacks", name, known)
            if not (isinstance(kind, type) and issubclass(kind, Callback)):
                problems.append(f"callbacks has {name!r}, a {type(kind).__name__}; allowed: subclasses of Callback.")
                continue
            try:
                callbacks.append(kind(**options.get(name, {})))
            except TypeError as error:
                given = config.callback_options.get(name, {})
                problems.append(f"callback_options.{name} is {given!r}, which does not fit: {error}.")
        except ConfigError as error:
            if name == "curves" and name not in config.callbacks and not config.callback_options.get(name):
                print(f"no curves.png: {error}", file=sys.stderr)  # nobody asked for them
            else:
                problems += error.problems
    if problems:
        raise ConfigError(problems)
    return callbacks
