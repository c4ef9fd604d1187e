"""What a run is depends on no layout, nor on being resumed in another; see `layouts`."""

from __future__ import annotations

from pathlib import Path

from tests.integration.layouts import SHORT, Part, compare, difference, run


def test_a_run_is_the_same_in_every_layout(tmp_path: Path) -> None:
    rows = list(compare(SHORT, 10, tmp_path))
    assert [str(row) for row in rows if not row.is_within_bound] == []
    assert len(rows) == len(SHORT)


def test_dropout_depends_on_processes_and_micro_batches_and_on_nothing_else(tmp_path: Path) -> None:
    parts = {"DDP": Part(2), "FSDP2": Part(2, replicas=1), "micro-batches": Part(2, 4)}
    runs = {name: run(tmp_path / name, (part,), "adamw", 6, dropout=0.2) for name, part in parts.items()}
    reference = runs.pop("DDP")
    found = {name: difference(other, reference) for name, other in runs.items()}
    assert found.pop("FSDP2").is_within_bound
    for other in found.values():  # the same samples, and other masks
        assert other.other_samples_at is None
        assert 1e-3 < other.numbers["loss"] < 0.1
