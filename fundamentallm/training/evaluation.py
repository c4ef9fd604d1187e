"""Validation: sums over all targets, divided once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fundamentallm.config.schema import IGNORE_INDEX, METRIC_NAMES
from fundamentallm.data.datasets import TokenSamples
from fundamentallm.data.loaders import device_batches
from fundamentallm.data.sampler import StepSampler
from fundamentallm.errors import ConfigError
from fundamentallm.run.progress import RunningMean
from fundamentallm.training.metrics import Metric


@torch.no_grad()
def evaluate(
    step_model: nn.Module,
    loader: DataLoader[Any],
    samples: StepSampler,
    accelerator: Accelerator,
    is_interrupted: Callable[[], bool] = lambda: False,
    further: Mapping[str, Metric] | None = None,
) -> dict[str, float] | None:
    """Returns the loss over all targets of a loader; batch size and number of processes do not affect it.

    Args:
        step_model: maps (inputs, targets) to the loss summed over targets; it is in evaluation mode meanwhile.
        loader: the validation data.
        samples: decides which samples this process evaluates.
        accelerator: adds up the sums of all processes.
        is_interrupted: called after each batch; True ends the validation. It must agree on all processes.
        further: further metrics by name, which need all logits of a micro-batch.

    Returns:
        `val_loss` (mean per target, in nats for our losses), `val_perplexity` (its exponential), for text
        `val_bits_per_byte`, and the `further` metrics, NaN if they counted nothing; None if interrupted.

    Raises:
        ConfigError: if all targets are ignored, or a metric does not return (sum, count).
    """
    was_training = step_model.training
    step_model.eval()
    mean, further = RunningMean(accelerator.device), further or {}
    means = {name: RunningMean(accelerator.device) for name in further}
    batches = device_batches(loader, samples, 0, samples.steps_per_epoch, accelerator.device)
    try:
        for inputs, targets, num_micro_batches, rows in batches:
            for x, y in zip(
                inputs.tensor_split(num_micro_batches), targets.tensor_split(num_micro_batches), strict=True
            ):
                if further:
                    loss, logits = step_model(x, y, with_logits=True)
                    if rows > 0:
                        for name, metric in further.items():
                            means[name].add(*_sum_and_count(name, metric, logits[:rows].float(), y[:rows]))
                    rows -= len(y)
                else:
                    loss = step_model(x, y)
                mean.add(loss, (y != IGNORE_INDEX).sum())
            if is_interrupted():
                return None
    finally:
        step_model.train(was_training)
    totals = torch.cat([each.totals for each in (mean, *means.values())])  # one exchange for all
    (total, count), *others = accelerator.reduce(totals, "sum").view(-1, 2).tolist()
    if count == 0:
        raise ConfigError("val_loader has only ignored targets; give it some that count.")
    loss = total / count
    metrics = {"val_loss": loss, "val_perplexity": math.exp(loss) if loss < 700 else math.inf}
    if num_bytes := _num_bytes(loader):
        metrics["val_bits_per_byte"] = total / math.log(2) / num_bytes
    return metrics | {name: s / n if n else math.nan for name, (s, n) in zip(further, others, strict=True)}


def metric_names(loader: DataLoader[Any] | None, further: Collection[str] = ()) -> list[str]:
    """Returns the names of the metrics of `evaluate`: bits per byte for text only, and all names without a loader."""
    left_out = "val_bits_per_byte" if loader is not None and not _num_bytes(loader) else None
    return [name for name in (*METRIC_NAMES, *further) if name != left_out]


def _num_bytes(loader: DataLoader[Any]) -> int | None:
    """Returns the UTF-8 bytes of the targets, or None if they are not text or it is not known."""
    return loader.dataset.num_bytes if isinstance(loader.dataset, TokenSamples) else None


def _sum_and_count(name: str, metric: Metric, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    result = metric(logits, targets)
    if not isinstance(result, tuple) or len(result) != 2:
        raise ConfigError(f"the metric {name} returned {type(result).__name__}; allowed: (sum, count), two scalars.")
    total, count = (torch.as_tensor(value, device=logits.device) for value in result)
    if total.numel() != 1 or count.numel() != 1:
        shapes = f"{tuple(total.shape)} and {tuple(count.shape)}"
        raise ConfigError(f"the metric {name} returned shapes {shapes}; allowed: (sum, count), two scalars.")
    return total.reshape(()), count.reshape(())
