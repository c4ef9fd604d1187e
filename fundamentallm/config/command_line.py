"""A run's config from YAML and the command line: strict, every mistake reported at once."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import json
import os
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from fundamentallm.config.files import file_problems
from fundamentallm.config.registry import did_you_mean
from fundamentallm.config.schema import Config
from fundamentallm.config.validation import Section, SectionT, allowed_values, expand_user, fits, from_dict
from fundamentallm.errors import ConfigError

MOST_VALUES = 10_000
"""In one YAML document, with every alias written out. No config comes near, and a text of a few lines can mean more
than memory holds."""


def _yaml() -> YAML:
    """A reader and writer of YAML 1.2, new each time, since a file's %YAML directive would outlive the file.

    `mixed_precision: no` is the text "no" and 1e-4 is a number (PyYAML reads False and a text), and a key given
    twice is an error. `safe` constructs plain data only.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def to_yaml(config: Config | dict[str, Any]) -> str:
    """The config, or a plain dict of settings as checkpoints hold them, as YAML that reads back equal."""
    stream = io.StringIO()
    _yaml().dump(config if isinstance(config, dict) else dataclasses.asdict(config), stream)
    return stream.getvalue()


def _annotated(config: Config) -> str:
    """The config as YAML; beside what follows from other settings, what that is.

    Not that itself: in a file it would stand against the other settings that a later command line gives, and another
    `output_dir` would go on with this one's checkpoints.
    """
    resolved, section, lines = dataclasses.asdict(config.resolved()), "", []
    for line in to_yaml(config).splitlines():
        if not line.startswith(" "):
            section = line.partition(":")[0]
        name, _, value = line.removeprefix("  ").partition(": ")
        settings_of = resolved.get(section)
        follows = settings_of.get(name) if isinstance(settings_of, dict) and value == "null" else None
        lines.append(line if follows is None else f"{line}  # here {follows!r}")
    return "\n".join(lines) + "\n"


def settings(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any], str]]:
    """(dotted name, type, dataclass field, docstring) of every setting below `section`."""
    hints = typing.get_type_hints(section)
    texts = _docstrings(section)  # type: ignore[arg-type]  # mypy asks for the hash of its objects
    for entry in dataclasses.fields(section):  # type: ignore[arg-type]
        name, hint = prefix + entry.name, hints[entry.name]
        if dataclasses.is_dataclass(hint):
            yield from settings(hint, name + ".")  # type: ignore[arg-type]
        else:
            yield name, hint, entry, texts[entry.name]


@functools.cache  # parsing the source takes most of the time of reading a config
def _docstrings(section: type[Section]) -> dict[str, str]:
    """{field: the text below it in the source}, which no object keeps."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(section))).body[0].body  # type: ignore[attr-defined]
    return {
        ast.unparse(entry.target): ast.literal_eval(text.value)
        for entry, text in itertools.pairwise(body)
        if isinstance(entry, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def _help(program: str) -> str:
    parser = argparse.ArgumentParser(
        prog=program,
        usage="%(prog)s [--config FILE] [--SECTION.SETTING VALUE ...] [--print_config] [--help]",
        description="Train a GPT-style language model. Settings come from the defaults, then the YAML file, "
        "then the command line.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    parser.add_argument("--print_config", action="store_true", help="print all settings and exit")
    for section, group in itertools.groupby(settings(Config), lambda setting: setting[0].rpartition(".")[0]):
        described = parser.add_argument_group(section or "run")
        for name, hint, entry, text in group:
            default = "" if "default:" in text else f" [{default_text(entry)}]"
            metavar = allowed_values(hint).removeprefix("one of ").split(" or null")[0]
            described.add_argument(f"--{name}", metavar=f"<{metavar}>", help=(text + default).replace("%", "%%"))
    return parser.format_help()


def default_text(entry: dataclasses.Field[Any]) -> str:
    """A setting's default, as YAML has it; none, where it is an empty list or mapping."""
    if entry.default_factory is not dataclasses.MISSING:
        made = entry.default_factory()
        return f"[{', '.join(made)}]" if made else "none"
    is_word = entry.default is None or isinstance(entry.default, bool)  # a table would take 0 for False
    return json.dumps(entry.default) if is_word else str(entry.default)


