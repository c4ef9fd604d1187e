"""Early stopping: what counts as an improvement, and when patience is over."""

import json
import math

import pytest

from fundamentallm.errors import ConfigError
from fundamentallm.training.early_stopping import EarlyStopping


def stops_after(stopping: EarlyStopping, values: list[float]) -> list[bool]:
    return [stopping.step(value) for value in values]


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_it_stops_after_patience_validations_without_improvement(mode: str, sign: int) -> None:
    stopping = EarlyStopping(3, mode=mode)
    assert stops_after(stopping, [math.nan, sign * 3.0, sign * 2.0]) == [False, False, False]
    assert stops_after(stopping, [sign * 2.5, math.nan, sign * 2.5]) == [False, False, True]
    assert stopping.best_value == sign * 2.0


@pytest.mark.parametrize(("mode", "sign"), [("min", -1), ("max", 1)])
def test_a_change_counts_only_beyond_min_delta(mode: str, sign: int) -> None:
    stopping = EarlyStopping(10, mode=mode, min_delta=0.5)
    flags = []
    for change in (0.0, 0.25, 0.5, 0.75, 0.0):  # small gains add up against the best, not against the last
        stopping.step(8.0 + sign * change)
        flags.append(stopping.is_best)
    assert flags == [True, False, False, True, False]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patience": 0}, "early_stopping_patience is 0; allowed: at least 1"),
        ({"patience": 1, "min_delta": math.nan}, "early_stopping_min_delta is nan; allowed: at least 0"),
        ({"patience": 1, "mode": "smallest"}, "mode is 'smallest'; allowed: min, max"),
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


def test_a_state_saved_before_the_first_value_is_restored() -> None:
    """Earlier versions saved no best value then."""
    stopping = EarlyStopping(2)
    stopping.load_state_dict({**stopping.state_dict(), "best_value": None})
    assert stopping.best_value == math.inf
