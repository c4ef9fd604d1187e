"""Examine a config, its model, its data and this machine: is one config one run here? In about a minute."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fundamentallm.commands.trainer_option import add_trainer_option, parse_with_trainer
from fundamentallm.config.schema import Config

if TYPE_CHECKING:
    from fundamentallm.commands.doctor.case import Case, Finding

NAME_WIDTH = 17
WORDS = {"pass": "passed", "fail": "failed", "skipped": "skipped"}


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line; returns the exit code: 0 if nothing failed, 1 if something did.

    Raises:
        ConfigError: listing what is wrong with the settings, or with --trainer.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        usage="%(prog)s --config FILE [--SECTION.SETTING VALUE ...] [--trainer MODULE:NAME]",
        description=f"{__doc__} Short real runs in temporary folders; nothing is written into output_dir. "
        "Settings are those of `fundamentallm train --help`. Exit code 0: nothing failed, 1: something did, "
        "2: a setting is wrong.",
        allow_abbrev=False,
    )
    add_trainer_option(parser)
    options, rest = parser.parse_known_args(arguments)
    problems = []
    if (launched := os.environ.get("WORLD_SIZE", "1")) != "1":
        problems.append(f"doctor was launched as {launched} processes; start it once, it starts more by itself.")
    config = parse_with_trainer(rest, options.trainer, program, problems)

    with tempfile.TemporaryDirectory(prefix="fundamentallm-doctor-") as folder:
        return _examine_all(config, options.trainer, Path(folder))


def _examine_all(config: Config, trainer: str, folder: Path) -> int:
    """Make every check, printing each line as it is known, then the forecast; returns the exit code."""
    # Imported here, so that --help and wrong settings need not wait for torch.
    from fundamentallm.commands.doctor.case import Case
    from fundamentallm.commands.doctor.checklist import CHECKS, examine

    started = time.perf_counter()
    case = Case(config, trainer, folder)
    case.make()  # what is wrong with the config as a whole is found here, and reported as everywhere
    print(f"short runs in temporary folders; {config.output_dir} stays as it is\n")
    findings: dict[str, Finding] = {}
    for number, check in enumerate(CHECKS, start=1):
        print(f"{number:>2}  {check.name:<{NAME_WIDTH}}", end="", flush=True)
        findings[check.name] = finding = examine(check, case, findings)
        _show(f"{finding.status:<9}", finding.figure)
        if finding.advice:
            print(_wrap(f"-> {finding.advice}"))
    _show_forecast(case)
    counts: Counter[str] = Counter(finding.status for finding in findings.values())
    shown = ", ".join(f"{counts[status]} {word}" for status, word in WORDS.items() if counts[status])
    print(f"\n{shown}, in {time.perf_counter() - started:.0f} s")
    return 1 if counts["fail"] else 0


def _show_forecast(case: Case) -> None:
    from fundamentallm.commands.doctor.forecast import forecast

    print("\nthe whole run, as these few steps foretell it")
    try:
        seen = case.rehearsal
    except Exception as error:  # which the checks have told already
        print(f"    unknown, since no step could be made ({type(error).__name__})")
        return
    for title, text in forecast(case.config, seen):
        print(f"    {title:<{NAME_WIDTH}}", end="")
        _show("", text)


def _show(status: str, text: str) -> None:
    """The rest of a row: a status, and a text that may go over several lines."""
    print(status + _wrap(text, len(status)).lstrip(), flush=True)


def _wrap(text: str, indent_further: int = 9) -> str:
    indent = 4 + NAME_WIDTH + indent_further
    width = max(indent + 40, min(120, shutil.get_terminal_size((120, 24)).columns))
    return textwrap.fill(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)
