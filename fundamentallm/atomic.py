"""Write a file so that a crash leaves either the old content or the new, never half of it."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_unsynced: set[Path] = set()


def sync_later(path: Path) -> None:
    """Let the next `sync_pending` sync a file that was appended to, or a folder whose list of names has changed."""
    _unsynced.update((path.absolute(), path.absolute().parent))


def sync_pending() -> None:
    """Wait until everything passed to `sync_later` is on the disk."""
    while _unsynced:
        path = _unsynced.pop()
        if path.is_file() or path.is_dir():
            sync(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file. On exit it is synced and renamed to `path`.

    If the block raises, the new file is deleted and `path` is unchanged. Only one process may write `path` at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)  # writing to a link would change the file that it points to
    try:
        yield new
        sync(new)
        os.replace(new, path)
        sync_later(path.parent)
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


def copy_name(path: Path) -> Path:
    """Returns the name for a copy of a file beside it, by its content: a second copy of the same replaces the first."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.with_name(f"{path.stem}.before-{digest[:8]}{path.suffix}")


def write_text(path: Path, text: str) -> None:
    """Replace a file by one with this text, in UTF-8."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")
