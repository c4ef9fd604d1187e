"""Reads and writes files of JSON objects, one per line, that survive a crash: the last line may be torn."""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fundamentallm.atomic import sync, sync_later, write_text
from fundamentallm.errors import CheckpointError, writing

logger = logging.getLogger(__name__)

TEXTS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # for the numbers that JSON lacks


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the complete lines that are objects with a step. Warns of others but the last, which a kill may tear."""
    lines = [line for _, line in _lines(path)]
    if damaged := [number for number, line in enumerate(lines[:-1], start=1) if line is None]:
        logger.warning("%d lines of %s cannot be read and are left out: %s", len(damaged), path, damaged[:5])
    return [line for line in lines if line is not None]


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a line by name, including those that are stored as texts."""
    named = {name: TEXTS.get(value) if isinstance(value, str) else value for name, value in line.items()}
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
                raise CheckpointError(f"{message}Restore it, or continue by --training.resume_changes '[log]'.")
        if len(kept) == len(lines):
            return message
        with writing(path):
            if keep_copy or message:
                # Named by its content: if a kill interrupts the rewind, the next one makes the same copy.
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                copy = path.with_name(f"{path.stem}.before-{digest[:8]}{path.suffix}")
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
