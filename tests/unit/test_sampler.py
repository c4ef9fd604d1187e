"""Samples of a step: a pure function of seed, epoch and index, the same on any number of processes."""

import itertools

import numpy as np
import pytest

from fundamentallm.data.sampler import POSITIONS_AT_ONCE, StepSampler, derive_seed, permute

SHAPES = [(10, 10), (10, 3), (1, 4), (3, 8), (31, 6), (2 * POSITIONS_AT_ONCE + 7, 4000)]
"""(samples, batch size): batches that fit, that leave samples over, that exceed the data, and that cross blocks."""

shapes = pytest.mark.parametrize(("samples", "batch_size"), SHAPES)


@pytest.mark.parametrize("size", [*range(1, 10), 64, 65, 2**16 + 1])
def test_permute_is_a_bijection(size: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed=size)), np.arange(size))


def test_permute_of_a_huge_range_needs_little_memory() -> None:
    size = 2**40 + 1
    results = permute(np.arange(1000), size, seed=1)
    assert len(set(results.tolist())) == 1000
    assert results.min() >= 0
    assert size // 2 < results.max() < size


def test_permute_orders_of_different_seeds_are_uncorrelated() -> None:
    orders = [np.arange(5000), *(permute(np.arange(5000), 5000, seed) for seed in range(5))]
    for one, other in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.06
        assert (one == other).sum() < 10


def test_derive_seed_is_distinct_and_fits_torch() -> None:
    parts = [(seed, epoch) for seed in range(30) for epoch in range(30)] + [(1,), (1, 1, 1), (11, 1, 1)]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


@shapes
@pytest.mark.parametrize(("processes", "micro"), [(1, 2), (2, None), (3, 1), (5, 2)])
def test_rank_batches_make_up_the_batch(samples: int, batch_size: int, processes: int, micro: int | None) -> None:
    samplers = [StepSampler(samples, batch_size, 0, i, processes, micro) for i in range(processes)]
    for step in range(samplers[0].steps_per_epoch + 1):
        batch = samplers[0].batch(step)
        parts = [sampler.rank_batch(step) for sampler in samplers]
        assert [index for part in parts for index in part.indices[: part.rows]] == batch
        rows = [part.rows for part in parts]
        assert max(rows) - min(rows) <= 1
        (count,) = {part.micro_batches for part in parts}
        assert (count - 1) * (micro or batch_size) < max(rows) <= count * (micro or batch_size)
        for part in parts:  # at least one sample for each micro-batch
            assert len(part.indices) == max(part.rows, count)
            assert set(part.indices[part.rows :]) <= {batch[0]}


@shapes
@pytest.mark.parametrize("seed", [None, 3])
def test_batches_cover_each_epoch_once_in_any_order_of_calls(samples: int, batch_size: int, seed: int | None) -> None:
    sampler = StepSampler(samples, batch_size, seed)
    steps = sampler.steps_per_epoch
    batches = [sampler.batch(step) for step in range(2 * steps)]
    for epoch in (batches[:steps], batches[steps:]):
        assert sorted(itertools.chain(*epoch)) == list(range(samples))
        assert {len(batch) for batch in epoch[:-1]} <= {batch_size}
    assert [sampler.batch(step) for step in reversed(range(2 * steps))] == batches[::-1]


def test_order_differs_between_epochs_and_seeds() -> None:
    assert [StepSampler(10, 4, None).batch(step) for step in (0, 2, 3)] == [[0, 1, 2, 3], [8, 9], [0, 1, 2, 3]]
    orders = [StepSampler(100, 100, seed).batch(epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == len(orders)


@pytest.mark.parametrize("drop_last", [False, True])
def test_skip_leaves_out_the_samples_of_its_steps(drop_last: bool) -> None:
    plain = StepSampler(31, 4, 1, drop_last=drop_last)
    one = StepSampler(31, 4, 1, drop_last=drop_last, skip=[[5, 7]])
    two = StepSampler(31, 4, 1, drop_last=drop_last, skip=[[5, 7], [5, 6]])
    for step in range(30):
        assert one.batch(step) == plain.batch(step + 3 * (step >= 4))  # step 5 gets the samples of step 8
        assert two.batch(step) == one.batch(step + 2 * (step >= 4))  # a second pair counts the steps without the first
    assert one.at(4).samples == plain.at(4).samples


def test_skip_keeps_later_batch_sizes_at_their_steps() -> None:
    plain, one = (StepSampler(310, 4, 1, schedule=[[6, 5]], skip=skip) for skip in ([], [[5, 8]]))
    assert [len(one.batch(step)) for step in range(4, 8)] == [4, 4, 5, 5]
    assert one.batch(4)[0] == plain.batch(8)[0]  # samples of both sizes are left out
