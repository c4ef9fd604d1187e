"""A folder is used by one run at a time, and records the status and the launches of that run."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fundamentallm.errors import RunInProgressError
from fundamentallm.run.folder import (
    command,
    locked,
    note_interruption,
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
