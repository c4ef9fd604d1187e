"""Metrics: sums on the device, and the history of a run."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fundamentallm.config.registry import resolve
from fundamentallm.config.schema import METRIC_NAMES
from fundamentallm.errors import ConfigError, Problem

MEASURED = frozenset({"tokens_per_second", "mfu", "memory_gb"})
"""Numbers of a log line that depend on the machine. Two identical runs differ in nothing else."""


CLOCKS = ("step", "val_step")
"""Metrics that hold the optimizer step of the metrics logged with them."""

Metric = Callable[[Tensor, Tensor], "tuple[Tensor | float, Tensor | float]"]
"""Maps logits (B, T, V) in float32 and targets (B, T), some of them `IGNORE_INDEX`, to a sum and the number of its
values. Both are added up over all rows of the validation data."""


def further_metrics(names: Sequence[str], given: Mapping[str, Metric] | None = None) -> dict[str, Metric]:
    """Returns validation metrics by the name under which they are logged: val_ and the name of the function.

    Args:
        names: 'module:name' of metrics.
        given: more metrics, by name.

    Raises ConfigError, listing metrics that cannot be imported or called, and names that are taken.
    """
    problems: list[str] = []
    found: list[tuple[str, Any]] = [*(given or {}).items()]
    for name in names:
        try:
            found.append((name.rpartition(":")[2], resolve("validation_metrics", name, {})))
        except ConfigError as error:
            problems += error.problems
    metrics: dict[str, Metric] = {}
    for name, metric in found:
        key = f"val_{name}"
        if not callable(metric):
            problems.append(Problem("validation_metrics", name, "functions", reason=f"a {type(metric).__name__}"))
        if key in metrics or key in METRIC_NAMES:
            reason, advice = f"and there is a {key} already", "Give it another name."
            problems.append(Problem("validation_metrics", name, reason=reason, advice=advice))
        metrics[key] = metric
    if problems:
        raise ConfigError(problems)
    return metrics


class MetricTracker:
    """The history of a run: a list of values for each metric.

    Examples:
        >>> from fundamentallm import MetricTracker
        >>> metrics = MetricTracker()
        >>> metrics.update({"step": 10, "train_loss": 2.0})
        >>> metrics.update({"step": 20, "train_loss": 1.0})
        >>> metrics.update({"val_step": 20, "val_loss": 1.5})
        >>> metrics.get_history()
        {'step': [10, 20], 'train_loss': [2.0, 1.0], 'val_step': [20], 'val_loss': [1.5]}
        >>> metrics.by_step()
        {'step': [10, 20], 'train_loss': [2.0, 1.0], 'val_loss': [nan, 1.5]}
    """

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}

    def update(self, metrics_dict: dict[str, float]) -> None:
        """Append one value to each named metric.

        A metric that was missing at earlier steps (`step` or `val_step`) is filled up with NaN first.
        """
        clock = next((key for key in CLOCKS if key in metrics_dict), "")
        before = len(self.metrics.get(clock, ()))
        for key, value in metrics_dict.items():
            values = self.metrics.setdefault(key, [])
            values += [math.nan] * (before - len(values))
            values.append(value)

    def by_step(self) -> dict[str, list[float]]:
        """Returns the history as columns of equal length, with a row for each step that was logged or validated.

        Missing values are NaN. The column `step` holds the steps of log lines and of validations (`val_step`).
        """
        clocks = {clock: self.metrics.get(clock, []) for clock in CLOCKS}
        rows = {step: row for row, step in enumerate(sorted({step for steps in clocks.values() for step in steps}))}
        table: dict[str, list[float]] = {"step": list(rows)}
        for key, values in self.metrics.items():
            if key not in clocks:
                column = table[key] = [math.nan] * len(rows)
                # A metric that a changed setting turned off is shorter than its steps.
                for step, value in zip(clocks["val_step" if key.startswith("val_") else "step"], values, strict=False):
                    column[rows[step]] = value
        return table

    def get_history(self) -> dict[str, list[float]]:
        """Returns a copy of all values of all metrics."""
        return {key: list(values) for key, values in self.metrics.items()}

    def get_latest(self, metric_name: str) -> float | None:
        """Returns the last value of a metric, or None if it has none."""
        values = self.metrics.get(metric_name)
        return values[-1] if values else None

    def get_best(self, metric_name: str, mode: str = "min") -> float | None:
        """Returns the smallest or largest value of a metric that is not NaN, or None if it has none.

        Raises ValueError if mode is neither 'min' nor 'max'.
        """
        if mode not in ("min", "max"):
            raise ValueError(f"mode is {mode!r}; allowed: 'min', 'max'.")
        values = [value for value in self.metrics.get(metric_name, ()) if not math.isnan(value)]
        return (min if mode == "min" else max)(values, default=None)

    def reset(self) -> None:
        """Delete all values."""
        self.metrics.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the history as tensors: int64 for integers, otherwise float64."""
        integers = {key for key, values in self.metrics.items() if all(isinstance(value, int) for value in values)}
        return {
            key: torch.tensor(values, dtype=torch.int64 if key in integers else torch.float64)
            for key, values in self.metrics.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a saved history. Raises ValueError if the values of a metric are not one-dimensional."""
        for key, values in state.items():
            if values.ndim != 1:
                raise ValueError(f"the values of {key} have shape {values.shape}.")
        self.metrics = {key: values.tolist() for key, values in state.items()}


def peak_memory_gb(device: torch.device) -> float | None:
    """Returns the peak memory of this process in 10^9 bytes: allocated on the device, or resident on a CPU.

    None if the device does not count it. The host does not wait for the device.
    """
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
    count = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return None if count is None else count(device) / 1e9
