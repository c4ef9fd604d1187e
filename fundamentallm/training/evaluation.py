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
from fundamentallm.errors import ConfigError
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

    `batches` are this process's parts. `further` metrics by name are NaN if they counted nothing. If `is_interrupted`,
    called after each batch, returns True (on all processes alike), the result is None. Raises ConfigError if all
    targets are ignored, or a metric does not return (sum, count).
    """
    was_training, objective = step_model.training, accelerator.unwrap_model(step_model)
    step_model.eval()
    means = {name: RunningMean(accelerator.device) for name in ("val_loss", *further)}
    for metric in further.values():
        if hasattr(metric, "reset"):  # an interrupted validation may have left something
            metric.reset()
    try:
        for batch in batches:
            for content, rows in batch.micro_batches(objective.trims or bool(further)):
                result = step_model(content, with_outputs=bool(further))
                if rows == 0:  # padding only
                    continue
                means["val_loss"].add(result[0] if further else result, objective.num_targets(content))
                for name, metric in further.items():
                    if result[1] is None:
                        raise ConfigError(f"the metric {name} needs outputs; have the objective return (loss, outputs)")
                    pair = convert_to_fp32(result[1]), objective.metric_batch(content)
                    if hasattr(metric, "compute"):
                        metric.update(*pair)
                    else:
                        means[name].add(*_sum_and_count(name, metric(*pair)))
            if is_interrupted():
                return None
    finally:
        step_model.train(was_training)
    totals = torch.stack([mean.totals for mean in means.values()])
    (total, count), *others = accelerator.reduce(totals, "sum").tolist()
    if count == 0:
        raise ConfigError("val_loader has only ignored targets; give it some that count.")
    loss = total / count
    values = {"val_loss": loss, "val_perplexity": math.exp(loss) if loss < 700 else math.inf}
    if num_bytes := _num_bytes(loader):
        values["val_bits_per_byte"] = total / math.log(2) / num_bytes
    for (name, metric), (total, count) in zip(further.items(), others, strict=True):
        if hasattr(metric, "compute"):
            values[name] = float(metric.compute())
        else:
            values[name] = total / count if count else math.nan
    return values


def metric_names(loader: DataLoader[Any] | None, further: Collection[str] = ()) -> list[str]:
    """Returns the names of the metrics of `evaluate`: bits per byte for text only, and all names without a loader."""
    left_out = "val_bits_per_byte" if loader is not None and not _num_bytes(loader) else None
    return [name for name in (*METRIC_NAMES, *further) if name != left_out]


def _num_bytes(loader: DataLoader[Any]) -> int | None:
    """Returns the UTF-8 bytes of the targets, or None if they are not text or it is not known."""
    return loader.dataset.num_bytes if isinstance(loader.dataset, TokenSamples) else None


def _sum_and_count(name: str, result: Any) -> list[torch.Tensor]:
    try:
        total, count = (torch.as_tensor(value).reshape(()) for value in result)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the metric {name} returned {describe(result)}; allowed: (sum, count), scalars") from error
    return [total, count]
