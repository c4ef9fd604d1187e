"""Files that a run keeps in its folder: its lock, its status, its launches, and logs of JSON lines."""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fundamentallm import errors
from fundamentallm.atomic import copy_name, sync, sync_later, write_text
from fundamentallm.errors import START_AGAIN, RunInProgressError, is_launched, writing

logger = logging.getLogger(__name__)

LOCK, STATUS, LOG = ".fundamentallm.lock", "status.json", "metrics.jsonl"
STARTS, SAMPLES = "starts.jsonl", "samples.jsonl"
LOGS = (LOG, STARTS, SAMPLES)
TEXTS = ("NaN", "Infinity", "-Infinity")  # for the numbers that JSON lacks
PACKAGES = ("fundamentallm", "torch", "accelerate", "safetensors", "tokenizers")
_lock_files: set[int] = set()
"""Locks of this process. A forked one, as a loader worker, closes its copies, which would outlive a killed run."""


def _close_in_child() -> None:
    while _lock_files:
        os.close(_lock_files.pop())


os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
    """Creates folders and locks them against other runs until exit. Raises RunInProgressError if another uses one.

    The lock belongs to the open file (`flock`). A POSIX record lock would end when any code of this process closes the
    lock file, such as a callback that copies the folder. The file stays: otherwise two processes could lock one each.
    """
    with contextlib.ExitStack() as stack:
        for folder in dict.fromkeys(path.resolve() for path in folders):
            folder.mkdir(parents=True, exist_ok=True)
            # A link in a copied folder would make us overwrite another file.
            file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            stack.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(file, 1000).decode(errors="replace")
                advice = "Wait until it ends, stop it, or choose another output_dir."
                raise RunInProgressError(f"{folder} is in use by {holder}. {advice}") from None
            except OSError as error:  # of a file system without locks, such as Lustre mounted without `flock`
                logger.warning("%s cannot be locked (%s); make sure that no other run uses it.", folder, error)
            _lock_files.add(file)
            stack.callback(_lock_files.discard, file)
            os.truncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def write_status(folder: Path, **status: Any) -> None:
    """Writes `status.json`, for schedulers: a launcher's own exit code is only 0 or 1."""
    status |= {"pid": os.getpid(), "host": socket.gethostname()}
    with writing(folder / STATUS):
        write_text(folder / STATUS, json.dumps(status, indent=1) + "\n")


def read_status(folder: Path) -> dict[str, Any]:
    """Returns the content of `status.json`, or {} if the file is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads((folder / STATUS).read_text(encoding="utf-8")))
    return {}


def note_interruption(folder: Path, reason: str) -> None:
    """Notes in `status.json` that a signal ended a launch outside of training, unless another launch has the folder."""
    with contextlib.suppress(errors.FundamentaLLMError, OSError), locked([folder]):
        status = {"step": 0, "total_steps": None} | read_status(folder)
        if status.get("state") != "finished":
            ended = {"state": "interrupted", "exit_code": START_AGAIN, "reason": f"{reason} outside of training"}
            write_status(folder, **status | ended)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that influence the results."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def environment(device: str, processes: int, mixed_precision: str) -> dict[str, Any]:
    """Returns what may explain why two launches differ: versions, machine, devices, command and commit."""
    machine = {"platform": platform.platform(), "host": socket.gethostname(), "cpus": os.cpu_count()}
    devices = {"device": device, "processes": processes, "mixed_precision": mixed_precision}
    return versions() | machine | devices | {"command": command(), "commit": _commit()}


def command() -> str:
    """Returns the command line that started this process, or its launcher if it has one."""
    words = sys.orig_argv
    if is_launched():
        with contextlib.suppress(OSError):  # without /proc, the launcher's own options are not known
            parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            words = parent if {*sys.argv[1:]} <= {*parent} else words
    if len(words) > 1 and os.access(words[1], os.X_OK) and not words[1].endswith(".py"):
        words = words[1:]  # a console script, which its first line runs with Python
    return shlex.join([os.path.basename(words[0]), *words[1:]])


def _commit() -> str | None:
    """Returns the commit of the working directory, with "+" if files differ from it; None if there is none."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    return None


