"""Write a file so that a crash leaves either the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file. On exit it is synced and renamed to `path`.

    If the block raises, the new file is deleted and `path` is unchanged. Only one process may write `path` at a time.

    Examples:
        >>> with replacing(Path("numbers.txt")) as new:
        ...     _ = new.write_text("1 2 3")
        >>> Path("numbers.txt").read_text()
        '1 2 3'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)  # writing to a link would change the file that it points to
    try:
        yield new
        sync(new)
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file by one with this text, in UTF-8."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")
