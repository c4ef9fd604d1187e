"""Reads and writes files of JSON objects, one per line, that survive a crash: the last line may be torn."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from fundamentallm.atomic import replacing, sync_later, write_text
from fundamentallm.errors import writing

logger = logging.getLogger(__name__)

TEXTS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""Texts that stand for the numbers that JSON lacks, and as which they are read if they are written bare."""


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the valid lines: complete ones that are objects with a step. A missing file has no lines.

    Warns of other lines, except for the last one, which a kill may have torn.
    """
    lines = list(_lines(path))
    if damaged := _unreadable(lines):
        logger.warning("%s of %s cannot be read and is left out.", damaged, path)
    return [line for _, line in lines if line is not None]


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a line by name, including those that are stored as texts."""
    named = {name: TEXTS.get(value) if isinstance(value, str) else value for name, value in line.items()}
    return {
        name: value for name, value in named.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


class LineFile:
    """A file of JSON lines. A checkpoint that counts on it holds the number of its lines and their SHA-256.

    Args:
        path: the file; it may be missing.
        unhashed: names of numbers that are not part of the SHA-256, since a repeated run measures other ones.
    """

    def __init__(self, path: Path, unhashed: Collection[str] = ()) -> None:
        self.path, self._unhashed = path, unhashed
        self._count, self._step, self._hash = 0, 0, hashlib.sha256()
        self._expected: dict[str, Any] = {}

    def append(self, line: dict[str, Any]) -> None:
        """Append a line. Raises FundamentaLLMError if the file cannot be written."""
        stored = {key: _storable(value) for key, value in line.items()}
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(stored) + "\n")
        sync_later(self.path)
        self._count_line(stored)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint holds; {} if there are no lines."""
        if not self._count:
            return {}
        return {"lines": self._count, "step": self._step, "sha256": self._hash.hexdigest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Notes what `gap` is to compare the file with."""
        self._expected = {"lines": int(state["lines"]), "step": int(state["step"]), "sha256": str(state["sha256"])}

    def gap(self) -> str | None:
        """Returns how the file differs from the lines that the loaded state counts on, or None if it has them all."""
        expected, found = self._expected, LineFile(self.path, self._unhashed)
        lines = list(_lines(self.path))
        for _, line in lines:
            if line is not None and line["step"] <= expected.get("step", 0) and found._count < expected.get("lines", 0):
                found._count_line(line)
        if found.state_dict() == expected:
            return None
        if damaged := _unreadable(lines):
            return f"{damaged} of {self.path} cannot be read"
        if found._count < expected["lines"]:
            lost = f"{expected['lines'] - found._count:,} of {expected['lines']:,} lines"
            return f"{lost} up to step {expected['step']} are missing in {self.path}"
        return f"the lines up to step {expected['step']} in {self.path} were changed"

    def rewind(self, is_kept: Callable[[dict[str, Any]], bool] = lambda line: True, keep_copy: bool = False) -> str:
        """Drop the lines that a resumed run writes again, and a last line that a kill has torn.

        Args:
            is_kept: returns False for a valid line that is to be dropped.
            keep_copy: copy the file first if any line is dropped. If a line other than the last one cannot be read,
                the file is copied in any case.

        Returns:
            What was dropped and where the copy is; "" without a copy.

        Raises FundamentaLLMError if the file cannot be written.
        """
        path, message = self.path, ""
        self._count, self._step, self._hash, self._expected = 0, 0, hashlib.sha256(), {}
        with writing(path):
            lines = list(_lines(path))
            kept = [(text, line) for text, line in lines if line is not None and is_kept(line)]
            for _, line in kept:
                self._count_line(line)
            if len(kept) == len(lines):
                return ""
            damaged = _unreadable(lines)
            if damaged or keep_copy:
                # Named by its content: if a kill interrupts the rewind, the next one makes the same copy.
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                copy = path.with_name(f"{path.stem}.before-{digest[:8]}{path.suffix}")
                with replacing(copy) as new:
                    shutil.copy2(path, new)
                what = (
                    f"{damaged} cannot be read" if damaged else f"{len(lines) - len(kept):,} lines are not this run's"
                )
                message = f"{path}: {what}; dropped here and kept in {copy}"
            write_text(path, "".join(text for text, _ in kept))
        return message

    def _count_line(self, stored: dict[str, Any]) -> None:
        self._count, self._step = self._count + 1, stored.get("step", 0)
        hashed = {key: value for key, value in stored.items() if key not in self._unhashed}
        self._hash.update(json.dumps(hashed, sort_keys=True).encode())


def _unreadable(lines: Sequence[tuple[str, object]]) -> str:
    """Returns which lines cannot be read, in words, without the last one, which a kill may have torn."""
    numbers = [str(number) for number, (_, line) in enumerate(lines[:-1], start=1) if line is None]
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"line {', '.join(numbers[:5])}{more}" if numbers else ""


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield each line as text and as an object, or None if it is torn or not an object with a step."""
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            line = json.loads(text, parse_constant=str)
            is_valid = text.endswith("\n") and isinstance(line["step"], int)
        except (ValueError, TypeError, KeyError, RecursionError):
            is_valid = False
        yield text, line if is_valid else None


def _storable(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
