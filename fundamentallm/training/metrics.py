"""Metrics: validation by sums over all targets, divided once, and the history of a run."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fundamentallm.config.registry import resolve
from fundamentallm.config.schema import METRIC_NAMES
from fundamentallm.data.datasets import TokenDataset
from fundamentallm.distributed.batches import StepBatch
from fundamentallm.errors import ConfigError, Problem, raise_all
from fundamentallm.models.with_loss import describe
from fundamentallm.run.folder import numbers, read_log
from fundamentallm.run.progress import RunningMean

MEASURED = frozenset({"tokens_per_second", "mfu", "memory_gb", "time"})
"""Numbers of a log line that depend on the machine. Two identical runs differ in nothing else."""
CLOCKS = ("step", "val_step")
"""Metrics that hold the optimizer step of the metrics logged with them."""

Metric = Callable[[Any, Any], "tuple[Tensor | float, Tensor | float]"] | Any
"""Maps outputs in float32 and their batch to a sum and the number of its values, which are added up over all rows of
the validation data. For pairs, these are logits (B, T, V) and targets (B, T), some of them `IGNORE_INDEX`.
Or an object that collects by itself, as those of torchmetrics: it has `update(outputs, batch)`, called for each
micro-batch, `compute()`, called on all processes at the end, and perhaps `reset()`."""


def further_metrics(
    names: Sequence[str], given: Mapping[str, Metric] | None = None, sets: Collection[str] = ()
) -> dict[str, Metric]:
    """Returns metrics, from 'module:name' and `given` by name, by the name under which they are logged: val_NAME.

    Raises ConfigError if one cannot be imported or called, or its name is taken, as by a loss of the validation `sets`.
    """
    problems, metrics = [], {}
    named = [(name.rpartition(":")[2], resolve("validation_metrics", name, {})) for name in names]
    for name, metric in (*(given or {}).items(), *named):
        key = f"val_{name}"
        if not callable(metric) and not hasattr(metric, "compute"):
            problems.append(Problem("validation_metrics", name, "functions", reason=f"a {type(metric).__name__}"))
        if key in metrics or key in loss_names(sets):
            reason = f"and there is a {key} already"
            problems.append(Problem("validation_metrics", name, reason=reason, advice="Give it another name."))
        metrics[key] = metric
    raise_all(problems)
    return metrics


@torch.no_grad()
def evaluate(
    step_model: nn.Module,
    loaders: Mapping[str, DataLoader[Any]],
    batches: Iterable[tuple[str, StepBatch]],
    accelerator: Accelerator,
    further: Mapping[str, Any],
    is_interrupted: Callable[[], bool],
    most: int | None = None,
) -> dict[str, float] | None:
    """Returns the metrics over all targets; batch size and number of processes do not affect them.

    `batches` are this process's parts of each of the `loaders` by name ("": its loss is val_loss), of at most `most`
    samples each. `further` metrics by name are NaN if they counted nothing. If `is_interrupted`, called after each
    batch, returns True (on all processes alike), the result is None. Raises ConfigError if all targets of a loader are
    ignored, or a metric does not return (sum, count).
    """
    was_training, objective = step_model.training, accelerator.unwrap_model(step_model)
    step_model.eval()
    means = {name: RunningMean(accelerator.device) for name in (*map(_loss_name, loaders), *further)}
    for metric in further.values():
        if hasattr(metric, "reset"):  # an interrupted validation may have left something
            metric.reset()
    try:
        for set_name, batch in batches:
            for content, rows in batch.micro_batches(objective.trims or bool(further)):
                result = step_model(content, with_outputs=bool(further))
                if rows == 0:  # padding only
                    continue
                means[_loss_name(set_name)].add(result[0] if further else result, objective.num_targets(content))
                for name, metric in further.items():
                    if result[1] is None:
                        raise ConfigError(f"the metric {name} needs outputs; have the objective return (loss, outputs)")
                    are_pairs = objective.objective(content) is objective.of_pairs  # whose metrics take the targets
                    pair = convert_to_fp32(result[1]), content[1] if are_pairs else content
                    if hasattr(metric, "compute"):
                        metric.update(*pair)
                    else:
                        means[name].add(*_sum_and_count(name, metric(*pair)))
            if is_interrupted():
                return None
    finally:
        step_model.train(was_training)
    totals = torch.stack([mean.totals for mean in means.values()])
    sums = dict(zip(means, accelerator.reduce(totals, "sum").tolist(), strict=True))
    losses = {name: sums[_loss_name(name)] for name in loaders}
    for name in [name for name, (_, count) in losses.items() if count == 0]:
        raise ConfigError(f"{name or 'val_loader'} has only ignored targets; give it some that count.")
    total, count = (sum(each) for each in zip(*losses.values(), strict=True))
    loss = total / count
    values = {"val_loss": loss, "val_perplexity": math.exp(loss) if loss < 700 else math.inf}
    if num_bytes := _num_bytes(loaders, most):
        values["val_bits_per_byte"] = total / math.log(2) / num_bytes
    values |= {_loss_name(name): total / count for name, (total, count) in losses.items() if name}
    for name, metric in further.items():
        total, count = sums[name]
        if hasattr(metric, "compute"):
            values[name] = float(metric.compute())
        else:
            values[name] = total / count if count else math.nan
    return values


def _loss_name(name: str) -> str:
    return f"val_{name}_loss" if name else "val_loss"


def loss_names(sets: Collection[str]) -> list[str]:
    """Returns the names of the losses of validation sets, and of what follows from them."""
    return [*METRIC_NAMES, *(_loss_name(name) for name in sets if name)]


def metric_names(loaders: Mapping[str, DataLoader[Any]], further: Collection[str], most: int | None) -> list[str]:
    """Returns the names of the metrics of `evaluate`: bits per byte if known, and all names without a loader."""
    left_out = "val_bits_per_byte" if loaders and not _num_bytes(loaders, most) else None
    return [name for name in (*loss_names(loaders), *further) if name != left_out]


def _num_bytes(loaders: Mapping[str, DataLoader[Any]], most: int | None) -> int | None:
    """Returns the UTF-8 bytes of the targets; None if they are not text, not all are read, or it is not known."""
    total = 0
    for loader in loaders.values():
        data = loader.dataset
        if not isinstance(data, TokenDataset) or data.num_bytes is None or (most is not None and most < len(data)):
            return None
        total += data.num_bytes
    return total


def _sum_and_count(name: str, result: Any) -> list[Tensor]:
    try:
        total, count = (torch.as_tensor(value).reshape(()) for value in result)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the metric {name} returned {describe(result)}; allowed: (sum, count), scalars") from error
    return [total, count]


class MetricTracker:
    """The history of a run: a list of values for each metric.

    With `log`, a file of JSON lines that holds the history, its state is only the latest values.

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

    def __init__(self, log: Path | None = None) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.log = log

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
        steps = sorted({step for clock in CLOCKS for step in self.metrics.get(clock, ())})
        rows = {step: row for row, step in enumerate(steps)}
        table = {"step": steps}
        for key, values in self.metrics.items():
            if key not in CLOCKS:
                table[key] = [math.nan] * len(steps)
                clock = self.metrics.get("val_step" if key.startswith("val_") else "step", [])
                for step, value in zip(clock, values, strict=False):  # shorter if a changed setting turned it off
                    table[key][rows[step]] = value
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

    def state_dict(self) -> dict[str, Any]:
        """Returns the latest values if the history is in a log, otherwise all: int64 for integers, otherwise float64.

        With a log, checkpoints do not grow with the run.
        """
        if self.log is not None:
            return {"latest": {key: values[-1] for key, values in self.metrics.items()}}
        return {key: torch.from_numpy(np.array(values)) for key, values in self.metrics.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved history: the log up to the latest values, or those if the log has not as many lines.

        Raises ValueError if it is not a history.
        """
        if not isinstance(latest := state.get("latest"), dict):  # an earlier version's, or without a log
            if any(values.ndim != 1 for values in state.values()):
                raise ValueError("the history is not one list for each metric.")
            self.metrics = {key: values.tolist() for key, values in state.items()}
            return
        if any(type(value) not in (int, float) for value in latest.values()):
            raise ValueError(f"the latest values are {latest}; allowed: numbers.")
        self.metrics = {}
        log = [] if self.log is None else [numbers(line) for line in read_log(self.log)]
        for clock in CLOCKS:
            last = {key: value for key, value in latest.items() if key.startswith("val_") == (clock == "val_step")}
            for line in log:
                line[clock] = line["step"]
                if ("train_loss" in line) == (clock == "step") and line[clock] <= last.get(clock, -1):
                    self.update({key: line[key] for key in last if key in line})
            if clock in last and self.get_latest(clock) != last[clock]:
                self.update(last)


def peak_memory_gb(device: torch.device) -> float | None:
    """Returns the peak memory of this process in GB: on the device (None: not counted), or resident on a CPU."""
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
    count = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return None if count is None else count(device) / 1e9
