"""The checks in their order, and how one is made: quietly, whatever it raises, and blamed on its cause."""

from __future__ import annotations

import contextlib
import gc
import io
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from fundamentallm.commands.doctor.case import Case, Finding
from fundamentallm.commands.doctor.checks import check_data, check_gradients, check_loss, check_model
from fundamentallm.commands.doctor.runs import (
    check_evaluation,
    check_micro_batches,
    check_overfitting,
    check_resume,
    check_two_processes,
)


class Check(NamedTuple):
    """A check, and the earlier ones whose failure explains its own."""

    name: str
    make: Callable[[Case], Finding]
    explained_by: tuple[str, ...] = ()


CHECKS = (
    Check("data", check_data),
    Check("model", check_model),
    Check("loss", check_loss, ("model",)),
    Check("gradients", check_gradients),
    Check("micro-batches", check_micro_batches, ("data", "model", "loss")),
    Check("evaluation", check_evaluation, ("data", "model", "loss")),
    Check("two processes", check_two_processes, ("data", "model", "loss", "gradients", "micro-batches")),
    Check("kill and resume", check_resume, ("data", "model")),
    Check("overfits", check_overfitting, ("data", "model", "loss")),
)


def examine(check: Check, case: Case, before: Mapping[str, Finding]) -> Finding:
    """Make a check, its output kept off the screen; `before` are the findings of earlier ones by name."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            finding = check.make(case)
    except Exception as error:  # a check that raises has found something, and the others can still be made
        place = traceback.extract_tb(error.__traceback__)[-1]
        figure = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        finding = Finding("fail", figure, "The short run raised this, before there was anything to compare.")
    finally:
        gc.collect()  # the trainers of this check, before those of the next one
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if finding.status != "fail":
        return finding
    failed = [name for name, earlier in before.items() if earlier.status == "fail"]
    causes = [name for name in failed if name in check.explained_by or before[name].figure == finding.figure]
    if not causes:
        return finding
    number = [other.name for other in CHECKS].index(causes[0]) + 1
    return replace(finding, advice=f"As check {number} ({causes[0]}) explains; look at this again when that passes.")
