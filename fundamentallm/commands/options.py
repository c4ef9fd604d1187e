"""Options that several commands share, and one report of everything that is wrong with a command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fundamentallm.config.command_line import parse_config
from fundamentallm.config.registry import resolve
from fundamentallm.config.schema import Config
from fundamentallm.config.validation import Interval
from fundamentallm.errors import ConfigError, Problem, collected

BASE_HELP = "base model of an adapter: a folder or cached name [the one that your run trained, or the cached name]"
DEFAULT_TRAINER = "fundamentallm.train:make_trainer"


def settings_parser(program: str, own: str, description: str) -> argparse.ArgumentParser:
    """Returns a parser of the command's own options (`own`, in its usage), to which `train`'s settings may be added."""
    return argparse.ArgumentParser(
        prog=program,
        usage=f"%(prog)s --config FILE [--SECTION.SETTING VALUE ...] {own}",
        description=f"{description} The settings are those of `fundamentallm train --help`.",
        allow_abbrev=False,
    )


def add_trainer_option(parser: argparse.ArgumentParser) -> None:
    """Add `--trainer MODULE:NAME`."""
    parser.add_argument(
        "--trainer", default=DEFAULT_TRAINER, metavar="MODULE:NAME",
        help="function from a Config to a Trainer, for your own model or data; its Trainer must use the config that "
        f"the function is given [{DEFAULT_TRAINER}]",
    )  # fmt: skip


def add_checkpoint(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the checkpoint that a command reads, which may be given by its position or as `--checkpoint DIR`."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("checkpoint", nargs="?", default=argparse.SUPPRESS, type=_path, metavar="DIR", help=text)
    group.add_argument("--checkpoint", default=argparse.SUPPRESS, type=Path, metavar="DIR", help="the same")


def _path(text: str) -> Path | str:
    return text if text == argparse.SUPPRESS else Path(text)  # Python 3.11 converts this default too


def option_problems(options: argparse.Namespace, **ranges: Interval) -> list[Problem]:
    """Returns a problem for each option, by name, that is given and outside its range."""
    return [
        Problem(f"--{name}", value, str(allowed))
        for name, allowed in ranges.items()
        if (value := getattr(options, name)) is not None and value not in allowed
    ]


def parse_settings(
    arguments: Sequence[str],
    program: str,
    problems: Sequence[Problem],
    check_files: bool = True,
    trainer: str = DEFAULT_TRAINER,
) -> Config:
    """Returns the config of a command line without the command's own options.

    Raises ConfigError with every mistake in the settings, in the value of `--trainer`, and `problems`, those in the
    command's other options.
    """
    found = list[Problem]()
    with collected(found):
        config = parse_config(arguments, program, check_files)
    found += problems
    with collected(found):
        resolve("--trainer", trainer, {DEFAULT_TRAINER: None})
    if found:
        raise ConfigError(found)
    return config
