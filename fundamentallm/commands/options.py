"""Options that several commands share, and one report of everything that is wrong with a command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fundamentallm.config.command_line import parse_config
from fundamentallm.config.registry import resolve
from fundamentallm.config.schema import Config
from fundamentallm.errors import ConfigError, Problem

DEFAULT_TRAINER = "fundamentallm.train:make_trainer"


def add_trainer_option(parser: argparse.ArgumentParser) -> None:
    """Add `--trainer MODULE:NAME`."""
    parser.add_argument(
        "--trainer", default=DEFAULT_TRAINER, metavar="MODULE:NAME",
        help="function from a Config to a Trainer, for your own model or data; its Trainer must use the config that "
        f"the function is given [{DEFAULT_TRAINER}]",
    )  # fmt: skip


def trainer_problems(name: str) -> list[str]:
    """Returns what is wrong with the value of `--trainer`."""
    try:
        found = resolve("--trainer", name, {})
    except ConfigError as error:
        return error.problems
    if callable(found):
        return []
    reason = f"which is of type {type(found).__name__}"
    return [Problem("--trainer", name, allowed="a function from a Config to a Trainer", reason=reason)]


def parse_settings(
    arguments: Sequence[str], program: str, problems: Sequence[str] = (), check_files: bool = True
) -> Config:
    """Returns the config of a command line.

    Args:
        arguments: the command line without the command's own options.
        program: name of the command in `--help`.
        problems: mistakes in the command's own options.
        check_files: also report missing data files.

    Raises:
        ConfigError: with every mistake in the settings, then `problems`.
    """
    config, found = Config(), []
    try:
        config = parse_config(arguments, program, check_files)
    except ConfigError as error:
        found = error.problems
    if found or problems:
        raise ConfigError([*found, *problems])
    return config
