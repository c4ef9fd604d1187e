"""What a run tells other processes through its folders: that it is going on, and how it ended."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fundamentallm.errors import RunInProgressError, writing
from fundamentallm.run.json_lines import append, read, rewind

logger = logging.getLogger(__name__)

LOCK, STATUS, STARTS, SAMPLES = ".fundamentallm.lock", "status.json", "starts.jsonl", "samples.jsonl"
_held_here: set[Path] = set()
CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""What file systems without locks answer, as Lustre does unless mounted for them."""


@contextlib.contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
    """Meanwhile, no other process runs in these folders, which are created.

    By a POSIX record lock, which ends with its process however that ends, is not inherited by the workers of a
    loader, and holds over NFS. The file stays, empty: removing it would let two processes each lock its own.

    Raises:
        RunInProgressError: if another process does, with its id.
        OSError: if a folder cannot be created or written to.
    """
    with contextlib.ExitStack() as held:
        for folder in dict.fromkeys(path.absolute() for path in folders):
            folder.mkdir(parents=True, exist_ok=True)
            real = folder.resolve()
            if real in _held_here:  # a record lock does not hold within a process
                raise RunInProgressError(f"{folder} is in use by another Trainer of this process; choose another.")
            _held_here.add(real)
            held.callback(_held_here.discard, real)
            # Not through a link, which would have us write into somebody else's file.
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            file = held.enter_context(os.fdopen(handle, "r+", encoding="utf-8", errors="replace"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in CANNOT_LOCK:
                    logger.warning("%s cannot be locked (%s); see to it that no other run uses it.", folder, error)
                    continue
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                holder = file.read().strip() or "another process"
                raise RunInProgressError(
                    f"{folder} is in use by {holder}; wait for it to end, stop it, or choose another output_dir."
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            held.callback(file.truncate, 0)
        yield


def write_status(folder: Path, **status: Any) -> None:
    """Say in `status.json` how a run is getting on: for schedulers, since a launcher's exit code is always 0 or 1."""
    temporary = folder / f"{STATUS}.new"
    with writing(folder / STATUS):
        temporary.write_text(json.dumps(status, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, folder / STATUS)


def read_state(folder: Path) -> str | None:
    """How the run last said it was getting on."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return str(json.loads((folder / STATUS).read_text(encoding="utf-8"))["state"])
    return None


def write_start(folder: Path, **start: Any) -> None:
    """Add a line to `starts.jsonl`, beside metrics.jsonl, which is the same with restarts and without."""
    rewind(folder / STARTS)  # drops a line that a kill has torn
    append(folder / STARTS, start)


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts that have led to the log as it is, the first one first.

    Steps after that of a later start were made again, and what had started there is no part of the run any more.
    """
    starts: list[dict[str, Any]] = []
    for start in read(folder / STARTS):
        starts = [earlier for earlier in starts if earlier["step"] <= start["step"]] + [start]
    return starts


def restarts(folder: Path) -> list[int]:
    """Steps after which the run was started again."""
    return sorted({start["step"] for start in read_starts(folder) if start["step"] > 0})
