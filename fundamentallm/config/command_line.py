"""A run's config from a YAML file and the command line: strict, with every mistake reported at once."""

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import json
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from fundamentallm.config.files import file_problems
from fundamentallm.config.registry import setting_meant
from fundamentallm.config.schema import Config
from fundamentallm.config.validation import Section, default_of, expand_user, fits, from_dict
from fundamentallm.config.yaml_format import from_yaml, to_yaml
from fundamentallm.errors import ConfigError, Problem, collected, raise_all


def settings(section: type[Any], prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any], str]]:
    """Yields (dotted name, type, dataclass field, help text) of every setting of `section`, subsections last."""
    hints, texts = typing.get_type_hints(section), _docstrings(section)  # type: ignore[arg-type]
    for entry in sorted(dataclasses.fields(section), key=lambda entry: dataclasses.is_dataclass(hints[entry.name])):
        name, hint = prefix + entry.name, hints[entry.name]
        if dataclasses.is_dataclass(hint):
            yield from settings(hint, name + ".")  # type: ignore[arg-type]
        else:
            yield name, hint, entry, texts[entry.name]


@functools.cache  # parsing the source takes most of the time of reading a config
def _docstrings(section: type[Section]) -> dict[str, str]:
    """Returns {field: the docstring below it}, from the source: no object keeps it."""
    body = ast.parse(inspect.getsource(section)).body[0].body  # type: ignore[attr-defined]
    return {
        ast.unparse(entry.target): ast.literal_eval(text.value)
        for entry, text in itertools.pairwise(body)
        if isinstance(entry, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def default_text(entry: dataclasses.Field[Any]) -> str:
    """Returns a setting's default, as YAML has it."""
    default = default_of(entry)
    return default if isinstance(default, str) else json.dumps(default)


def _metavar(hint: Any) -> str:
    """Returns the type of a setting, without null and special words."""
    for word, example in {"BOOL": True, "FLOAT": 0.5, "INT": 1, "TEXT": "", "LIST": [], "MAPPING": {}}.items():
        if fits(example, hint):
            return word
    options = typing.get_args(hint)
    return "|".join(typing.get_args(options[0]) or options)  # words


def train_parser(program: str) -> argparse.ArgumentParser:
    """Returns a parser that takes every setting as text."""
    parser = argparse.ArgumentParser(
        prog=program,
        usage="%(prog)s [--config FILE] [--SECTION.SETTING VALUE ...] [--print_config] [--help]",
        description="Train a GPT-style language model. The command line overrides the YAML file.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, or quickstart")
    parser.add_argument("--print_config", action="store_true", help="print all settings as YAML and exit")
    for section, group in itertools.groupby(settings(Config), lambda setting: setting[0].rpartition(".")[0]):
        described = parser.add_argument_group(section or "run")
        for name, hint, entry, text in group:
            default = "" if "default:" in text else f" (default: {default_text(entry)})"
            described.add_argument(f"--{name}", metavar=_metavar(hint), help=(text + default).replace("%", "%%"))
    return parser


def _unknown_arguments(words: Sequence[str], known: Collection[str]) -> Iterator[Problem]:
    """Yields a problem for each unknown option. If there is none, for each word: one may be the value of an option."""
    options = [f"--{name}" for name in (*known, "config", "print_config", "help")]
    for word in [word for word in words if word.startswith("--")] or words:
        option, _, text = word.partition("=")
        if option.startswith("--"):
            yield Problem(option, text, advice=setting_meant(option, options), text="unknown option")
        else:
            is_file = word.endswith((".yaml", ".yml"))
            advice = f"Did you mean --config {word}?" if is_file else "Give settings as --SECTION.SETTING VALUE."
            yield Problem("", word, advice=advice, text=f"unexpected argument {word!r}")


def _command_line_value(text: str, hint: Any) -> Any:
    """Returns a setting's value: YAML, except that a setting of type text takes all but `null` and `{...}` as it is."""
    is_mapping = text.startswith("{") and fits({}, hint)
    if fits(text, hint) and not is_mapping and not (text == "null" and fits(None, hint)):
        return text
    try:
        return from_yaml(text)
    except ValueError:
        return text


def _read_file(path: str) -> dict[str, Any]:
    """Returns the settings of the file that --config names."""
    file = Path(expand_user(path))
    if path == "quickstart" and not file.exists():  # the one that comes with the package
        file = Path(__file__).with_name("quickstart.yaml")
    try:
        values = from_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = f"which cannot be read: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(Problem("--config", path, reason=reason)) from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError(Problem("--config", path, "a mapping of settings", reason=f"which holds {values!r:.40}"))
    return values or {}


def parse_config(arguments: Sequence[str], program: str = "fundamentallm.train", check_files: bool = True) -> Config:
    """Returns the resolved config of a command line. `--help` and `--print_config` print and raise SystemExit(0).

    Raises ConfigError, which lists everything that is wrong; once all settings are right, with `check_files`, missing
    files too.
    """
    known = {name: hint for name, hint, _, _ in settings(Config)}
    try:
        parsed, unknown = train_parser(program).parse_known_args(arguments)
    except argparse.ArgumentError as error:  # an option without a value
        raise ConfigError(f"{error}.") from error
    given, values = vars(parsed), dict[str, Any]()
    problems = list(_unknown_arguments(unknown, known))
    show = given.pop("print_config", False)
    if "config" in given:
        with collected(problems):
            values = _read_file(given.pop("config"))
    for name, text in given.items():
        section, _, key = name.rpartition(".")
        target = values.setdefault(section, {}) if section else values
        if isinstance(target, dict):  # otherwise from_dict reports the section
            target[key] = _command_line_value(text, known[name])
    with collected(problems):
        config = from_dict(Config, values)
        problems += file_problems(config) if check_files else []
    raise_all(problems)
    if show:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config.resolved()
