"""The state of any optimizer by parameter name."""

import copy
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

    {"type": class, "state": {parameter: {key: value}}, "groups": [{"params": [parameter], setting: value}], "other":
    the rest}. (`torch.distributed.checkpoint.state_dict` would run a hidden optimizer step.) "groups" has only the
    settings that training has changed, such as the step count of schedule-free optimizers. All others come from the
    config.
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
        changed = [
            {key: value for key, value in _settings(group).items() if not _is_same(value, initial.get(key))}
            for group, initial in zip(groups, self._initial, strict=False)
        ]
        return {
            "type": type(self.optimizer).__name__,
            "state": by_name,
            "groups": [{"params": of, **new} for of, new in zip(names, changed, strict=True)] if any(changed) else [],
            "other": other | ({"state": state} if state else {}),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises CheckpointError if it is of another model or optimizer."""
        if saved["type"] != type(self.optimizer).__name__:
            facts = f"The checkpoint has the state of {saved['type']} and this run has {type(self.optimizer).__name__}"
            raise CheckpointError(f"{facts}; resume with the same training.optimizer.")
        names, groups = self._names(), self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        trained = dict(zip((name for of in names for name in of), parameters, strict=True))
        # Other optimizers, such as 8-bit ones, keep state of any shape and type.
        is_torchs = type(self.optimizer).__module__.startswith("torch.optim")
        reads_blindly = is_torchs or any(group.get("fused") for group in groups)
        wrong = sorted(saved["state"].keys() ^ trained.keys())  # missing, or not trained here
        if reads_blindly and not wrong:
            of_each = [(name, key, value) for name, state in saved["state"].items() for key, value in state.items()]
            wrong = [f"{key} of {name}" for name, key, value in of_each if not _fits(key, value, trained[name])]
        if wrong:
            raise CheckpointError(f"The optimizer's state does not fit the model in {len(wrong)} places: {wrong[:5]}.")
        by_name = {name: _copied(state, trained[name]) for name, state in saved["state"].items() if state}
        present, new = self.optimizer.state_dict(), dict(saved.get("other", {}))  # earlier versions saved no other
        if "param_groups" in present:  # otherwise a wrapper of another optimizer, all of whose state is in "other"
            for group, of, initial in zip(present["param_groups"], names, self._initial, strict=True):
                former = [_settings(each) for each in saved.get("groups", []) if not {*of}.isdisjoint(each["params"])]
                if any(each != former[0] for each in former):
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
            text = "The optimizer trains parameters that are not the model's; make them parameters of the model."
            raise CheckpointError(text) from error


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in NOT_SAVED}


def _is_same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.dtype == other.dtype and torch.equal(value, other)
    return type(value) is type(other) and bool(value == other)


def _fits(key: str, value: Any, parameter: Tensor) -> bool:
    if key == "step":
        return torch.as_tensor(value).numel() == 1
    return key not in MOMENTS or getattr(value, "shape", None) == parameter.shape


def _copied(value: Any, parameter: Tensor, key: Any = None) -> Any:
    """Returns a copy of a saved value on the parameter's device, and a moment in its memory layout.

    Parameters that shared a step count when it was saved would otherwise each count it up.
    """
    if isinstance(value, dict):
        return {key: _copied(item, parameter, key) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_copied(item, parameter) for item in value])
    if not isinstance(value, Tensor):
        return value
    if key in MOMENTS and value.shape == parameter.shape and not is_sharded(value):
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return value.to(parameter.device, copy=True)
