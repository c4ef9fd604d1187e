"""Files of JSON lines, and rewinding them to the step that a run resumes from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fundamentallm.run.json_lines import LineFile, numbers, read


def written(path: Path, *steps: int) -> Path:
    for step in steps:
        LineFile(path).append({"step": step})
    return path


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read(path)]


def up_to(step: int) -> Callable[[dict[str, Any]], bool]:
    return lambda line: line["step"] <= step


def test_append_writes_numbers_that_json_lacks_as_texts(tmp_path: Path) -> None:
    line = {"step": 1, "nan": math.nan, "up": math.inf, "down": -math.inf, "half": 0.5}
    LineFile(tmp_path / "new" / "log.jsonl").append(line)
    texts = {"step": 1, "nan": "NaN", "up": "Infinity", "down": "-Infinity", "half": 0.5}
    assert json.loads((tmp_path / "new" / "log.jsonl").read_text()) == texts
    (again,) = map(numbers, read(tmp_path / "new" / "log.jsonl"))
    assert math.isnan(again.pop("nan"))
    assert again == {"step": 1, "up": math.inf, "down": -math.inf, "half": 0.5}


def test_numbers_leaves_out_other_values() -> None:
    assert numbers({"step": 1, "prompt": "To be", "flag": True, "none": None}) == {"step": 1}


def test_read_warns_of_lines_that_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"st\n[1]\n{"step": "2"}\n\n{"step": 3}\n{"step": 4}')
    assert steps(path) == [1, 3]
    assert "line 2, 3, 4, 5 " in caplog.text
    assert read(tmp_path / "missing.jsonl") == []


def torn(path: Path) -> Path:
    with path.open("a") as file:
        file.write('{"step": 4')
    return path


def test_rewind_drops_lines_not_kept_and_a_torn_last_one(tmp_path: Path) -> None:
    path = torn(written(tmp_path / "log.jsonl", 1, 2, 2, 3))
    assert LineFile(path).rewind(up_to(2)) == ""
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_rewind_keeps_a_copy_if_asked(tmp_path: Path) -> None:
    path = written(tmp_path / "log.jsonl", 1, 2)
    assert LineFile(path).rewind(up_to(2), keep_copy=True) == ""  # nothing is dropped
    messages = [LineFile(path).rewind(up_to(step), keep_copy=True) for step in (1, 0)]
    copies = {tuple(steps(copy)): str(copy) in "".join(messages) for copy in tmp_path.glob("log.before-*.jsonl")}
    assert steps(path) == []
    assert copies == {(1, 2): True, (1,): True}


def test_rewind_reports_and_keeps_lines_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\nnotes of mine\n{"step": 2}\n')
    message = LineFile(path).rewind(up_to(2))
    assert "line 2 cannot be read" in message
    (copy,) = tmp_path.glob("log.before-*.jsonl")
    assert str(copy) in message
    assert steps(path) == [1, 2]
    assert "notes of mine" in copy.read_text()


def test_rewind_that_was_interrupted_leaves_no_second_copy(tmp_path: Path) -> None:
    path = written(tmp_path / "log.jsonl", 1, 2)
    before = path.read_bytes()
    for _ in range(2):
        path.write_bytes(before)  # as if the file was not replaced after it had been copied
        LineFile(path).rewind(up_to(1), keep_copy=True)
    assert len(list(tmp_path.iterdir())) == 2


def test_rewind_of_a_missing_file_does_nothing(tmp_path: Path) -> None:
    assert LineFile(tmp_path / "log.jsonl").rewind() == ""
    assert list(tmp_path.iterdir()) == []


# ---- what a checkpoint counts on -------------------------------------------------------------------------------


def checkpointed(path: Path) -> LineFile:
    """A file of lines 1 to 3 that a checkpoint counts on, and a line after it, as the next launch finds it."""
    before, again = LineFile(path, {"speed"}), LineFile(path, {"speed"})
    for step in (1, 2, 3):
        before.append({"step": step, "loss": math.nan, "speed": 0.1 * step})
    again.load_state_dict(json.loads(json.dumps(before.state_dict())))
    before.append({"step": 4})
    return again


def test_gap_of_an_unchanged_file_is_none(tmp_path: Path) -> None:
    file = checkpointed(tmp_path / "log.jsonl")
    assert file.gap() is None
    torn(file.path)
    assert file.gap() is None
    file.rewind(up_to(3))
    resumed = file.state_dict()
    assert (resumed["lines"], resumed["step"]) == (3, 3)
    assert resumed == checkpointed(tmp_path / "other.jsonl")._expected


def cut(text: str) -> str:
    return "".join(text.splitlines(keepends=True)[:1])


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (cut, "2 of 3 lines up to step 3"),
        (lambda text: "", "3 of 3 lines up to step 3"),
        (lambda text: text.replace('"step": 2', '"st\0\0\0": '), "line 2 "),
        (lambda text: text.replace("NaN", "Infinity", 1), "changed"),
        (lambda text: text.replace("\n", "\0"), "3 of 3 lines"),
    ],
)
def test_gap_names_what_is_missing(tmp_path: Path, damage: Callable[[str], str], fact: str) -> None:
    file = checkpointed(tmp_path / "log.jsonl")
    file.path.write_text(damage(file.path.read_text()))
    assert fact in (file.gap() or "")


def test_state_does_not_depend_on_what_was_measured(tmp_path: Path) -> None:
    files = [LineFile(tmp_path / f"{speed}.jsonl", {"speed"}) for speed in (1, 2)]
    for speed, file in enumerate(files):
        file.append({"step": 1, "speed": speed})
    assert files[0].state_dict() == files[1].state_dict()
