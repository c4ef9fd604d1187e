"""`--trainer MODULE:NAME`, of the verbs that make short runs of a config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fundamentallm.config.command_line import parse_config
from fundamentallm.config.registry import resolve
from fundamentallm.config.schema import Config
from fundamentallm.errors import ConfigError

DEFAULT_TRAINER = "fundamentallm.train:make_trainer"


def add_trainer_option(parser: argparse.ArgumentParser) -> None:
    """Add the option."""
    parser.add_argument(
        "--trainer", default=DEFAULT_TRAINER, metavar="MODULE:NAME",
        help="function from a Config to a Trainer, for a model or data of your own; it has to hand the config's "
        f"settings on [{DEFAULT_TRAINER}]",
    )  # fmt: skip


def parse_with_trainer(arguments: Sequence[str], trainer: str, program: str, problems: Sequence[str] = ()) -> Config:
    """The config, once all that the command line says has been found right.

    Args:
        arguments: all but the verb's own.
        trainer: what --trainer says.
        program: as it was called.
        problems: found already.

    Raises:
        ConfigError: listing what is wrong.
    """
    problems, config = list(problems), Config()
    try:
        config = parse_config(arguments, program)
    except ConfigError as error:
        problems = error.problems + problems
    try:
        if not callable(made_by := resolve("--trainer", trainer, {})):
            problems.append(
                f"--trainer is {trainer!r}, a {type(made_by).__name__}; allowed: a function from a Config to a Trainer."
            )
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return config
