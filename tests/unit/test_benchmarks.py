"""What the benchmarks work out from what they measure."""

import dataclasses
from pathlib import Path

import pytest

from fundamentallm.commands.estimate import count, memory
from tests.benchmarks.gpu import ROWS, config_of
from tests.benchmarks.growth import Point, exponent, table
from tests.gpu.runs import Runs


def test_the_exponent_is_that_of_the_power_law() -> None:
    assert exponent([1, 2, 8, 64], [3 * value**1.5 for value in (1, 2, 8, 64)]) == pytest.approx(1.5)


def test_only_what_outgrows_its_flops_is_marked() -> None:
    # Twice the work at 2.4, 1.6 and 3 times the cost of the row before.
    costs = (1.0, 2.4, 3.84, 11.52)
    rows = list(table("width", [Point(2**i, cost, cost, 2**i) for i, cost in enumerate(costs)]))
    assert ["more than its FLOPs" in row for row in rows[2:6]] == [False, False, False, True]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("memory_bytes", [24 * 10**9, 80 * 10**9])
def test_a_gpu_computes_the_largest_micro_batch_that_fits(tmp_path: Path, name: str, memory_bytes: int) -> None:
    config = config_of(Runs(tmp_path, "cuda"), name, memory_bytes)
    rows, batch = config.training.micro_batch_size or 0, config.training.batch_size
    assert rows == 1 or memory(config, count(config)).peak < 0.85 * memory_bytes
    twice = dataclasses.replace(config.training, micro_batch_size=2 * rows)
    needed = memory(dataclasses.replace(config, training=twice), count(config)).peak
    assert rows == batch or needed > 0.85 * memory_bytes