def _split(arguments: Sequence[str], known: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """({name: text} of the options, what is wrong with the others).

    Not by argparse, which stops at the first mistake and takes `-1e-4` for an option.
    """
    given: dict[str, str] = {}
    problems = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if word in ("-h", "--help", "--print_config"):
            given[word.lstrip("-")] = ""
            continue
        if not word.startswith("--"):
            problems.append(f"{word}: unknown word; allowed: --SECTION.SETTING VALUE, --config FILE.")
            continue
        has_value = bool(equals) or (bool(words) and not words[0].startswith("--"))
        if not equals and has_value:
            text = words.pop(0)
        if name not in known:
            near = did_you_mean(f"--{name}", [f"--{option}" for option in known])
            problems.append(f"--{name}: unknown option.{near}")
        elif not has_value:
            problems.append(f"--{name}: has no value; give one.")
        else:
            given[name] = text
    return given, problems


def _load(text: str) -> Any:
    """What a YAML text says.

    Raises:
        ValueError: if it is no YAML, or its values could not be shown.
    """
    try:
        value = _yaml().load(text)
    # Besides its own errors, ruamel raises what its constructors run into: KeyError for `!!bool x`,
    # AttributeError for `!!timestamp x`, RecursionError for nesting without end.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error
    rest, count = [value], 0
    while rest:
        item, count = rest.pop(), count + 1
        if count > MOST_VALUES:
            raise ValueError(f"its aliases stand for themselves, or for more than {MOST_VALUES:,} values")
        if isinstance(item, int) and item.bit_length() > 10_000:  # 0xfff... has no limit, and cannot be printed
            raise ValueError(f"it has a number of {item.bit_length():,} bits")
        if isinstance(item, dict):
            rest += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set)):
            rest += item
    return value


def _command_line_value(text: str, hint: Any) -> Any:
    """A setting's text as YAML reads it, or the text itself where the setting is text (`--output_dir 7`)."""
    try:
        value = _load(text)
    except ValueError:
        return text
    return text if fits(text, hint) and not fits(value, hint) else value


def _read_yaml(path: str) -> dict[str, Any]:
    file = expand_user(path)
    if path and not os.path.lexists(file):
        raise ConfigError(f"--config is {path!r}, which does not exist; give a YAML file.")
    try:
        if not os.path.isfile(file):  # a pipe may never answer, and gives the first of several processes all it has
            raise ValueError("it is no file")
        values = _load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config is {path!r}, which cannot be read as YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config is {path!r}, which holds {type(values).__name__}; allowed: a mapping of settings.")
    return values


def parse_config(arguments: Sequence[str], program: str = "fundamentallm.train", check_files: bool = True) -> Config:
    """The resolved config of a command line. `--help` and `--print_config` print and raise SystemExit(0).

    Raises:
        ConfigError: listing everything that is wrong; with `check_files`, missing or too short data files included.
    """
    known = {name: hint for name, hint, _, _ in settings(Config)}
    given, problems = _split(arguments, [*known, "config", "print_config", "help"])
    if given.keys() & {"h", "help"}:
        print(_help(program), end="")
        raise SystemExit(0)
    show = given.pop("print_config", None) is not None
    values: dict[str, Any] = {}
    if "config" in given:
        try:
            values = _read_yaml(given.pop("config"))
        except ConfigError as error:
            problems += error.problems
    for name, text in given.items():
        section, _, key = name.rpartition(".")
        target = values.setdefault(section, {}) if section else values
        if isinstance(target, dict):  # else the section is wrong, which from_dict says
            target[key] = _command_line_value(text, known[name])
    try:
        config = from_dict(Config, values)
    except ConfigError as error:
        problems += error.problems
        config = _as_far_as_valid(Config, values)
    problems += file_problems(config) if check_files else []
    if problems:
        raise ConfigError(problems)
    if show:
        print(_annotated(config), end="")
        raise SystemExit(0)
    return config.resolved()


def _as_far_as_valid(section: type[SectionT], values: Any) -> SectionT:
    """A section without its wrong settings, so that the files it names are checked in the same report."""
    right: dict[str, Any] = {}
    for name, value in values.items() if isinstance(values, dict) else ():
        hint = typing.get_type_hints(section).get(name)
        if dataclasses.is_dataclass(hint):
            right[name] = _as_far_as_valid(hint, value)  # type: ignore[type-var, arg-type]
            continue
        with contextlib.suppress(ConfigError):
            from_dict(section, {**right, name: value})
            right[name] = value
    return section(**right)
