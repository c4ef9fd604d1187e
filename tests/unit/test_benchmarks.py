"""What the benchmarks work out from what they measure."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fundamentallm.commands.estimate import count, memory
from tests.benchmarks.gpu import ROWS, config_of, measured
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


def test_figures_follow_from_rate_product_and_time_alone(tmp_path: Path) -> None:
    config = config_of(Runs(tmp_path, "cpu"), "1B", 0)
    (tmp_path / "metrics.jsonl").write_text('{"tokens_per_second": 512}\n' * 4)
    for hook, text in {
        "Facts": '{"first_step_seconds": 3, "peak_bytes": null}',
        "ModelAlone": '{"seconds": 0.25}',
        "MatrixProduct": '{"flops_per_second": 1e9}',
    }.items():
        (tmp_path / f"{hook}.json").write_text(text)
    found = measured(config, tmp_path)
    tokens = 4 * 64
    parameters = 2 * (4 * 32 * 32 + 3 * 32 * 88) + 2048 * 32
    assert found["flops_per_second"] == 512 * (6 * parameters + 12 * 2 * 32 * 64)
    assert found["utilisation"] == found["flops_per_second"] / 1e9
    assert found["outside_the_model"] == 1 - 0.25 / (tokens / 512)
