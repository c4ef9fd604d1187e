"""Files of JSON lines, and rewinding them to the step that a run resumes from."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from fundamentallm.errors import CheckpointError
from fundamentallm.run.json_lines import LineFile, numbers, read


def written(path: Path, *steps: int) -> Path:
    for step in steps:
        LineFile(path).append({"step": step})
    return path


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read(path)]


def test_append_writes_numbers_that_json_lacks_as_texts(tmp_path: Path) -> None:
    line = {"step": 1, "nan": math.nan, "up": math.inf, "down": -math.inf, "half": 0.5, "prompt": "To be", "flag": True}
    LineFile(tmp_path / "new" / "log.jsonl").append(line)
    texts = {"nan": "NaN", "up": "Infinity", "down": "-Infinity"}
    assert json.loads((tmp_path / "new" / "log.jsonl").read_text()) == line | texts
    (again,) = map(numbers, read(tmp_path / "new" / "log.jsonl"))
    assert math.isnan(again.pop("nan"))
    assert again == {"step": 1, "up": math.inf, "down": -math.inf, "half": 0.5}


def test_read_warns_of_lines_that_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"st\n[1]\n{"step": "2"}\n\n{"step": 3}\n{"step": 4}')
    assert steps(path) == [1, 3]
    assert "[2, 3, 4, 5]" in caplog.text
    assert read(tmp_path / "missing.jsonl") == []


def test_rewind_drops_later_lines_and_a_torn_last_one(tmp_path: Path) -> None:
    assert LineFile(tmp_path / "log.jsonl").rewind(3) == ""  # a missing file
    path = written(tmp_path / "log.jsonl", 1, 2, 2, 3)
    with path.open("a") as file:
        file.write('{"step": 2')
    assert LineFile(path).rewind(2) == ""
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_rewind_keeps_one_copy_if_asked(tmp_path: Path) -> None:
    path = written(tmp_path / "log.jsonl", 1, 2)
    before = path.read_bytes()
    assert LineFile(path).rewind(2, keep_copy=True) == ""  # nothing is dropped
    for _ in range(2):
        path.write_bytes(before)  # as if the file was not replaced after it had been copied
        message = LineFile(path).rewind(1, keep_copy=True)
    (copy,) = tmp_path.glob("log.before-*.jsonl")
    assert str(copy) in message
    assert (steps(copy), steps(path)) == ([1, 2], [1])


# ---- what a checkpoint counts on -------------------------------------------------------------------------------


def checkpointed(path: Path, speed: float = 0.1) -> LineFile:
    """A file of four lines up to step 3 that a checkpoint counts on, and one more, as the next launch finds it."""
    before, again = LineFile(path, {"speed"}), LineFile(path, {"speed"})
    for step in (1, 2, 3):
        before.append({"step": step, "loss": math.nan, "speed": speed * step})
    again.load_state_dict(json.loads(json.dumps(before.state_dict())))
    before.append({"step": 3})  # of a validation that was due when the checkpoint was saved
    return again


def test_rewind_keeps_the_lines_that_a_checkpoint_counts_on(tmp_path: Path) -> None:
    files = [checkpointed(tmp_path / f"{speed}.jsonl", speed) for speed in (0.1, 0.2)]
    assert [file.rewind(3) for file in files] == ["", ""]
    assert steps(files[0].path) == [1, 2, 3]
    assert files[0].state_dict() == files[1].state_dict()  # which does not depend on what was measured


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "".join(text.splitlines(keepends=True)[:1]),
        lambda text: text.replace('"step": 2', '"st\0\0\0": '),
        lambda text: text.replace("NaN", "Infinity", 1),
    ],
)
def test_rewind_refuses_a_file_that_lacks_lines(tmp_path: Path, damage: Callable[[str], str]) -> None:
    file = checkpointed(tmp_path / "log.jsonl")
    damaged = damage(file.path.read_text())
    file.path.write_text(damaged)
    with pytest.raises(CheckpointError, match="3 lines up to step 3"):
        file.rewind(3)
    assert file.path.read_text() == damaged
    file.load_state_dict({"lines": 3, "sha256": "another"})
    assert "3 lines up to step 3" in file.rewind(3, may_lack=True)
    other = checkpointed(tmp_path / "other.jsonl")
    other.path.write_text(damaged)
    assert other.rewind(3, is_own=False) == ""
