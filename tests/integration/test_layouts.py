"""The losses and the samples of a run depend on no layout, nor on being resumed in another; see `layouts`."""

from __future__ import annotations

from pathlib import Path

from tests.integration.layouts import SHORT, compare


def test_a_run_is_the_same_in_every_layout(tmp_path: Path) -> None:
    rows = list(compare(SHORT, 14, tmp_path))
    assert [str(row) for row in rows if not row.is_within_bound] == []
    assert len(rows) == len(SHORT)
