"""The run under examination, and what a check says about it."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fundamentallm.commands.doctor.forecast import Rehearsal, rehearse
from fundamentallm.commands.trial import make_trainer, trial_config
from fundamentallm.config.schema import Config
from fundamentallm.distributed.dtensor import seed_device
from fundamentallm.training.trainer import Trainer


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do where it failed."""

    status: Literal["pass", "fail", "skipped"]
    figure: str
    advice: str = ""


class Case:
    """The run under examination.

    Args:
        config: the user's, resolved.
        trainer: 'module:name' of a function from a Config to a Trainer.
        folder: an empty one, for everything that is written.
    """

    def __init__(self, config: Config, trainer: str, folder: Path) -> None:
        self.config, self.trainer, self.folder = config, trainer, folder

    def new_folder(self) -> Path:
        """A folder for one trial."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def make(self, dropout: bool = True, **training: Any) -> Trainer:
        """A fresh Trainer in a folder of its own; without `dropout` as far as the config decides.

        Raises:
            ConfigError: as `make_trainer` does.
        """
        return make_trainer(self.trainer, trial_config(self.config, self.new_folder(), dropout, **training))

    @functools.cached_property
    def rehearsal(self) -> Rehearsal:
        """A few watched steps, made when first asked for."""
        return rehearse(self.make())


def draws_random_numbers(trainer: Trainer, inputs: Tensor, targets: Tensor) -> bool:
    """Whether the loss in training mode depends on the seed."""
    trainer.model_with_loss.train()
    losses = []
    for seed in range(3):
        seed_device(seed, inputs.device)
        with torch.no_grad():
            losses.append(trainer.model_with_loss(inputs, targets).item())
    return len(set(losses)) > 1


def tolerance(trainer: Trainer, exact: float) -> float:
    """How far two numbers may be apart, relatively: `exact` in float32, the precision's rounding otherwise."""
    return exact if trainer.accelerator.mixed_precision == "no" else 1e-2


def distance(one: float | Tensor, other: float | Tensor) -> float:
    """Of two numbers, relative to the larger one; infinite where one is not a number."""
    one, other = float(one), float(other)
    if one == other:
        return 0.0
    result = abs(one - other) / max(abs(one), abs(other))
    return result if result == result else float("inf")


def within(apart: float) -> str:
    """A relative distance in words."""
    return f"within {apart:.0e}" if apart else "to the bit"


def counted(count: int, noun: str) -> str:
    """A number and its noun."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def listed(names: Sequence[str], at_most: int = 4) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more
