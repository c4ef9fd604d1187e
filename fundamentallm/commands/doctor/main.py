"""Check by short trial runs, in about a minute, that runs are reproducible with your config, data and machine."""

from __future__ import annotations

import os
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fundamentallm.commands.options import add_trainer_option, parse_settings, settings_parser, trainer_problems
from fundamentallm.errors import Problem, printable

NAME_WIDTH = 17
TEXT_AT = 4 + NAME_WIDTH + 9
WORDS = {"pass": "passed", "fail": "failed", "skipped": "skipped"}


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line and return the exit code: 0 if no check failed, 1 if one did."""
    about = f"{__doc__} Runs are made in temporary folders; nothing is written to output_dir."
    codes = "Exit code 0: no check failed, 1: a check failed, 2: a setting is wrong."
    parser = settings_parser(program, "[--trainer MODULE:NAME]", f"{about} {codes}")
    add_trainer_option(parser)
    options, rest = parser.parse_known_args(arguments)
    problems = trainer_problems(options.trainer)
    if (launched := os.environ.get("WORLD_SIZE", "1")) != "1":
        advice = "Run doctor on one process: it starts the others that it needs."
        problems.append(Problem("WORLD_SIZE", launched, allowed="1", advice=advice))
    config = parse_settings(rest, program, problems)

    # A killed run cannot free its semaphores, which Python would report at exit, long after the checks.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    # Imported here, so that --help and wrong settings need not wait for torch.
    from fundamentallm.commands.doctor.checks import CHECKS, Case, examine

    counts: Counter[str] = Counter()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fundamentallm-doctor-") as folder:
        case = Case(config, options.trainer, Path(folder))
        case.make()  # a config that makes no Trainer is a ConfigError, as with every other command
        print(f"trial runs in temporary folders; {config.output_dir} is not touched\n")
        for number, (name, check) in enumerate(CHECKS.items(), start=1):
            print(f"{number:>2}  {name:<{NAME_WIDTH}}", end="", flush=True)
            finding = examine(check, case)
            print(f"{finding.status:<9}", end="")
            _print_text(finding.figure, TEXT_AT)
            if finding.status == "fail":
                first = "Fix the failures above first: they may be the cause. " if counts["fail"] else ""
                print(" " * TEXT_AT, end="")
                _print_text(f"-> {first}{check.advice}", TEXT_AT)
            counts[finding.status] += 1
        print("\nestimate for the whole run, from a few steps")
        try:
            for title, text in case.measured.forecast:
                print(f"    {title:<{NAME_WIDTH}}", end="")
                _print_text(text, 4 + NAME_WIDTH)
        except Exception as error:  # the checks have shown it in full
            print(f"    unknown, since no step could be run ({type(error).__name__})")
    shown = ", ".join(f"{counts[status]} {word}" for status, word in WORDS.items() if counts[status])
    print(f"\n{shown}, in {time.perf_counter() - started:.0f} s")
    return 1 if counts["fail"] else 0


def _print_text(text: str, indent: int) -> None:
    """Print text at `indent`, to which the current line is filled already, on as many lines as it takes."""
    spaces = " " * indent
    print(textwrap.fill(printable(text), 120, initial_indent=spaces, subsequent_indent=spaces).lstrip(), flush=True)
