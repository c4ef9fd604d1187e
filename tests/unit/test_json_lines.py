"""Files of JSON lines, and rewinding them to the step that a run resumes from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fundamentallm.run.json_lines import append, numbers, read, rewind


def written(path: Path, *steps: int) -> Path:
    for step in steps:
        append(path, {"step": step})
    return path


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read(path)]


def up_to(step: int) -> Callable[[dict[str, Any]], bool]:
    return lambda line: line["step"] <= step


def test_append_writes_numbers_that_json_lacks_as_texts(tmp_path: Path) -> None:
    line = {"step": 1, "nan": math.nan, "up": math.inf, "down": -math.inf, "half": 0.5}
    append(tmp_path / "new" / "log.jsonl", line)
    texts = {"step": 1, "nan": "NaN", "up": "Infinity", "down": "-Infinity", "half": 0.5}
    assert json.loads((tmp_path / "new" / "log.jsonl").read_text()) == texts
    (again,) = map(numbers, read(tmp_path / "new" / "log.jsonl"))
    assert math.isnan(again.pop("nan"))
    assert again == {"step": 1, "up": math.inf, "down": -math.inf, "half": 0.5}


def test_numbers_leaves_out_other_values() -> None:
    assert numbers({"step": 1, "prompt": "To be", "flag": True, "none": None}) == {"step": 1}


def test_read_skips_torn_lines_and_other_values(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"st\n[1]\n{"step": "2"}\n\n{"step": 3}\n{"step": 4}')
    assert steps(path) == [1, 3]
    assert read(tmp_path / "missing.jsonl") == []


def test_rewind_drops_lines_not_kept_and_a_torn_last_one(tmp_path: Path) -> None:
    path = written(tmp_path / "log.jsonl", 1, 2, 2, 3)
    with path.open("a") as file:
        file.write('{"step": 4')
    assert rewind(path, up_to(2)) is None
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_rewind_keeps_a_numbered_copy_if_asked(tmp_path: Path) -> None:
    path = written(tmp_path / "log.jsonl", 1, 2)
    copies = [tmp_path / f"log.before-{number}.jsonl" for number in (1, 2)]
    assert rewind(path, up_to(2), keep_copy=True) is None  # nothing is dropped
    assert rewind(path, up_to(1), keep_copy=True) == copies[0]
    assert rewind(path, up_to(0), keep_copy=True) == copies[1]
    assert (steps(path), steps(copies[0]), steps(copies[1])) == ([], [1, 2], [1])


def test_rewind_keeps_a_copy_of_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\nnotes of mine\n{"step": 2}\n')
    assert rewind(path, up_to(2)) == tmp_path / "log.before-1.jsonl"
    assert steps(path) == [1, 2]
    assert "notes of mine" in (tmp_path / "log.before-1.jsonl").read_text()


def test_rewind_of_a_missing_file_does_nothing(tmp_path: Path) -> None:
    assert rewind(tmp_path / "log.jsonl") is None
    assert list(tmp_path.iterdir()) == []
