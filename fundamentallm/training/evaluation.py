"""Validation: sums over every target, divided once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from fundamentallm.config import IGNORE_INDEX
from fundamentallm.data.datasets import TokenSamples
from fundamentallm.data.loaders import StepSampler, device_batches
from fundamentallm.errors import ConfigError
from fundamentallm.training.metrics import RunningMean


@torch.no_grad()
def evaluate(
    step_model: nn.Module,
    loader: DataLoader[Any],
    samples: StepSampler,
    accelerator: Accelerator,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Loss over every target of a loader, whatever its batch size and the number of processes.

    Args:
        step_model: maps (inputs, targets) to the loss summed over targets; in evaluation mode meanwhile.
        loader: the data.
        samples: how this process runs through it.
        accelerator: adds up the processes' sums.
        is_interrupted: asked after each batch, answers alike on all processes; True breaks off.

    Returns:
        `val_loss` (mean per target, in nats for our losses), `val_perplexity` (its exponential), and for text
        `val_bits_per_byte`; None where broken off.

    Raises:
        ConfigError: if there is no target that counts.
    """
    was_training = step_model.training
    step_model.eval()
    mean = RunningMean(accelerator.device)
    try:
        for inputs, targets, parts in device_batches(loader, samples, 0, samples.steps_per_epoch, accelerator.device):
            for x, y in zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True):
                mean.add(step_model(x, y), (y != IGNORE_INDEX).sum())
            if is_interrupted():
                return None
    finally:
        step_model.train(was_training)
    total, count = accelerator.reduce(mean.totals, "sum").tolist()
    if count == 0:
        raise ConfigError("val_loader has no target that counts; give it some.")
    loss = total / count
    metrics = {"val_loss": loss, "val_perplexity": math.exp(loss) if loss < 700 else math.inf}
    if isinstance(loader.dataset, TokenSamples) and loader.dataset.num_bytes:
        metrics["val_bits_per_byte"] = total / math.log(2) / loader.dataset.num_bytes
    return metrics
