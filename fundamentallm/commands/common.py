"""What several commands use: options, one report of all that is wrong with a command line, and printing."""

import argparse
from collections.abc import Iterable, Sequence

from fundamentallm.config.command_line import parse_config
from fundamentallm.config.registry import resolve
from fundamentallm.config.schema import Config
from fundamentallm.config.validation import Interval
from fundamentallm.errors import Problem, collected, printable, raise_all

MODEL_HELP = (
    "a checkpoint, a run's output_dir or a folder of checkpoints (uses the best, otherwise the newest), or a model "
    "folder in Hugging Face format"
)
BASE_HELP = "base model of an adapter: a folder or cached name [the one that your run trained, or the cached name]"
DEFAULT_TRAINER = "fundamentallm.train:make_trainer"


def settings_parser(program: str, own: str, description: str, takes_trainer: bool = False) -> argparse.ArgumentParser:
    """Returns a parser of the command's own options (`own`, in its usage), to which `train`'s settings may be added."""
    usage = f"%(prog)s --config FILE [--SECTION.SETTING VALUE ...] {own}"
    about = f"{description} The settings are those of `fundamentallm train --help`."
    parser = argparse.ArgumentParser(prog=program, usage=usage, description=about, allow_abbrev=False)
    if takes_trainer:
        use = "for your own model or data; its Trainer must use the config that the function is given"
        text = f"function from a Config to a Trainer, {use} [{DEFAULT_TRAINER}]"
        parser.add_argument("--trainer", default=DEFAULT_TRAINER, metavar="MODULE:NAME", help=text)
    return parser


def add_checkpoint(parser: argparse.ArgumentParser, text: str = MODEL_HELP) -> None:
    """Add the checkpoint that a command reads, which may be given by its position or as `--checkpoint DIR`."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("checkpoint", nargs="?", default=argparse.SUPPRESS, metavar="DIR", help=text)
    group.add_argument("--checkpoint", default=argparse.SUPPRESS, metavar="DIR", help="the same")


def option_problems(options: argparse.Namespace, **ranges: Interval) -> list[Problem]:
    """Returns a problem for each option, by name, that is given and outside its range."""
    return [
        Problem(f"--{name}", value, str(allowed))
        for name, allowed in ranges.items()
        if (value := getattr(options, name)) is not None and value not in allowed
    ]


def parse_settings(
    arguments: Sequence[str], program: str, problems: list[Problem], check_files: bool = True, trainer: str = ""
) -> Config:
    """Returns the config of a command line without the command's own options, whose mistakes are `problems`.

    Raises ConfigError with these, every mistake in the settings, and that in the value of `--trainer`.
    """
    with collected(problems):
        config = parse_config(arguments, program, check_files)
    with collected(problems):
        resolve("--trainer", trainer or DEFAULT_TRAINER, {DEFAULT_TRAINER: None})
    raise_all(problems)
    return config


def say(text: str) -> None:
    """Print text, which may have several lines, with its control characters escaped."""
    print(printable(text), flush=True)


def say_table(rows: Iterable[tuple[str, ...]], sides: str) -> None:
    """Print aligned columns, two spaces apart; `sides` has '<' or '>' for each column."""
    rows = [tuple(printable(cell, keep="") for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip())
