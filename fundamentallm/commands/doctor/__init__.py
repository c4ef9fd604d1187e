"""Check by short trial runs, in about a minute, that runs are reproducible with your config, data and machine."""

import os
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from fundamentallm.commands.options import add_trainer_option, parse_settings, settings_parser
from fundamentallm.commands.output import say
from fundamentallm.errors import Problem

INDENT = " " * 30
"""Where the text of a finding starts."""


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line and return the exit code: 0 if no check failed, 1 if one did."""
    codes = "Exit code 0: no check failed, 1: a check failed, 2: a setting is wrong."
    about = f"{__doc__} Runs are made in temporary folders; nothing is written to output_dir. {codes}"
    parser = settings_parser(program, "[--trainer MODULE:NAME]", about)
    add_trainer_option(parser)
    options, rest = parser.parse_known_args(arguments)
    problems = []
    if (launched := os.environ.get("WORLD_SIZE", "1")) != "1":
        problems.append(Problem("WORLD_SIZE", launched, allowed="1", advice="Run doctor on one process."))
    config = parse_settings(rest, program, problems, trainer=options.trainer)

    # Imported here, so that --help and wrong settings need not wait for torch.
    from fundamentallm.commands.doctor.checks import CHECKS, Case, examine, forecast

    failed, started = 0, time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fundamentallm-doctor-") as folder:
        case = Case(config, options.trainer, Path(folder))
        case.make()  # a config that makes no Trainer is a ConfigError, as with every other command
        say(f"trial runs in temporary folders; {config.output_dir} is not touched\n")
        for number, (name, (_, advice)) in enumerate(CHECKS.items(), start=1):
            print(f"{number:>2}  {name:<17}", end="", flush=True)
            status, figure = examine(name, case)
            say(f"{status:<9}{figure}")
            if status == "fail":
                first = "Fix the failures above first: they may be the cause. " if failed else ""
                say(textwrap.fill(f"-> {first}{advice}", 120, initial_indent=INDENT, subsequent_indent=INDENT))
                failed += 1
        say("\nestimate for the whole run, from a few steps")
        try:
            for title, text in forecast(case).items():
                say(f"    {title:<17}{text}")
        except Exception as error:  # the checks have shown it in full
            say(f"    unknown, since no step could be run ({type(error).__name__})")
    say(f"\n{failed} of {len(CHECKS)} checks failed, in {time.perf_counter() - started:.0f} s")
    return 1 if failed else 0