def write_start(folder: Path, **start: Any) -> None:
    """Appends a launch to `starts.jsonl`, not to metrics.jsonl, which is the same with and without restarts."""
    with writing(folder / STARTS):
        write_text(folder / STARTS, "".join(json.dumps(one) + "\n" for one in [*read_log(folder / STARTS), start]))


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Returns the launches that led to the present log, oldest first: none that a return to an earlier step undid."""
    starts: list[dict[str, Any]] = []
    for start in read_log(folder / STARTS):
        starts = [earlier for earlier in starts if earlier["step"] <= start["step"]] + [start]
    return starts


def repeats_all_launches(folder: Path) -> bool:
    """Whether all launches in a folder began at step 0 with the same settings and data: they log the same lines."""
    starts = [(start["step"], start.get("config"), start.get("data")) for start in read_log(folder / STARTS)]
    return len(starts) > 1 and all(start[0] == 0 and start == starts[-1] for start in starts)


def restarts(folder: Path) -> list[int]:
    """Returns the steps from which the run was resumed, in ascending order."""
    return sorted({start["step"] for start in read_starts(folder) if start["step"] > 0})


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the complete lines that are objects with a step. Warns of others but the last, which a kill may tear."""
    lines = [line for _, line in _lines(path)]
    if damaged := [number for number, line in enumerate(lines[:-1], start=1) if line is None]:
        logger.warning("%d lines of %s cannot be read and are left out: %s", len(damaged), path, damaged[:5])
    return [line for line in lines if line is not None]


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a line by name, including those that are stored as texts."""
    named = {name: float(value) if value in TEXTS else value for name, value in line.items()}
    return {name: value for name, value in named.items() if type(value) in (int, float)}


class LineFile:
    """A file of JSON lines. A checkpoint that counts on it holds the number of its lines and their SHA-256.

    The SHA-256 leaves out numbers in `unhashed`: a repeated run measures others.
    """

    def __init__(self, path: Path, unhashed: Collection[str] = ()) -> None:
        self.path, self._unhashed = path, unhashed
        self._count, self._hash = 0, hashlib.sha256()
        self._expected: dict[str, Any] = {}

    def append(self, line: dict[str, Any]) -> None:
        """Append a line. Raises FundamentaLLMError if the file cannot be written."""
        stored = json.loads(json.dumps(line), parse_constant=str)  # JSON lacks NaN and infinities: they become texts
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(stored) + "\n")
        sync_later(self.path)
        self._count_line(stored)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint holds."""
        return {"lines": self._count, "sha256": self._hash.hexdigest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Note what the next `rewind` is to find."""
        self._expected = {"lines": int(state["lines"]), "sha256": str(state["sha256"])}

    def rewind(self, step: int, is_own: bool = True, may_lack: bool = False, keep_copy: bool = False) -> str:
        """Drop the lines that a run writes again when it continues after `step`, and a torn last line.

        The loaded state is ignored unless it `is_own`. With `keep_copy`, the file is copied before a line is dropped.
        Returns what the user should know. Raises CheckpointError if lines that the loaded state counts on are missing,
        unless it `may_lack` them.
        """
        expected, path, message = self._expected if is_own else {}, self.path, ""
        self._count, self._hash, self._expected = 0, hashlib.sha256(), {}
        lines, kept = list(_lines(path)), []
        for text, line in lines:
            if line is not None and line["step"] <= step and self._count < expected.get("lines", math.inf):
                kept.append(text)
                self._count_line(line)
        if expected and self.state_dict() != expected:
            message = f"{path} has {self._count:,} of its {expected['lines']:,} lines up to step {step}, or others. "
            if not may_lack:
                raise errors.CheckpointError(f"{message}Restore it, or continue by --training.resume_changes '[log]'.")
        if len(kept) == len(lines):
            return message
        with writing(path):
            if keep_copy or message:
                # Named by its content: if a kill interrupts the rewind, the next one makes the same copy.
                copy = copy_name(path)
                shutil.copy2(path, copy)
                sync(copy)
                message += f"{len(lines) - len(kept):,} lines of {path} are in {copy} only."
            write_text(path, "".join(kept))
        return message

    def _count_line(self, stored: dict[str, Any]) -> None:
        self._count += 1
        hashed = {key: value for key, value in stored.items() if key not in self._unhashed}
        self._hash.update(json.dumps(hashed, sort_keys=True).encode())


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yields each line as text and as an object, or None if it is torn or not an object with a step."""
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            line = json.loads(text, parse_constant=str)
            is_valid = text.endswith("\n") and isinstance(line["step"], int)
        except (ValueError, TypeError, KeyError, RecursionError):
            is_valid = False
        yield text, line if is_valid else None
