"""Learning-rate schedules: pure functions of the optimizer step.

Each curve is exactly at the peak on the last warm-up step (without warm-up on the first step), and at `min_lr_ratio`
times the peak on the last step; `constant` stays at the peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from types import SimpleNamespace
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from fundamentallm.config.registry import resolve, unknown_options
from fundamentallm.config.schema import TrainingConfig
from fundamentallm.config.validation import Interval
from fundamentallm.errors import ConfigError, Problem, raise_all

# A decay maps progress (0 at the peak, 1 on the last step) to a height: 1 is the peak, 0 is `min_lr_ratio`.


def cosine(progress: float) -> float:
    """Half a cosine wave (SGDR without restarts, arXiv:1608.03983)."""
    return (1 + math.cos(math.pi * progress)) / 2


def cosine_with_restarts(progress: float, cycles: int = 2) -> float:
    """`cycles` half cosine waves of equal length, each from the peak down (SGDR, arXiv:1608.03983)."""
    if not isinstance(cycles, int) or isinstance(cycles, bool) or cycles < 1:
        raise ConfigError(Problem("lr_scheduler_options.cycles", cycles, "an integer, at least 1"))
    # Rounded, so that a restart falls on its step even if i / n * cycles is slightly below a whole number.
    return cosine(round(progress * cycles, 9) % 1 if progress < 1 else 1)


def wsd(progress: float, decay_fraction: float = 0.2) -> float:
    """Warm-up, stable, decay: the peak, then a straight line over the last `decay_fraction` (arXiv:2404.06395)."""
    if decay_fraction not in (allowed := Interval(low=0, high=1, open_low=True)):
        raise ConfigError(Problem("lr_scheduler_options.decay_fraction", decay_fraction, str(allowed)))
    return min(1.0, (1 - progress) / decay_fraction)


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts,
    "wsd": wsd,
}


class StepSchedule(LambdaLR):
    """A `LambdaLR` whose only state is the step: the curve comes from the config, never from a checkpoint."""

    def get_last_lr(self) -> list[Any]:
        """Returns the learning rate of each group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Returns the step."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Jump to a step."""
        self.last_epoch = step = state_dict["last_epoch"]
        for group, base, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * factor(step)


def callers_schedule(scheduler: LRScheduler) -> SimpleNamespace:
    """Returns the state of a schedule that the caller passed. Momenta that it changes are the optimizer's state."""
    return SimpleNamespace(
        state_dict=lambda: {"schedule": scheduler.state_dict()},
        load_state_dict=lambda state: scheduler.load_state_dict(state["schedule"]),
    )


def advance(scheduler: LRScheduler, metric: float | None = None) -> None:
    """Step a schedule after an optimizer step; with `metric`, after a validation, one that follows a metric."""
    if isinstance(scheduler, ReduceLROnPlateau):
        if metric is not None:
            scheduler.step(metric)
    elif metric is None:
        scheduler.step()


def create_scheduler(
    optimizer: Optimizer,
    scheduler_type: str,
    max_epochs: int,
    steps_per_epoch: int,
    warmup_steps: int = TrainingConfig.warmup_steps,
    *,
    min_lr_ratio: float = TrainingConfig.min_lr_ratio,
    **options: Any,
) -> LRScheduler:
    """Returns a schedule over `max_epochs * steps_per_epoch` optimizer steps; call its `step()` after each of them.

    Args:
        optimizer: the learning rates of its groups are the peaks.
        scheduler_type: a name in `SCHEDULES`, or 'module:name' of such a function of progress.
        max_epochs: passes over the data.
        steps_per_epoch: optimizer steps in each.
        warmup_steps: steps of linear warm-up, fewer than the run has.
        min_lr_ratio: learning rate of the last step, as a fraction of the peak.
        options: keyword arguments of the schedule's function.

    Raises:
        ConfigError: if a name or option is not known, or a value is outside its range.

    Examples:
        >>> import torch
        >>> from fundamentallm import create_scheduler
        >>> optimizer = torch.optim.SGD(torch.nn.Linear(4, 2).parameters(), lr=1.0)
        >>> schedule = create_scheduler(optimizer, "linear", 1, steps_per_epoch=6, warmup_steps=2, min_lr_ratio=0)
        >>> list(map(schedule.lr_lambdas[0], range(6)))  # as fractions of the peak
        [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    config = TrainingConfig(
        lr_scheduler=scheduler_type, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio, lr_scheduler_options=options
    )
    return make_schedule(config, optimizer, max_epochs * steps_per_epoch)


def make_schedule(config: TrainingConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Returns the schedule of `config` over a run of `total_steps` optimizer steps, at its first step."""
    name, options, warmup_steps = config.lr_scheduler, config.lr_scheduler_options, config.warmup_steps
    decay, floor = resolve("lr_scheduler", name, SCHEDULES), config.min_lr_ratio
    problems = unknown_options("lr_scheduler_options", name, options, [*signature(decay).parameters][1:])
    if warmup_steps >= total_steps:
        allowed = f"fewer than the steps of the run, max_epochs x steps_per_epoch = {total_steps}"
        problems.append(Problem("warmup_steps", warmup_steps, allowed))
    raise_all(problems)
    peak_step, last_step = max(warmup_steps - 1, 0), total_steps - 1

    def factor(step: int) -> float:  # of the peak
        if step < peak_step:
            return (step + 1) / warmup_steps
        progress = min((step - peak_step) / max(last_step - peak_step, 1), 1.0)
        return float(floor + (1 - floor) * decay(progress, **options))

    factor(last_step)  # raises ConfigError for an option outside its range
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # otherwise torch keeps that of an earlier schedule
    return StepSchedule(optimizer, factor)
