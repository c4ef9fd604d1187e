"""Mappings that single settings hold, as frozen dataclasses: each is a value of one setting, or an entry of a list."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from fundamentallm.config.validation import Section, from_dict
from fundamentallm.errors import Problem, collected


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


def entry_problems(kind: type[Section], values: dict[str, Any], name: str) -> list[Problem]:
    """Returns what is wrong in the setting or entry `name`."""
    problems = list[Problem]()
    with collected(problems, name):
        from_dict(kind, values)
    return problems
