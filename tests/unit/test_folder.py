"""A folder is used by one run at a time, and records the launches and the log of that run."""

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fundamentallm.errors import CheckpointError, RunInProgressError
from fundamentallm.run.folder import (
    LineFile,
    command,
    locked,
    note_interruption,
    numbers,
    read_log,
    read_starts,
    read_status,
    restarts,
    write_start,
    write_status,
)

HOLD = """
import sys
from pathlib import Path
from fundamentallm.run.folder import locked
with locked([Path(sys.argv[1])]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def locked_by_another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_locked_refuses_a_second_user_and_names_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with locked([folder]), pytest.raises(RunInProgressError, match=f"{os.getpid()} on "), locked([folder / "."]):
        pass
    with locked_by_another(tmp_path / "taken") as process:
        refused = pytest.raises(RunInProgressError, match=rf"taken is in use by process {process.pid} on .*output_dir")
        with refused, locked([tmp_path / "free", tmp_path / "taken"]):
            pass
        process.kill()
        process.wait()
        with locked([tmp_path / "free", tmp_path / "taken"]):
            pass


def test_locked_survives_that_its_file_is_opened_and_closed(tmp_path: Path) -> None:
    """As by a callback that copies the folder."""
    with locked([tmp_path]):
        (tmp_path / ".fundamentallm.lock").read_bytes()
        with pytest.raises(subprocess.CalledProcessError):
            subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], check=True, capture_output=True)


def test_locked_ends_with_its_process_and_not_with_its_forks(tmp_path: Path) -> None:
    """A loader worker that outlives a killed run does not hold its lock."""
    (forked, has_forked), (ends, end) = os.pipe(), os.pipe()
    with locked([tmp_path]):
        if (child := os.fork()) == 0:
            os.write(has_forked, b"1")
            os.read(ends, 1)
            os._exit(0)
        os.read(forked, 1)
    try:
        with locked([tmp_path]):
            pass
    finally:
        os.write(end, b"1")
        os.waitpid(child, 0)


def test_locked_refuses_a_link_and_leaves_its_target_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".fundamentallm.lock").symlink_to(tmp_path / "kept")
    with pytest.raises(OSError, match="symbolic links"), locked([tmp_path / "run"]):
        pass
    assert (tmp_path / "kept").read_text() == "kept"


def test_read_starts_leaves_out_launches_that_were_rewound(tmp_path: Path) -> None:
    assert restarts(tmp_path) == []
    for number, step in enumerate((0, 40, 40, 20, 30)):  # at 20, the checkpoint of step 40 was damaged
        write_start(tmp_path, step=step, number=number)
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"step": 35, "num')
    assert [start["number"] for start in read_starts(tmp_path)] == [0, 3, 4]
    assert restarts(tmp_path) == [20, 30]
    write_start(tmp_path, step=30, number=5)
    assert [start["number"] for start in read_starts(tmp_path)] == [0, 3, 4, 5]


def test_note_interruption_keeps_how_far_the_run_is(tmp_path: Path) -> None:
    note_interruption(tmp_path, "SIGTERM received")
    assert (read_status(tmp_path)["state"], read_status(tmp_path)["step"]) == ("interrupted", 0)
    write_status(tmp_path, state="running", step=40, total_steps=90)
    note_interruption(tmp_path, "SIGHUP received")
    status = read_status(tmp_path)
    assert (status["state"], status["step"], status["exit_code"]) == ("interrupted", 40, 75)
    assert "SIGHUP" in status["reason"]
    with locked_by_another(tmp_path):  # whose status it is
        write_status(tmp_path, state="running")
        note_interruption(tmp_path, "SIGTERM received")
    assert read_status(tmp_path)["state"] == "running"


def test_command_is_what_the_user_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    (script := tmp_path / "fundamentallm").touch(mode=0o755)
    for typed, expected in (
        (
            ["-m", "fundamentallm.train", "--output_dir", "my run"],
            "python -m fundamentallm.train --output_dir 'my run'",
        ),
        ([str(script), "train"], "fundamentallm train"),
        (["train.py"], "python train.py"),
    ):
        monkeypatch.setattr(sys, "orig_argv", ["/somewhere/python", *typed])
        assert command() == expected


# ---- files of JSON lines ---------------------------------------------------------------------------------------


def written(path: Path, *steps: int) -> Path:
    for step in steps:
        LineFile(path).append({"step": step})
    return path


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_log(path)]


def test_append_writes_numbers_that_json_lacks_as_texts(tmp_path: Path) -> None:
    line = {"step": 1, "nan": math.nan, "up": math.inf, "down": -math.inf, "half": 0.5, "prompt": "To be", "flag": True}
    LineFile(tmp_path / "new" / "log.jsonl").append(line)
    texts = {"nan": "NaN", "up": "Infinity", "down": "-Infinity"}
    assert json.loads((tmp_path / "new" / "log.jsonl").read_text()) == line | texts
    (again,) = map(numbers, read_log(tmp_path / "new" / "log.jsonl"))
    assert math.isnan(again.pop("nan"))
    assert again == {"step": 1, "up": math.inf, "down": -math.inf, "half": 0.5}


def test_read_warns_of_lines_that_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"st\n[1]\n{"step": "2"}\n\n{"step": 3}\n{"step": 4}')
    assert steps(path) == [1, 3]
    assert "[2, 3, 4, 5]" in caplog.text
    assert read_log(tmp_path / "missing.jsonl") == []


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
