"""Learning-rate schedules: pure functions of the optimizer step.

Each curve starts above zero, has exactly the peak on the last warm-up step (on the first step without
warm-up), and exactly `min_lr_ratio` times the peak on the last step; `constant` stays at the peak. A run of
one step is at the peak.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fundamentallm.config.registry import resolve
from fundamentallm.config.schema import SCHEDULE_NAMES, TrainingConfig
from fundamentallm.config.validation import Interval, range_problems
from fundamentallm.errors import ConfigError

if TYPE_CHECKING:
    from fundamentallm.config.schema import TrainingConfig
if TYPE_CHECKING:
    pass

# A decay maps progress, 0 on the peak's step to 1 on the run's last step, to the part of the way from
# `min_lr_ratio` up to the peak: 1 at 0 and 0 at 1.


def constant(progress: float) -> float:
    """No decay."""
    return 1.0


def linear(progress: float) -> float:
    """A straight line."""
    return 1 - progress


def cosine(progress: float) -> float:
    """Half a cosine wave (SGDR without restarts, arXiv:1608.03983)."""
    return (1 + math.cos(math.pi * progress)) / 2


def cosine_with_restarts(progress: float, cycles: int = 2) -> float:
    """`cycles` half cosine waves of equal length, each from the peak down (SGDR, arXiv:1608.03983)."""
    if not isinstance(cycles, int) or isinstance(cycles, bool) or cycles < 1:
        raise ConfigError(f"lr_scheduler option cycles is {cycles!r}; allowed: an integer, at least 1.")
    # Rounded, so that a restart falls on its step also where i / n * cycles is a hair below a whole number.
    return cosine(round(progress * cycles, 9) % 1 if progress < 1 else 1)


def wsd(progress: float, decay_fraction: float = 0.2) -> float:
    """Warm-up, stable, decay: the peak, then a straight line over the last `decay_fraction` (arXiv:2404.06395)."""
    if decay_fraction not in Interval(low=0, high=1, open_low=True):
        raise ConfigError(
            f"lr_scheduler option decay_fraction is {decay_fraction!r}; allowed: greater than 0 and at most 1."
        )
    return min(1.0, (1 - progress) / decay_fraction)


SCHEDULES: dict[str, Callable[..., float]] = dict(
    zip(SCHEDULE_NAMES, (constant, linear, cosine, cosine_with_restarts, wsd), strict=True)
)


class StepSchedule(LambdaLR):
    """A `LambdaLR` whose whole state is the step: the curve comes from the config, never from a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Jump to a step. Raises ValueError if it is none."""
        step = state_dict["last_epoch"]
        if type(step) is not int or step < 0:
            raise ValueError(f"the step is {step!r}; allowed: a whole number, at least 0.")
        self.last_epoch = step
        self._last_lr = [base * f(self.last_epoch) for base, f in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr


class CallersSchedule:
    """The state of a schedule of the caller's, with the momenta that it may have moved (as OneCycleLR and CyclicLR do).

    An optimizer's state leaves its settings out, since they come from the config; torch's schedules set momenta again
    with their next step only, which is one too late for a run that goes on.
    """

    MOVED = ("momentum", "betas")

    def __init__(self, scheduler: LRScheduler) -> None:
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        """The schedule's own state, and each group's momenta."""
        groups = self.scheduler.optimizer.param_groups
        momenta = [{name: group[name] for name in self.MOVED if name in group} for group in groups]
        return {"schedule": self.scheduler.state_dict(), "momenta": momenta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them. Raises ValueError if the optimizer has other groups."""
        self.scheduler.load_state_dict(state["schedule"])
        for group, momenta in zip(self.scheduler.optimizer.param_groups, state["momenta"], strict=True):
            group.update({name: momenta[name] for name in self.MOVED if name in momenta})


def create_scheduler(
    optimizer: torch.optim.Optimizer,
    scheduler_type: str,
    max_epochs: int,
    steps_per_epoch: int,
    warmup_steps: int = TrainingConfig.warmup_steps,
    *,
    min_lr_ratio: float = TrainingConfig.min_lr_ratio,
    **options: Any,
) -> LRScheduler:
    """A schedule over `max_epochs * steps_per_epoch` optimizer steps; call its `step()` after each of them.

    Args:
        optimizer: its groups' present learning rates are the peaks.
        scheduler_type: a name in `SCHEDULES`, or 'module:name' of such a function of progress.
        max_epochs: passes over the data.
        steps_per_epoch: optimizer steps in each.
        warmup_steps: steps of linear warm-up, fewer than the run has.
        min_lr_ratio: learning rate of the last step, as a fraction of the peak.
        options: keyword arguments of the schedule's function.

    Raises:
        ConfigError: if a name or option is not known, or a value is outside its range.

    Examples:
        >>> from torch import nn
        >>> from fundamentallm import create_optimizer, create_scheduler
        >>> optimizer = create_optimizer(nn.Linear(4, 2), "sgd", learning_rate=1.0)
        >>> schedule = create_scheduler(optimizer, "linear", 1, steps_per_epoch=6, warmup_steps=2, min_lr_ratio=0)
        >>> rates = []
        >>> for _ in range(6):
        ...     rates.append(schedule.get_last_lr()[0])
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    decay = resolve("lr_scheduler", scheduler_type, SCHEDULES)
    total_steps = max_epochs * steps_per_epoch
    problems = range_problems(warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio)
    if total_steps < 1:
        problems.append(f"max_epochs x steps_per_epoch is {total_steps}; allowed: at least 1.")
    elif warmup_steps >= total_steps:
        problems.append(
            f"warmup_steps is {warmup_steps} and the run has {total_steps} optimizer steps; "
            "allowed: a warm-up shorter than the run. Set training.warmup_steps lower."
        )
    known = list(inspect.signature(decay).parameters)[1:]
    if wrong := set(options) - set(known):
        problems.append(f"lr_scheduler_options has {sorted(wrong)}; allowed for {scheduler_type}: {known or 'none'}.")
    if problems:
        raise ConfigError(problems)
    peak_step, last_step = max(warmup_steps - 1, 0), total_steps - 1

    def factor(step: int) -> float:
        if step < peak_step:
            return (step + 1) / warmup_steps
        progress = min((step - peak_step) / max(last_step - peak_step, 1), 1.0)
        return float(min_lr_ratio + (1 - min_lr_ratio) * decay(progress, **options))

    factor(last_step)  # an option outside its range is found here rather than inside torch
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # torch keeps the one of an earlier schedule
    return StepSchedule(optimizer, factor)


def describe_curve(scheduler: LRScheduler, step: int, total_steps: int, previous: float | None) -> str:
    """Returns the learning rate from `step` to the end, at seven steps; `previous` is the last one logged."""
    last = total_steps - 1
    if not isinstance(scheduler, StepSchedule) or step > last:
        return "the learning-rate curve changes from here"
    base, factor = scheduler.base_lrs[0], scheduler.lr_lambdas[0]
    steps = sorted({step + (last - step) * part // 6 for part in range(7)})
    was = f" (it was {previous:.3g})" if previous is not None else ""
    return f"learning rate from here{was}: " + ", ".join(f"step {s + 1} {base * factor(s):.3g}" for s in steps)


def make_schedule(config: TrainingConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """The schedule of `config` over a run of `total_steps` optimizer steps, at its beginning."""
    return create_scheduler(
        optimizer,
        config.lr_scheduler,
        1,
        total_steps,
        config.warmup_steps,
        min_lr_ratio=config.min_lr_ratio,
        **config.lr_scheduler_options,
    )
