"""Numbers over time: sums kept on the device, and the history of a run."""

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
from fundamentallm.errors import ConfigError

MEASURED = frozenset({"tokens_per_second", "mfu", "memory_gb"})
"""Numbers of a log line that the clock and the machine decide: two runs that are the same differ in nothing else."""


class RunningMean:
    """A mean as (sum, count) on the device: adding never waits for it, and the sums of processes add up.

    Sums are float64 where the device has it: a float32 sum stops growing by ones at 2^24.
    """

    def __init__(self, device: torch.device) -> None:
        self._totals = torch.zeros(2, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
        self._sum, self._count = self._totals.unbind()  # views of them

    def add(self, total: Tensor, count: Tensor) -> None:
        """Add a sum and how many values it is over (scalars)."""
        self._sum += total
        self._count += count

    @property
    def totals(self) -> Tensor:
        """(sum, count), to be reduced over processes."""
        return self._totals

    def reset(self) -> None:
        """Start again from nothing."""
        self._totals.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Sum and count."""
        return {"totals": self._totals}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from saved sums. Raises ValueError if they are none."""
        if state["totals"].shape != self._totals.shape:
            raise ValueError(f"the sums have shape {state['totals'].shape}.")
        self._totals.copy_(state["totals"])


CLOCKS = ("step", "val_step")
"""Metrics that say to which optimizer step the others given with them belong."""

Metric = Callable[[Tensor, Tensor], "tuple[Tensor | float, Tensor | float]"]
"""Of logits (B, T, V) in float32 and targets (B, T), some of them `IGNORE_INDEX`: a sum, and over how many values.
Both are added up over all rows of the validation data, each once, wherever it was computed."""


def further_metrics(names: Sequence[str], given: Mapping[str, Metric] | None = None) -> dict[str, Metric]:
    """Validation metrics by the name they are logged under: val_ and the function's, or the one `given`.

    Args:
        names: 'module:name' of each.
        given: others, by name.

    Raises:
        ConfigError: listing what cannot be imported or called, and names that are taken.
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
            problems.append(f"validation_metrics has {name!r}, a {type(metric).__name__}; allowed: functions.")
        if key in metrics or key in METRIC_NAMES:
            problems.append(f"validation_metrics has {name!r}, and there is a {key} already; give it another name.")
        metrics[key] = metric
    if problems:
        raise ConfigError(problems)
    return metrics


class MetricTracker:
    """The history of a run: a list of numbers for each metric, in the order they came.

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

        Together with a `step`, or a validation's `val_step`, one that has been missing is filled up with NaN first.
        """
        clock = next((key for key in CLOCKS if key in metrics_dict), "")
        before = len(self.metrics.get(clock, ()))
        for key, value in metrics_dict.items():
            values = self.metrics.setdefault(key, [])
            values += [math.nan] * (before - len(values))
            values.append(value)

    def by_step(self) -> dict[str, list[float]]:
        """The history as a table, in columns of one length: a row for each step that was logged or validated.

        NaN stands where a row has no value. `step` is that of training lines, and `val_step` that of validations, which
        is no column of its own.
        """
        clocks = {clock: self.metrics.get(clock, []) for clock in CLOCKS}
        rows = {step: row for row, step in enumerate(sorted({step for steps in clocks.values() for step in steps}))}
        table: dict[str, list[float]] = {"step": list(rows)}
        for key, values in self.metrics.items():
            if key not in clocks:
                column = table[key] = [math.nan] * len(rows)
                # A metric that a setting has taken away ends before its clock does.
                for step, value in zip(clocks["val_step" if key.startswith("val_") else "step"], values, strict=False):
                    column[rows[step]] = value
        return table

    def get_history(self) -> dict[str, list[float]]:
        """All values of all metrics; a copy, which the caller may change."""
        return {key: list(values) for key, values in self.metrics.items()}

    def get_latest(self, metric_name: str) -> float | None:
        """The last value of a metric, or None where there is none."""
        values = self.metrics.get(metric_name)
        return values[-1] if values else None

    def get_best(self, metric_name: str, mode: str = "min") -> float | None:
        """The smallest or largest value of a metric, NaN never being it; None where there is none.

        Raises:
            ValueError: if mode is neither 'min' nor 'max'.
        """
        if mode not in ("min", "max"):
            raise ValueError(f"mode is {mode!r}; allowed: 'min', 'max'.")
        values = [value for value in self.metrics.get(metric_name, ()) if not math.isnan(value)]
        return (min if mode == "min" else max)(values, default=None)

    def reset(self) -> None:
        """Forget everything."""
        self.metrics.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """The history as tensors: int64 for whole numbers, else float64, which hold them exactly."""
        whole = {key for key, values in self.metrics.items() if all(isinstance(value, int) for value in values)}
        return {
            key: torch.tensor(values, dtype=torch.int64 if key in whole else torch.float64)
            for key, values in self.metrics.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved history. Raises ValueError if a metric's values are no list of numbers."""
        for key, values in state.items():
            if values.ndim != 1:
                raise ValueError(f"the values of {key} have shape {values.shape}.")
        self.metrics = {key: values.tolist() for key, values in state.items()}


def peak_memory_gb(device: torch.device) -> float | None:
    """Most memory this process has had so far, in 10^9 bytes: allocated on the device, or on a CPU resident.

    The host does not wait for it. None where the device does not count.
    """
    if device.type == "cpu":
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most * (1 if sys.platform == "darwin" else 1024) / 1e9
    count = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return None if count is None else count(device) / 1e9
