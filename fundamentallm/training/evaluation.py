"""Validation: sums over all targets, divided once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import nn
from torch.utils.data import DataLoader

from fundamentallm.config.schema import METRIC_NAMES
from fundamentallm.data.datasets import TokenSamples
from fundamentallm.distributed.batches import StepBatch
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.models.with_loss import describe
from fundamentallm.run.progress import RunningMean
from fundamentallm.training.metrics import Metric


@torch.no_grad()
def evaluate(
    step_model: nn.Module,
    loader: DataLoader[Any],
    batches: Iterable[StepBatch],
    accelerator: Accelerator,
    further: Mapping[str, Metric],
    is_interrupted: Callable[[], bool],
) -> dict[str, float] | None:
    """Returns the metrics over all targets of a loader; batch size and number of processes do not affect them.

    Args:
        step_model: maps a batch to the loss summed over targets.
        loader: the validation data.
        batches: this process's part of each of its batches.
        accelerator: adds up the sums of all processes.
        further: further metrics by name, which need all outputs of a micro-batch. NaN if they counted nothing.
        is_interrupted: called after each batch; True ends the validation with None. It must agree on all processes.

    Raises:
        ConfigError: if all targets are ignored, or a metric does not return (sum, count).
    """
    was_training, objective = step_model.training, accelerator.unwrap_model(step_model)
    step_model.eval()
    mean = RunningMean(accelerator.device)
    metrics = {name: _Measured(name, metric, accelerator.device) for name, metric in further.items()}
    try:
        for batch in batches:
            for content, rows in batch.micro_batches(objective.trims or bool(metrics)):
                result = step_model(content, with_outputs=bool(metrics))
                if rows == 0:  # padding only
                    continue
                mean.add(result[0] if metrics else result, objective.num_targets(content))
                for metric in metrics.values():
                    metric.update(convert_to_fp32(result[1]), objective.metric_batch(content))
            if is_interrupted():
                return None
    finally:
        step_model.train(was_training)
    own = [metric.mean.totals for metric in metrics.values()]
    (total, count), *others = accelerator.reduce(torch.cat([mean.totals, *own]), "sum").view(-1, 2).tolist()
    if count == 0:
        raise ConfigError("val_loader has only ignored targets; give it some that count.")
    loss = total / count
    values = {"val_loss": loss, "val_perplexity": math.exp(loss) if loss < 700 else math.inf}
    if num_bytes := _num_bytes(loader):
        values["val_bits_per_byte"] = total / math.log(2) / num_bytes
    return values | {name: metrics[name].value(s, n) for name, (s, n) in zip(metrics, others, strict=True)}


def metric_names(loader: DataLoader[Any] | None, further: Collection[str] = ()) -> list[str]:
    """Returns the names of the metrics of `evaluate`: bits per byte for text only, and all names without a loader."""
    left_out = "val_bits_per_byte" if loader is not None and not _num_bytes(loader) else None
    return [name for name in (*METRIC_NAMES, *further) if name != left_out]


def _num_bytes(loader: DataLoader[Any]) -> int | None:
    """Returns the UTF-8 bytes of the targets, or None if they are not text or it is not known."""
    return loader.dataset.num_bytes if isinstance(loader.dataset, TokenSamples) else None


class _Measured:
    """A metric over all batches: the mean of its (sum, count), or what it computes itself if it has `compute`."""

    def __init__(self, name: str, metric: Any, device: torch.device) -> None:
        self.name, self.metric, self.mean = name, metric, RunningMean(device)
        self.collects = callable(getattr(metric, "compute", None))
        if hasattr(metric, "reset"):  # an interrupted validation may have left something
            metric.reset()

    def update(self, outputs: Any, batch: Any) -> None:
        if outputs is None:
            advice = "Have it return (loss, outputs)."
            raise ConfigError(
                Problem("objective", "a loss without outputs", advice=advice, reason=f"and {self.name} needs them")
            )
        if self.collects:
            self.metric.update(outputs, batch)
            return
        result = self.metric(outputs, batch)
        try:
            total, count = (torch.as_tensor(value).reshape(()) for value in result)
        except (TypeError, ValueError, RuntimeError) as error:
            text = f"the metric {self.name} returned {describe(result)}; allowed: (sum, count), two scalars."
            raise ConfigError(text) from error
        self.mean.add(total, count)

    def value(self, total: float, count: float) -> float:
        """Returns the metric over all processes, whose sums and counts were added up."""
        if self.collects:
            return float(self.metric.compute())
        return total / count if count else math.nan
