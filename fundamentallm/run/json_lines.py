"""Reads and writes files of JSON objects, one per line, that survive a crash: the last line may be torn."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fundamentallm.atomic import write_text
from fundamentallm.errors import writing

TEXTS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""Texts that stand for the numbers that JSON lacks."""


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line.

    Raises:
        FundamentaLLMError: if the file cannot be written.
    """
    text = json.dumps({key: _storable(value) for key, value in line.items()})
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the valid lines: complete ones that are objects with a step. A missing file has no lines."""
    return [line for _, line in _lines(path) if line is not None]


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a line by name, including those that are stored as texts."""
    named = {name: TEXTS.get(value) if isinstance(value, str) else value for name, value in line.items()}
    return {
        name: value for name, value in named.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def rewind(
    path: Path, is_kept: Callable[[dict[str, Any]], bool] = lambda line: True, keep_copy: bool = False
) -> Path | None:
    """Drop the lines that a resumed run writes again, and a last line that a kill has torn.

    Args:
        path: the file; it may be missing.
        is_kept: returns False for a valid line that is to be dropped.
        keep_copy: copy the file first if any line is dropped. Invalid lines other than the last one were written
            by another program, so the file is copied before they are dropped in any case.

    Returns:
        The path of the copy, or None if none was needed.

    Raises:
        FundamentaLLMError: if the file cannot be written.
    """
    with writing(path):
        lines = list(_lines(path))
        if not lines:
            return None
        kept = [text for text, line in lines if line is not None and is_kept(line)]
        is_damaged = any(line is None for _, line in lines[:-1])
        copy = _free_name(path) if is_damaged or (keep_copy and len(kept) < len(lines)) else None
        if copy is not None:
            shutil.copy2(path, copy)
        write_text(path, "".join(kept))
    return copy


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.stem}.before-{number}{path.suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield each line as text and as an object, or None if it is torn or not an object with a step."""
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            line = json.loads(text)
            is_valid = text.endswith("\n") and isinstance(line["step"], int)
        except (ValueError, TypeError, KeyError, RecursionError):
            is_valid = False
        yield text, line if is_valid else None


def _storable(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
