"""The state of any optimizer by parameter name."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fundamentallm.distributed.dtensor import is_sharded
from fundamentallm.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")
"""State of which torch's fused kernels read as many elements as the parameter has, by address, without a check."""
NOT_SAVED = ("params", "lr", "initial_lr", "fused", "foreach", "capturable")
"""Entries of a group that never come from a checkpoint: parameters, what the schedule sets, and which kernel runs."""


class NamedOptimizerState:
    """What `optimizer.state_dict()` returns, with names of parameters instead of numbers, so that groups may change.

    {"type": class, "state": {parameter: {key: value}}, "entries": {key: number of parameters that have it}, "groups":
    [{"params": [parameter], setting: value}], "other": the rest}. Entries are counted because torch silently
    reinitializes missing state. (`torch.distributed.checkpoint.state_dict` would run a hidden optimizer step instead.)

    "groups" has only the settings that training has changed, such as the step count of schedule-free optimizers. All
    others come from the config.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self._initial = [copy.deepcopy(_settings(group)) for group in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state by name. A parameter that had no gradient yet has an empty one."""
        names, other = self._names(), dict(self.optimizer.state_dict())
        state, groups = dict(other.pop("state", {})), other.pop("param_groups", [])
        numbers = [number for group in groups for number in group["params"]]
        by_name: dict[str, dict[str, Any]] = {name: {} for of in names for name in of}
        by_name |= {name: dict(state.pop(n, {})) for name, n in zip(by_name, numbers, strict=False)}
        changed = [_changes(group, initial) for group, initial in zip(groups, self._initial, strict=False)]
        return {
            "type": type(self.optimizer).__name__,
            "entries": _count_entries(by_name),
            "state": by_name,
            "groups": [{"params": of, **new} for of, new in zip(names, changed, strict=True)] if any(changed) else [],
            "other": other | ({"state": state} if state else {}),
        }

    def refit(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Returns a saved state with the parameters trained now: drops others, and gives new ones no state.

        Only for a run that changes which parameters are trained. Otherwise missing state is an error.
        """
        by_name = {name: saved["state"].get(name, fresh) for name, fresh in self.state_dict()["state"].items()}
        return {**saved, "entries": _count_entries(by_name), "state": by_name}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises CheckpointError if it is of another model or optimizer."""
        if saved["type"] != type(self.optimizer).__name__:
            raise CheckpointError(
                f"The checkpoint has the state of {saved['type']} and this run has {type(self.optimizer).__name__}; "
                "resume with the same training.optimizer."
            )
        names, groups = self._names(), self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        trained = dict(zip((name for of in names for name in of), parameters, strict=True))
        # Other optimizers, such as 8-bit ones, keep state of any shape and type.
        is_torchs = type(self.optimizer).__module__.startswith("torch.optim")
        reads_blindly = is_torchs or any(group.get("fused") for group in groups)
        if problems := _problems(saved, trained, reads_blindly):
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise CheckpointError(f"The optimizer's state does not fit the model: {'; '.join(problems[:5])}{more}.")
        by_name = {
            name: {key: _copied(value, trained[name], key in MOMENTS) for key, value in state.items()}
            for name, state in saved["state"].items()
            if state
        }
        present, new = self.optimizer.state_dict(), dict(saved.get("other", {}))  # earlier versions saved no other
        if "param_groups" in present:  # otherwise a wrapper of another optimizer, all of whose state is in "other"
            for group, of, initial in zip(present["param_groups"], names, self._initial, strict=True):
                former = [_settings(each) for each in saved.get("groups", []) if not {*of}.isdisjoint(each["params"])]
                if any(_changes(each, former[0]) or _changes(former[0], each) for each in former):
                    raise CheckpointError(f"The parameters of the group of {of[0]} were in groups of other settings.")
                group.update(copy.deepcopy(initial) | (former[0] if former else {}))
            numbers = [number for group in present["param_groups"] for number in group["params"]]
            numbered = {n: by_name[name] for n, name in zip(numbers, trained, strict=True) if name in by_name}
            new |= {"state": numbered | new.get("state", {}), "param_groups": present["param_groups"]}
        self.optimizer.load_state_dict(new)
        as_loaded = {"step", *MOMENTS} if reads_blindly else {"step"}
        for name, state in by_name.items():
            # torch has cast all but the step to the parameter's type, and broken texts.
            loaded = self.optimizer.state.get(trained[name], {})
            loaded.update({key: state[key] for key in state.keys() & loaded.keys() - as_loaded})

    def _names(self) -> list[list[str]]:
        name_of = {id(parameter): name for name, parameter in self.model.named_parameters()}
        try:
            return [[name_of[id(p)] for p in group["params"]] for group in self.optimizer.param_groups]
        except KeyError as error:
            raise CheckpointError(
                "The optimizer trains parameters that are not the model's, which no checkpoint would hold; make them "
                "parameters of the model."
            ) from error


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in NOT_SAVED}


def _changes(group: dict[str, Any], initial: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in _settings(group).items() if k not in initial or not _is_same(v, initial[k])}


def _is_same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.dtype == other.dtype and torch.equal(value, other)
    if isinstance(value, (list, tuple)) and type(value) is type(other):
        return len(value) == len(other) and all(map(_is_same, value, other))
    return type(value) is type(other) and bool(value == other)


def _problems(saved: dict[str, Any], trained: dict[str, nn.Parameter], reads_blindly: bool) -> list[str]:
    by_name, counts = saved["state"], _count_entries(saved["state"])
    problems = [f"{name} is not trained here" for name in sorted(by_name.keys() - trained.keys())]
    problems += [f"{name} is missing" for name in sorted(trained.keys() - by_name.keys())]
    wrong = {key: number for key, number in saved["entries"].items() if counts.get(key, 0) != number}
    problems += [f"there are {counts.get(key, 0)} of {number} {key}" for key, number in wrong.items()]
    if problems or not reads_blindly:
        return problems
    return [
        f"{key} of {name} does not have the shape of the weight, {tuple(trained[name].shape)}"
        for name, state in by_name.items()
        for key, value in state.items()
        if (key in MOMENTS and getattr(value, "shape", None) != trained[name].shape)
        or (key == "step" and torch.as_tensor(value).numel() != 1)
    ]


def _count_entries(by_name: dict[str, dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(key for state in by_name.values() for key in state))


def _copied(value: Any, parameter: Tensor, is_moment: bool) -> Any:
    """Returns a copy of a saved value on the parameter's device, and a moment in its memory layout.

    Parameters that shared a step count when it was saved would otherwise each count it up.
    """
    if isinstance(value, Tensor):
        if is_moment and value.shape == parameter.shape and not is_sharded(value):
            return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        return value.to(parameter.device, copy=True)
    if isinstance(value, dict):
        return {key: _copied(item, parameter, False) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_copied(item, parameter, False) for item in value])
    return value
