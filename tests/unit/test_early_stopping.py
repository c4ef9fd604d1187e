"""Early stopping: what counts as an improvement, and when patience is over."""

from __future__ import annotations

import json
import math

import pytest

from fundamentallm.errors import ConfigError
from fundamentallm.training.early_stopping import EarlyStopping, improves


def stops_after(stopping: EarlyStopping, values: list[float]) -> list[bool]:
    return [stopping.step(value) for value in values]


@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_it_stops_after_patience_validations_without_improvement(patience: int, mode: str, sign: int) -> None:
    stopping = EarlyStopping(patience, mode=mode)
    assert stops_after(stopping, [sign * v for v in (3.0, 2.0)]) == [False, False]
    assert stops_after(stopping, [sign * 2.5] * patience) == [False] * (patience - 1) + [True]
    assert stopping.best_value == sign * 2.0


def test_an_improvement_starts_the_count_again() -> None:
    stopping = EarlyStopping(2)
    assert stops_after(stopping, [3.0, 4.0, 2.0, 2.0, 4.0]) == [False, False, False, False, True]


@pytest.mark.parametrize(("mode", "sign"), [("min", -1), ("max", 1)])
def test_a_change_counts_only_beyond_min_delta(mode: str, sign: int) -> None:
    assert not improves(8.0 + sign * 0.5, 8.0, mode, min_delta=0.5)
    assert improves(8.0 + sign * 0.75, 8.0, mode, min_delta=0.5)
    assert not improves(8.0 - sign * 0.75, 8.0, mode, min_delta=0.5)


def test_small_gains_add_up_against_the_best_and_not_against_the_last() -> None:
    stopping = EarlyStopping(10, min_delta=0.5)
    flags = []
    for value in (8.0, 7.75, 7.5, 7.25):
        stopping.step(value)
        flags.append(stopping.is_best)
    assert flags == [True, False, False, True]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_is_never_an_improvement(mode: str) -> None:
    stopping = EarlyStopping(3, mode=mode)
    assert stops_after(stopping, [math.nan, 1.0, math.nan, math.nan, math.nan]) == [False, False, False, False, True]
    assert stopping.best_value == 1.0


@pytest.mark.parametrize(("mode", "worst"), [("min", math.inf), ("max", -math.inf)])
def test_the_best_value_is_infinitely_bad_before_the_first(mode: str, worst: float) -> None:
    stopping = EarlyStopping(1, mode=mode)
    assert stopping.best_value == worst
    stopping.step(math.nan)
    assert stopping.best_value == worst


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patience": 0}, "early_stopping_patience is 0; allowed: at least 1"),
        ({"patience": -1}, "early_stopping_patience is -1; allowed: at least 1"),
        ({"patience": 1, "min_delta": -0.1}, "early_stopping_min_delta is -0.1; allowed: at least 0"),
        ({"patience": 1, "min_delta": math.nan}, "early_stopping_min_delta is nan; allowed: at least 0"),
        ({"patience": 1, "mode": "smallest"}, "early_stopping_mode is 'smallest'; allowed: min, max"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EarlyStopping(**values)


@pytest.mark.parametrize(("mode", "cut"), [("min", 3), ("max", 5)])
def test_a_restart_goes_on_as_if_it_had_not_been(mode: str, cut: int) -> None:
    values = [math.nan, 3.0, 2.0, 2.5, 1.0, math.nan, 4.0]
    whole, first, second = (EarlyStopping(3, mode=mode, min_delta=0.25) for _ in range(3))
    expected = stops_after(whole, values)
    before = stops_after(first, values[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second.best_value, second.should_stop) == (first.best_value, first.should_stop)
    assert before + stops_after(second, values[cut:]) == expected
    assert second.state_dict() == whole.state_dict()


def test_reset_forgets_everything() -> None:
    stopping = EarlyStopping(1)
    stops_after(stopping, [1.0, 2.0])
    stopping.reset()
    assert not stopping.should_stop
    assert stopping.state_dict() == EarlyStopping(1).state_dict()


@pytest.mark.parametrize("change", [{"best_value": "far"}, {"best_value": []}, {"counter": -1}, {"counter": None}])
def test_a_state_of_another_kind_is_refused(change: dict[str, object]) -> None:
    stopping = EarlyStopping(2)
    with pytest.raises((ValueError, TypeError)):
        stopping.load_state_dict({**stopping.state_dict(), **change})
