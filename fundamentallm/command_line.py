"""A run's config from YAML and the command line: strict, every mistake reported at once."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fundamentallm.config import Config, DataConfig
from fundamentallm.errors import ConfigError
from fundamentallm.registry import did_you_mean
from fundamentallm.validation import Section, allowed_values, fits, from_dict

# ruamel reads YAML 1.2: `mixed_precision: no` is the text "no" and 1e-4 is a number (PyYAML reads False
# and a text), and a key given twice is an error. `safe` constructs plain data only.
_yaml = YAML(typ="safe", pure=True)
_yaml.default_flow_style = False
_yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]


def to_yaml(config: Config) -> str:
    """The config as YAML that reads back equal."""
    stream = io.StringIO()
    _yaml.dump(dataclasses.asdict(config), stream)
    return stream.getvalue()


def settings(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any], str]]:
    """(dotted name, type, dataclass field, docstring) of every setting below `section`."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(section))).body[0].body  # type: ignore[attr-defined]
    help_of = {
        ast.unparse(entry.target): ast.literal_eval(text.value)
        for entry, text in itertools.pairwise(body)
        if isinstance(entry, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    hints = typing.get_type_hints(section)
    for entry in dataclasses.fields(section):  # type: ignore[arg-type]
        name, hint = prefix + entry.name, hints[entry.name]
        if dataclasses.is_dataclass(hint):
            yield from settings(hint, name + ".")  # type: ignore[arg-type]
        else:
            yield name, hint, entry, help_of[entry.name]


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        usage="%(prog)s [--config FILE] [--SECTION.SETTING VALUE ...] [--print_config] [--help]",
        description="Train a GPT-style language model. Settings come from the defaults, then the YAML file, "
        "then the command line.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings and exit")
    groups = {"": parser.add_argument_group("run")}
    for name, hint, entry, text in settings(Config):
        section = name.rpartition(".")[0]
        group = groups.setdefault(section, None) or parser.add_argument_group(section)  # type: ignore[arg-type]
        groups[section] = group
        default = "" if "default:" in text else f" [{_yaml_scalar(entry)}]"
        metavar = allowed_values(hint).removeprefix("one of ").split(" or null")[0]
        group.add_argument(f"--{name}", metavar=f"<{metavar}>", help=(text + default).replace("%", "%%"))
    return parser


def _yaml_scalar(entry: dataclasses.Field[Any]) -> str:
    if entry.default is dataclasses.MISSING:
        return "none"
    return {None: "null", True: "true", False: "false"}.get(entry.default, str(entry.default))


def _command_line_value(text: str, hint: Any) -> Any:
    """A setting's text as YAML reads it, or the text itself where the setting is text (`--output_dir 7`)."""
    try:
        value = _yaml.load(text)
    except YAMLError:
        return text
    return text if fits(text, hint) and not fits(value, hint) else value


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = _yaml.load(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config is {path!r}, which does not exist; give a YAML file.") from None
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ConfigError(f"--config is {path!r}, which cannot be read as YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config is {path!r}, which holds {type(values).__name__}; allowed: a mapping of settings.")
    return values


def parse_config(arguments: Sequence[str], program: str = "fundamentallm.train") -> Config:
    """The resolved config of a command line. `--help` and `--print_config` print and raise SystemExit(0).

    Raises:
        ConfigError: listing everything that is wrong, missing or too short data files included.
    """
    given, unknown = _parser(program).parse_known_args(list(arguments))
    overrides = vars(given)
    show = overrides.pop("print_config", False)
    known = {name: hint for name, hint, _, _ in settings(Config)}
    problems = [
        f"{word.split('=')[0]}: unknown option.{did_you_mean(word.split('=')[0], ['--' + name for name in known])}"
        for word in unknown
        if word.startswith("--")
    ]
    try:
        values = _read_yaml(overrides.pop("config")) if "config" in overrides else {}
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from error
    for name, text in overrides.items():
        section, _, key = name.rpartition(".")
        target = values.setdefault(section, {}) if section else values
        if isinstance(target, dict):  # else the section is wrong, which from_dict says
            target[key] = _command_line_value(text, known[name])
    try:
        config = from_dict(Config, values).resolved()
        problems += _file_problems(config.data)
    except ConfigError as error:
        problems += error.problems + _file_problems(_data_as_far_as_valid(values.get("data")))
    if problems:
        raise ConfigError(problems)
    if show:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _file_problems(data: DataConfig) -> list[str]:
    return [f"data.{problem}" for problem in data.file_problems()]


def _data_as_far_as_valid(values: Any) -> DataConfig:
    """The data section without its wrong settings, so that its files are checked in the same report."""
    right = {}
    for name, value in values.items() if isinstance(values, dict) else ():
        with contextlib.suppress(ConfigError):
            from_dict(DataConfig, {name: value})
            right[name] = value
    return from_dict(DataConfig, right)
