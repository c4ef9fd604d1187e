"""Parameters that are frozen, or trained at a rate or decay of their own, chosen by name."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fundamentallm.config import ParameterGroup
from fundamentallm.errors import ConfigError
from fundamentallm.registry import did_you_mean
from fundamentallm.validation import from_dict

SHOWN = 3
"""Names of parameters that an error shows."""


def freeze(model: nn.Module, entries: Sequence[dict[str, Any]]) -> None:
    """Take what `entries` freeze from the training, before anything is made of the model's parameters.

    Args:
        model: not wrapped yet, since DistributedDataParallel waits for each gradient that was to be trained.
        entries: of `training.parameter_groups`.

    Raises:
        ConfigError: naming each entry that is about no parameter.
    """
    for parameter, group in _assigned(model, entries).items():
        if group.frozen:
            parameter.requires_grad_(False)


def split_groups(optimizer: Optimizer, model: nn.Module, entries: Sequence[dict[str, Any]]) -> None:
    """Give parameters the learning rate and the decay of their entry; a schedule scales each group's rate from there.

    Args:
        optimizer: over the model's parameters, before its first step; of any class, since its groups are divided.
        model: whose names are meant.
        entries: of `training.parameter_groups`.

    Raises:
        ConfigError: naming each entry that is about no parameter.
    """
    assigned = _assigned(model, entries)
    parts: list[tuple[bool, dict[str, Any]]] = []
    for whole in optimizer.param_groups:
        by_entry: dict[ParameterGroup | None, list[Tensor]] = {}
        for parameter in whole["params"]:
            by_entry.setdefault(assigned.get(parameter), []).append(parameter)
        for entry, parameters in by_entry.items():
            part = {**whole, "params": parameters}
            if entry is not None:
                part["lr"] = whole["lr"] * entry.learning_rate_scale
                part["weight_decay"] = whole["weight_decay"] if entry.weight_decay is None else entry.weight_decay
            parts.append((part["lr"] != whole["lr"], part))
    # Log lines show the first group's rate: one that nothing scales, if there is one.
    optimizer.param_groups[:] = [part for _, part in sorted(parts, key=lambda item: item[0])]


def _assigned(model: nn.Module, entries: Sequence[dict[str, Any]]) -> dict[Tensor, ParameterGroup]:
    """Each parameter's entry: the first that matches one of its names (a tied one has several)."""
    groups = [from_dict(ParameterGroup, entry) for entry in entries]
    named = list(model.named_parameters(remove_duplicate=False))
    assigned: dict[Tensor, ParameterGroup] = {}
    problems = []
    for index, group in enumerate(groups):
        matched = {parameter: name for name, parameter in named if fnmatchcase(name, group.pattern)}
        left = matched.keys() - assigned.keys()
        if not left:
            problem = (
                "parameters that an entry before has" if matched else f"no parameter.{_near(group.pattern, named)}"
            )
            problems.append(f"training.parameter_groups[{index}].pattern is {group.pattern!r}, which matches {problem}")
        assigned |= dict.fromkeys(left, group)
    if problems:
        raise ConfigError(problems)
    return assigned


def _near(pattern: str, named: Sequence[tuple[str, Tensor]]) -> str:
    names = [name for name, _ in named]
    shown = ", ".join(names[:SHOWN])
    return did_you_mean(pattern, names) or f" There are {len(names)}, such as {shown}."
