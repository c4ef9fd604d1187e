"""What a run is depends on no layout, nor on being resumed in another; see `layouts`."""

from pathlib import Path

from tests.integration.layouts import SHORT, Part, compare, difference, run


def test_a_run_is_the_same_in_every_layout(tmp_path: Path) -> None:
    rows = list(compare(SHORT, 10, tmp_path, ["muon"]))  # which steps vectors and embeddings by AdamW
    assert [str(row) for row in rows if not row.is_within_bound] == []
    assert len(rows) == len(SHORT)


def test_dropout_is_the_same_for_whole_and_sharded_weights(tmp_path: Path) -> None:
    whole, sharded = (run(tmp_path / str(of), (Part(2, replicas=of),), "adamw", 6, 0.2) for of in (None, 1))
    assert difference(sharded, whole).is_within_bound
