"""How settings are checked: types, ranges and unknown names. All problems are reported, and nothing is converted."""

import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from fundamentallm.config.registry import setting_meant
from fundamentallm.errors import Problem, collected, raise_all


class Interval(NamedTuple):
    """Allowed values of a finite number. `open_low` and `open_high` exclude the bound itself."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, (int, float)) or not -math.inf < value < math.inf:  # isfinite fails for 10**400
            return False
        is_excluded = (self.open_low and value == self.low) or (self.open_high and value == self.high)
        return self.low <= value <= self.high and not is_excluded

    def __str__(self) -> str:
        low = f"{'greater than' if self.open_low else 'at least'} {self.low:g}" if self.low > -math.inf else ""
        high = f"{'less than' if self.open_high else 'at most'} {self.high:g}" if self.high < math.inf else ""
        return " and ".join(bound for bound in (low, high) if bound)


POSITIVE, NON_NEGATIVE, AT_LEAST_ONE = Interval(low=0, open_low=True), Interval(low=0), Interval(low=1)
FRACTION, BELOW_ONE = Interval(low=0, high=1), Interval(low=0, high=1, open_high=True)

_RANGES = {
    "vocab_size d_model num_heads num_kv_heads num_layers d_ff sequence_length r": AT_LEAST_ONE,
    "batch_size micro_batch_size max_epochs max_steps max_bad_steps keep_last_n": AT_LEAST_ONE,
    "save_every_n_epochs save_every_n_steps eval_every_n_epochs eval_every_n_steps eval_max_samples": AT_LEAST_ONE,
    "log_every_n_steps early_stopping_patience shuffle_buffer validation_tokens context top_k": AT_LEAST_ONE,
    "learning_rate adam_learning_rate learning_rate_scale adam_epsilon gradient_clip_norm": POSITIVE,
    "rope_theta norm_epsilon skip_spikes_above max_minutes hang_minutes peak_tflops alpha repetition_penalty": POSITIVE,
    "weight_decay early_stopping_min_delta warmup_steps": NON_NEGATIVE,
    "num_workers sample_tokens max_bad_rows max_new_tokens temperature": NON_NEGATIVE,
    "adam_beta1 adam_beta2 momentum muon_momentum dropout": BELOW_ONE,
    "min_lr_ratio": FRACTION,
    "ema_decay": Interval(low=0, high=1, open_low=True, open_high=True),
    "train_split top_p": Interval(low=0, high=1, open_low=True),
    "seed": Interval(low=0, high=2**63 - 1),
}
RANGES = {name: interval for names, interval in _RANGES.items() for name in names.split()}
"""The range of each number: one table for the config and for the functions that take the same values."""


def range_problems(**values: float | str | None) -> list[Problem]:
    """Returns a problem for each value outside its range in `RANGES`; None and words ("auto") have none."""
    return [
        Problem(name, value, str(RANGES[name]))
        for name, value in values.items()
        if value is not None and not isinstance(value, str) and value not in RANGES[name]
    ]


expand_user = os.path.expanduser
_hints: Any = functools.cache(typing.get_type_hints)  # takes most of the time of making a section
_UNIONS = (types.UnionType, typing.Union)  # `int | None`, and `Literal["a"] | None` before Python 3.14
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def allowed_values(hint: Any) -> str:
    """Returns a type hint in words."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " * (len(options) > 1) + ", ".join(map(str, options))
    if origin in _UNIONS:
        return " or ".join(map(allowed_values, options))
    if origin is list:
        return "a list of " + {str: "text", list: "lists"}.get(typing.get_origin(options[0]) or options[0], "mappings")
    if dataclasses.is_dataclass(hint):
        return f"a mapping; in Python, a {getattr(hint, '__name__', hint)}"
    return _WORDS.get(hint, "a mapping")


