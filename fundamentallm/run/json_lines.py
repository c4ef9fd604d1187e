"""Files of JSON objects, one a line, that a run goes on writing after a crash: the last line may have been torn."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm.errors import writing

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer

TEXTS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""What stands for the numbers that JSON lacks."""


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line.

    Raises:
        FundamentaLLMError: if it cannot be written.
    """
    text = json.dumps({key: _storable(value) for key, value in line.items()})
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines; what is torn, or no object with a step, is left out; none without a file."""
    return [line for _, line in _lines(path) if line is not None]


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line, also those that JSON lacks."""
    named = {name: TEXTS.get(value) if isinstance(value, str) else value for name, value in line.items()}
    return {
        name: value for name, value in named.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def rewind(path: Path, is_made_again: Callable[[dict[str, Any]], bool], keep_all: bool) -> Path | None:
    """Drop the lines that a resumed run makes again. Where that would lose others, or with `keep_all` any, the file is
    kept aside; returns its name then.

    Raises:
        FundamentaLLMError: if it cannot be written.
    """
    with writing(path):
        if not path.exists():
            return None
        kept, lost = [], False
        lines = list(_lines(path))
        for number, (text, line) in enumerate(lines, start=1):
            if line is not None and not is_made_again(line):
                kept.append(text)
            elif keep_all or (line is None and number < len(lines)):  # a kill may have torn the last one only
                lost = True
        temporary = path.with_name(path.name + ".new")
        temporary.write_text("".join(kept), encoding="utf-8")
        aside = None
        if lost:
            taken = (path.with_name(f"{path.stem}.before-{number}{path.suffix}") for number in itertools.count(1))
            aside = next(name for name in taken if not name.exists())
            shutil.copy2(path, aside)
        os.replace(temporary, path)
    return aside


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each line, and what it says: None where that is no object with a step, or its end is missing."""
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            line = json.loads(text)
            whole = text.endswith("\n") and isinstance(line["step"], int)
        except (ValueError, TypeError, KeyError, RecursionError):
            whole = False
        yield text, line if whole else None


def _storable(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def keep_file(trainer: Trainer, path: Path, is_of_validation: Callable[[dict[str, Any]], bool]) -> None:
    """Bring a file of lines back to the step that the run goes on from; where lines would be lost, it is kept aside.

    Made again, and dropped, are the lines of later steps, and where that step's validation is due, those it makes.
    """
    step, validation_due = trainer.global_step, trainer.validation_due

    def is_made_again(line: dict[str, Any]) -> bool:
        return bool(line["step"] > step or (line["step"] == step and validation_due and is_of_validation(line)))

    aside = rewind(path, is_made_again, keep_all=trainer.global_step == 0 or trainer.was_rewound)
    if aside is not None:
        trainer.say(f"{path} had lines that would be lost; it is kept as {aside}")
