"""Files that one launch of a run leaves for other processes: its lock, its status and the record of its launches."""

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

from fundamentallm.atomic import write_text
from fundamentallm.errors import RunInProgressError, writing
from fundamentallm.run.json_lines import append, read, rewind

logger = logging.getLogger(__name__)

LOCK, STATUS, STARTS, SAMPLES = ".fundamentallm.lock", "status.json", "starts.jsonl", "samples.jsonl"
LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""Errors of file systems without locks, such as Lustre mounted without `flock`."""
_locked_here: set[Path] = set()


@contextlib.contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
    """Creates folders and locks them against other runs until exit.

    A POSIX record lock ends with its process however that ends, is not inherited by loader workers, and works over NFS.
    The lock file stays: if it was removed, two processes could each lock a file of their own.

    Raises:
        RunInProgressError: if another run uses a folder.
        OSError: if a folder cannot be created or written to.
    """
    with contextlib.ExitStack() as stack:
        for folder in dict.fromkeys(path.absolute() for path in folders):
            folder.mkdir(parents=True, exist_ok=True)
            real = folder.resolve()
            if real in _locked_here:  # a record lock does not exclude its own process
                raise RunInProgressError(f"{folder} is in use by another Trainer of this process; use another folder.")
            _locked_here.add(real)
            stack.callback(_locked_here.discard, real)
            # O_NOFOLLOW, so that a link in a copied folder cannot make us overwrite another file.
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            file = stack.enter_context(os.fdopen(handle, "r+", encoding="utf-8", errors="replace"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in LOCKS_UNSUPPORTED:
                    logger.warning("%s cannot be locked (%s); make sure that no other run uses it.", folder, error)
                    continue
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                holder = file.read().strip() or "another process"
                raise RunInProgressError(
                    f"{folder} is in use by {holder}. Wait until it ends, stop it, or choose another output_dir."
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            stack.callback(file.truncate, 0)
        yield


def write_status(folder: Path, **status: Any) -> None:
    """Writes `status.json`, for schedulers: a launcher's own exit code is only 0 or 1."""
    with writing(folder / STATUS):
        write_text(folder / STATUS, json.dumps(status, indent=1) + "\n")


def read_state(folder: Path) -> str | None:
    """Returns the `state` in `status.json`, or None if the file is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return str(json.loads((folder / STATUS).read_text(encoding="utf-8"))["state"])
    return None


def write_start(folder: Path, **start: Any) -> None:
    """Appends a launch to `starts.jsonl`, not to metrics.jsonl, which is the same with and without restarts."""
    rewind(folder / STARTS)  # drops a line that a kill left incomplete
    append(folder / STARTS, start)


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Returns the launches that led to the present log, oldest first.

    If the run went back to an earlier step, the launches after that step are left out.
    """
    starts: list[dict[str, Any]] = []
    for start in read(folder / STARTS):
        starts = [earlier for earlier in starts if earlier["step"] <= start["step"]] + [start]
    return starts


def restarts(folder: Path) -> list[int]:
    """Returns the steps from which the run was resumed, in ascending order."""
    return sorted({start["step"] for start in read_starts(folder) if start["step"] > 0})