def fits(value: Any, hint: Any) -> bool:
    """Returns whether `value` has the type of a hint, without converting anything."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in options
    if origin in _UNIONS:
        return any(fits(value, option) for option in options)
    if origin is dict:
        return isinstance(value, dict) and all(fits(key, str) and fits(value[key], options[1]) for key in value)
    if origin is list:
        return isinstance(value, list) and all(fits(item, options[0]) for item in value)
    if hint in (int, float) and isinstance(value, bool):
        return False  # Python's bool is an int
    return hint is Any or isinstance(value, (int, float) if hint is float else hint)


def default_of(entry: dataclasses.Field[Any]) -> Any:
    """Returns the default of a setting."""
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def _unknown(values: dict[str, Any], known: Collection[str]) -> Iterator[Problem]:
    """Yields a problem for each value whose name is not that of a setting."""
    for name, value in values.items():
        if name not in known:
            section, _, key = str(name).partition(".")  # YAML has keys that are numbers
            nest = f"Nest it: '{section}: {{{key}: ...}}'." if key and section in known else ""
            yield Problem(str(name), value, "", nest or setting_meant(str(name), known), text="unknown setting")


class Section:
    """Base of a dataclass of settings. Making one checks types, then ranges, then relations between settings."""

    def __new__(cls, *_: Any, **settings: Any) -> Any:
        """Refuse unknown names, before the dataclass raises a TypeError that knows no other name."""
        raise_all([*_unknown(settings, _hints(cls))])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        problems, hints = list[Problem](), _hints(type(self))
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            value, hint = getattr(self, entry.name), hints[entry.name]
            if not fits(value, hint):
                problems.append(Problem(entry.name, value, allowed_values(hint)))
                object.__setattr__(self, entry.name, default_of(entry))  # so that the others are checked too
            elif entry.name in RANGES:
                problems += range_problems(**{entry.name: value})
        wrong = {problem.setting for problem in problems}
        problems += [problem for problem in self._relations() if problem.setting not in wrong]
        raise_all(problems)

    def _conflict(self, setting: str, other: str, allowed: str) -> Problem:
        """Returns the problem of a setting that does not fit another."""
        return Problem(setting, getattr(self, setting), allowed, reason=f"and {other} is {getattr(self, other)!r}")

    def _relations(self) -> Iterator[Problem]:
        """Yields what no type and no range can say. Numbers may still be outside their range here."""
        yield from ()


SectionT = TypeVar("SectionT", bound=Section)


def from_dict(section: type[SectionT], values: dict[str, Any]) -> SectionT:
    """Returns a section from a plain nested dict, as YAML and JSON store it.

    Raises ConfigError, which names each unknown key and each wrong value by its dotted path.
    """
    hints = _hints(section)
    problems = [*_unknown(values, hints)]
    arguments = {name: values[name] for name in hints if name in values}
    for name, value in arguments.items():
        if isinstance(value, dict) and dataclasses.is_dataclass(hints[name]):
            arguments[name] = hints[name]()  # so that the other settings are checked too
            with collected(problems, name):
                arguments[name] = from_dict(hints[name], value)
    with collected(problems):
        made = section(**arguments)
    raise_all(problems)
    return made


def entry_problems(kind: type[Section], values: dict[str, Any], name: str) -> list[Problem]:
    """Returns what is wrong in the mapping that a setting holds, or a list of them."""
    problems = list[Problem]()
    with collected(problems, name):
        from_dict(kind, values)
    return problems


@dataclass(frozen=True)
class LoraSettings(Section):
    """Low-rank adapters (LoRA, arXiv:2106.09685) of a pretrained model; `model.lora`. The defaults are peft's."""

    r: int = 8
    """Rank of the adapters."""
    alpha: float = 8.0
    """Scale of the adapters: their output is multiplied by alpha / r."""
    dropout: float = 0.0
    """Dropout probability of the adapters' inputs."""
    targets: list[str] | Literal["all-linear"] | None = None
    """Names of the modules that get adapters, such as q_proj; all-linear: all but the head; null: peft's choice."""


@dataclass(frozen=True)
class ParameterGroup(Section):
    """Options of some parameters; an entry of `training.parameter_groups`."""

    pattern: str = ""
    """Glob over parameter names, such as '*.embed_tokens.*'."""
    learning_rate_scale: float = 1.0
    """Factor of the learning rate, at every step."""
    weight_decay: float | None = None
    """Weight decay for the group (including vectors); null: unchanged."""
    frozen: bool = False
    """Do not train these parameters."""

    def _relations(self) -> Iterator[Problem]:
        if not self.pattern:
            yield Problem("pattern", "", "a glob over the parameters' names, such as 'model.layers.0.*'")
        if self.frozen and (self.learning_rate_scale != 1 or self.weight_decay is not None):
            yield Problem("frozen", True, "frozen without learning_rate_scale and weight_decay")
