"""Which steps are left out: all that are not finite, spikes on request, and everything after too many bad ones."""

import math

import pytest
import torch

from fundamentallm.training.guard import FEWEST, WINDOW, Guard

CPU = torch.device("cpu")


def decisions(guard: Guard, losses: list[float], norms: list[float] | None = None, start: int = 0) -> list[bool]:
    pairs = zip(losses, norms or [1.0] * len(losses), strict=True)
    return [
        bool(guard.skips(step, torch.tensor(loss), torch.tensor(norm)))
        for step, (loss, norm) in enumerate(pairs, start=start)
    ]


def noise(count: int, level: float = 3.0, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (level + 0.1 * torch.randn(count, generator=generator)).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_or_norm_that_is_not_finite_is_left_out_and_counted(bad: float) -> None:
    guard = Guard(CPU, max_bad_steps=9)
    assert decisions(guard, [1.0, bad, 1.0, 1.0], [1.0, 1.0, bad, 1.0]) == [False, True, True, False]
    assert guard.counts.tolist() == [0, 2, 0]


def test_after_too_many_bad_steps_in_a_row_nothing_is_trusted_any_more() -> None:
    guard = Guard(CPU, max_bad_steps=3)
    assert decisions(guard, [math.nan] * 2 + [1.0] + [math.nan] * 2 + [1.0]) == [True, True, False, True, True, False]
    assert decisions(guard, [math.nan] * 3 + [1.0] * 50) == [True] * 53
    assert guard.counts.tolist() == [53, 7, 0]


def test_without_a_threshold_nothing_is_a_spike() -> None:
    assert not any(decisions(Guard(CPU, 3), [*noise(100), 1e9]))


@pytest.mark.parametrize("of_norm", [False, True])
def test_a_spike_of_loss_or_norm_is_left_out_and_counted(of_norm: bool) -> None:
    guard = Guard(CPU, 3, skip_spikes_above=6.0)
    values = [*noise(100), 6.0, *noise(10, seed=1)]
    quiet = noise(len(values), seed=2)
    left_out = decisions(guard, *((quiet, values) if of_norm else (values, quiet)))
    assert [step for step, out in enumerate(left_out) if out] == [100]
    assert guard.counts.tolist() == [0, 0, 1]


def test_a_fall_is_no_spike() -> None:
    assert not any(decisions(Guard(CPU, 3, 6.0), [*noise(100), 0.1]))


def test_what_is_far_is_measured_in_robust_standard_deviations() -> None:
    values = noise(WINDOW)
    median = torch.tensor(values).median()
    deviation = (torch.tensor(values) - median).abs().median() * 1.4826
    for distance, expected in ((7.9, False), (8.1, True)):
        guard = Guard(CPU, 3, skip_spikes_above=8.0)
        assert not any(decisions(guard, values))
        assert decisions(guard, [float(median + distance * deviation)], start=WINDOW) == [expected]


@pytest.mark.parametrize(("known", "expected"), [(FEWEST - 1, False), (FEWEST, True)])
def test_nothing_is_a_spike_before_enough_steps_are_known(known: int, expected: bool) -> None:
    assert decisions(Guard(CPU, 3, 6.0), [*noise(known), 100.0])[-1] is expected


def test_steps_that_are_not_finite_are_not_known_and_move_no_median() -> None:
    guard = Guard(CPU, 99, skip_spikes_above=6.0)
    decisions(guard, [math.nan] * 40 + noise(FEWEST - 1))
    assert decisions(guard, [100.0], start=71) == [False]
    guard = Guard(CPU, 999, skip_spikes_above=6.0)
    decisions(guard, noise(WINDOW) + [math.inf] * WINDOW)
    assert decisions(guard, [100.0], start=2 * WINDOW) == [True]
    assert guard.counts.tolist() == [0, WINDOW, 1]


def test_a_lasting_change_of_level_is_followed() -> None:
    guard = Guard(CPU, 3, skip_spikes_above=6.0)
    left_out = decisions(guard, noise(WINDOW) + noise(WINDOW, level=9.0, seed=1))[WINDOW:]
    assert all(left_out[:30])
    assert not any(left_out[WINDOW // 2 + 1 :])
    assert decisions(guard, [30.0], start=2 * WINDOW) == [True]


@pytest.mark.parametrize("threshold", [None, 3.0])
def test_a_restored_guard_decides_as_the_one_that_went_on(threshold: float | None) -> None:
    losses = [*noise(50), math.nan, *noise(5), math.inf, math.nan, *noise(9, seed=1), 1e30, *[math.nan] * 5]
    norms = noise(len(losses), seed=2)
    whole = Guard(CPU, 4, threshold)
    expected = decisions(whole, losses, norms)
    for cut in range(48, len(losses), 4):
        first, second = Guard(CPU, 4, threshold), Guard(CPU, 4, threshold)
        got = decisions(first, losses[:cut], norms[:cut])
        second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
        assert got + decisions(second, losses[cut:], norms[cut:], start=cut) == expected
        assert repr(second.state_dict()) == repr(whole.state_dict())
