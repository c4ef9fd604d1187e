"""How settings are checked: types, ranges and unknown names, every problem at once, nothing converted."""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeVar

from fundamentallm.config.registry import did_you_mean
from fundamentallm.errors import ConfigError


class Interval(NamedTuple):
    """Allowed values of a number. A bound of None is open-ended; `open_low` excludes `low` itself."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, (int, float)):
            return False
        try:
            if not math.isfinite(value):
                return False
        except OverflowError:  # an integer beyond all floats
            return False
        above = self.low is None or (value > self.low if self.open_low else value >= self.low)
        below = self.high is None or (value < self.high if self.open_high else value <= self.high)
        return above and below

    def __str__(self) -> str:
        low = None if self.low is None else f"{'greater than' if self.open_low else 'at least'} {self.low:g}"
        high = None if self.high is None else f"{'less than' if self.open_high else 'at most'} {self.high:g}"
        return " and ".join(bound for bound in (low, high) if bound)


POSITIVE = Interval(low=0, open_low=True)
NON_NEGATIVE = Interval(low=0)
AT_LEAST_ONE = Interval(low=1)
FRACTION = Interval(low=0, high=1)
BELOW_ONE = Interval(low=0, high=1, open_high=True)

RANGES: dict[str, Interval] = {
    **dict.fromkeys(("vocab_size", "d_model", "num_heads", "num_kv_heads", "num_layers", "d_ff"), AT_LEAST_ONE),
    **dict.fromkeys(("sequence_length", "batch_size", "micro_batch_size", "max_epochs", "max_steps"), AT_LEAST_ONE),
    **dict.fromkeys(("save_every_n_epochs", "save_every_n_steps", "eval_every_n_epochs"), AT_LEAST_ONE),
    **dict.fromkeys(("eval_every_n_steps", "log_every_n_steps", "keep_last_n", "max_bad_steps"), AT_LEAST_ONE),
    **dict.fromkeys(
        ("learning_rate", "adam_learning_rate", "gradient_clip_norm", "rope_theta", "adam_epsilon", "norm_epsilon"),
        POSITIVE,
    ),
    **dict.fromkeys(
        ("max_minutes", "hang_minutes", "skip_spikes_above", "learning_rate_scale", "peak_tflops"), POSITIVE
    ),
    **dict.fromkeys(("weight_decay", "early_stopping_min_delta", "warmup_steps"), NON_NEGATIVE),
    **dict.fromkeys(("num_workers", "sample_tokens", "max_bad_rows"), NON_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "momentum", "muon_momentum", "dropout"), BELOW_ONE),
    "min_lr_ratio": FRACTION,
    "ema_decay": Interval(low=0, high=1, open_low=True, open_high=True),
    "early_stopping_patience": AT_LEAST_ONE,
    "train_split": Interval(low=0, high=1, open_low=True),
    "seed": Interval(low=0, high=2**63 - 1),
}
"""What each number may be; one table for the config and for the functions that take the same values."""


def range_problems(**values: float | str | None) -> list[str]:
    """One sentence for each value outside its range in `RANGES`; None and words ('auto') have none."""
    return [
        f"{name} is {value!r}; allowed: {RANGES[name]}."
        for name, value in values.items()
        if value is not None and not isinstance(value, str) and value not in RANGES[name]
    ]


_UNIONS = (types.UnionType, typing.Union)  # `int | None`, and `Literal["a"] | None` before Python 3.14


def allowed_values(hint: Any) -> str:
    """A type hint in words."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " * (len(options) > 1) + ", ".join(map(str, options))
    if origin in _UNIONS:
        return " or ".join(map(allowed_values, options))
    if origin is list:
        return "a list of " + {str: "text", list: "lists"}.get(typing.get_origin(options[0]) or options[0], "mappings")
    if dataclasses.is_dataclass(hint):
        return f"a mapping; in Python, a {getattr(hint, '__name__', hint)}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint, "a mapping")


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type that `hint` says, without converting anything."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in _UNIONS:
        return any(fits(value, option) for option in typing.get_args(hint))
    if origin is dict:
        of_value = typing.get_args(hint)[1]
        return isinstance(value, dict) and all(
            isinstance(key, str) and (of_value is Any or fits(item, of_value)) for key, item in value.items()
        )
    if origin is list:
        return isinstance(value, list) and all(fits(item, typing.get_args(hint)[0]) for item in value)
    if hint in (int, float) and isinstance(value, bool):
        return False  # a bool is an int to Python, not to a person
    return isinstance(value, (int, float) if hint is float else hint)


def _type_problem(name: str, value: Any, hint: Any) -> str | None:
    return None if fits(value, hint) else f"{name} is {value!r}; allowed: {allowed_values(hint)}."


class Section:
    """Checks of one dataclass of settings, run when it is made: types, then ranges, then relations."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        values = {name: getattr(self, name) for name in hints}
        problems = [problem for name in values if (problem := _type_problem(name, values[name], hints[name]))]
        if not problems:
            wrong = {name for name in values.keys() & RANGES.keys() if range_problems(**{name: values[name]})}
            problems = range_problems(**{name: values[name] for name in values if name in wrong})
            relations = ((names, text) for names, text in self._relations() if not wrong & set(names))
            problems += [text for _, text in relations]
        if problems:
            raise ConfigError(problems)

    def __repr__(self) -> str:
        """What differs from the defaults, as code that makes an equal one."""
        given = []
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            made = entry.default_factory
            if value != (entry.default if made is dataclasses.MISSING else made()):
                given.append(f"{entry.name}={value!r}")
        return f"{type(self).__name__}({', '.join(given)})"

    def _relations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """What no type and no range can say: (the fields concerned, the problem).

        A problem about a field that is outside its range is left out, but has to be found without failing.
        """
        yield from ()


SectionT = TypeVar("SectionT", bound=Section)


def from_dict(section: type[SectionT], values: dict[str, Any]) -> SectionT:
    """A section from a plain dict, as JSON stores it: nested, strict about names, every problem at once.

    Raises:
        ConfigError: naming each unknown key and each wrong value by its dotted path.
    """
    hints = typing.get_type_hints(section)
    arguments: dict[str, Any] = {}
    problems = []
    for name, value in values.items():
        if name not in hints:
            problems.append(f"{name}: unknown setting.{did_you_mean(str(name), hints)}")
        elif dataclasses.is_dataclass(hints[name]) and isinstance(value, dict):
            try:
                arguments[name] = from_dict(hints[name], value)
            except ConfigError as error:
                problems += [f"{name}.{problem}" for problem in error.problems]
        elif problem := _type_problem(name, value, hints[name]):
            problems.append(problem)  # and the default stands in, so that the other fields are checked too
        else:
            arguments[name] = value
    try:
        made = section(**arguments)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return made


def expand_user(path: str) -> str:
    """A path with its `~` or `~user` written out, where that can be done (os.path.expanduser raises over a null)."""
    try:
        return os.path.expanduser(path)
    except ValueError:
        return path
