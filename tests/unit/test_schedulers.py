"""Schedules: each is its closed form at every step, in optimizer steps, whatever the length of the run."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from fundamentallm.config.schema import TrainingConfig
from fundamentallm.training.schedulers import SCHEDULES, create_scheduler, make_schedule
from tests.conftest import problem_of

PEAK = 3e-4
LENGTHS = [(total, warmup) for total in (1, 2, 3, 7, 23, 50) for warmup in {0, 1, 2, total - 1} if warmup < total]


def optimizer(*peaks: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": peak} for peak in peaks or (PEAK,)])


def rates(scheduler: LRScheduler, steps: int) -> list[float]:
    """The learning rate of each of `steps` optimizer steps, as the optimizer sees it."""
    seen = []
    for _ in range(steps):
        seen.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


def linear(done: int, length: int) -> float:
    return (length - done) / length


def cosine(done: int, length: int) -> float:
    return math.cos(math.pi / 2 * done / length) ** 2


def restarts(cycles: int) -> Callable[[int, int], float]:
    def shape(done: int, length: int) -> float:
        if done == length:
            return 0.0
        # In whole numbers: where a cycle begins is no matter of rounding.
        return math.cos(math.pi / 2 * (done * cycles % length) / length) ** 2

    return shape


def wsd(fraction: float) -> Callable[[int, int], float]:
    return lambda done, length: min(1.0, (length - done) / (fraction * length))


FORMS: list[tuple[str, dict[str, Any], Callable[[int, int], float]]] = [
    ("constant", {}, lambda done, length: 1.0),
    ("linear", {}, linear),
    ("cosine", {}, cosine),
    ("cosine_with_restarts", {}, restarts(2)),
    ("cosine_with_restarts", {"cycles": 22}, restarts(22)),  # 15 / 22 * 22 is slightly below 15
    ("wsd", {}, wsd(0.2)),
    ("wsd", {"decay_fraction": 1.0}, linear),
]
assert {name for name, _, _ in FORMS} == set(SCHEDULES)


@pytest.mark.parametrize("floor", [0.0, 0.07, 1 / 3, 1.0])
@pytest.mark.parametrize(("name", "options", "form"), FORMS)
def test_every_step_has_the_rate_of_the_closed_form(
    name: str, options: Any, form: Callable[[int, int], float], floor: float
) -> None:
    for total, warmup in LENGTHS:
        before_peak = max(warmup, 1) - 1
        length = total - 1 - before_peak
        expected = [PEAK * (step + 1) / warmup for step in range(before_peak)]
        expected += [PEAK * (floor + (1 - floor) * form(i, length)) if length else PEAK for i in range(length + 1)]
        scheduler = create_scheduler(optimizer(), name, 1, total, warmup, min_lr_ratio=floor, **options)
        seen = rates(scheduler, total)
        assert seen == pytest.approx(expected, rel=1e-7, abs=1e-12), f"{total=} {warmup=}"
        assert seen[before_peak] == max(seen) == PEAK  # exactly
        if length and name != "constant":
            assert seen[-1] == floor * PEAK


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_after_the_end_stay_at_the_last(name: str) -> None:
    seen = rates(create_scheduler(optimizer(), name, 1, 10, 3), 15)
    assert set(seen[10:]) == {seen[9]}


def test_the_peak_is_the_present_rate_also_of_an_optimizer_scheduled_before() -> None:
    used = optimizer()
    rates(create_scheduler(used, "cosine", 1, 10), 10)
    for group in used.param_groups:
        group["lr"] = 0.5
    assert rates(create_scheduler(used, "constant", 1, 10), 1) == [0.5]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_state_is_one_integer_and_loading_it_jumps_there(name: str) -> None:
    """The curve comes from the config."""
    scheduler = create_scheduler(optimizer(), name, 2, 15, 4)
    expected = rates(scheduler, 17)
    saved = scheduler.state_dict()
    assert list(map(type, saved.values())) == [int]
    expected += rates(scheduler, 13)
    again = create_scheduler(optimizer(), name, 2, 15, 4)
    again.load_state_dict(saved)
    assert again.get_last_lr() == [expected[17]]
    assert expected[:17] + rates(again, 13) == expected


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"warmup_steps": 10}, "warmup_steps"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio"),
        ({"max_epochs": 0}, "warmup_steps"),
        ({"scheduler_type": "cosin"}, "lr_scheduler"),
        ({"scheduler_type": "wsd", "cycles": 2}, "lr_scheduler_options"),
        ({"scheduler_type": "cosine_with_restarts", "cycles": 1.5}, "lr_scheduler_options.cycles"),
        ({"scheduler_type": "wsd", "decay_fraction": 0}, "lr_scheduler_options.decay_fraction"),
        ({"scheduler_type": "wsd", "decay_fraction": "0.2"}, "lr_scheduler_options.decay_fraction"),
    ],
)
def test_create_scheduler_refuses_a_wrong_setting(arguments: Any, setting: str) -> None:
    settings = {"scheduler_type": "cosine", "max_epochs": 1, "steps_per_epoch": 10} | arguments
    assert problem_of(create_scheduler, optimizer(), **settings).setting == setting


def test_schedule_options_are_those_of_the_curve_only() -> None:
    config = TrainingConfig(lr_scheduler="linear", lr_scheduler_options={"min_lr_ratio": 0.5})
    problem = problem_of(make_schedule, config, optimizer(), 10)
    assert (problem.setting, problem.allowed) == ("lr_scheduler_options", "none")
