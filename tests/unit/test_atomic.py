"""A file written atomically has its old content or its new one."""

import contextlib
from pathlib import Path

from fundamentallm.atomic import replacing, write_text


def test_write_text_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    for text in ("old", "«new»"):
        write_text(tmp_path / "new folder" / "a.json", text)
        assert (tmp_path / "new folder" / "a.json").read_text(encoding="utf-8") == text
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["a.json"]


def test_replacing_after_an_error_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with contextlib.suppress(ZeroDivisionError), replacing(tmp_path / "a") as new:
        new.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_replacing_does_not_write_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "a.new").symlink_to(tmp_path / "outside")
    write_text(tmp_path / "a", "text")
    assert (tmp_path / "outside").read_text() == "mine"
    assert not (tmp_path / "a").is_symlink()
