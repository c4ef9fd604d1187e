"""The state of any optimizer by parameter name."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fundamentallm.errors import CheckpointError

SAME_SHAPE = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""State of which fused kernels read as many elements as the parameter has, without a check."""


class NamedOptimizerState:
    """An optimizer's state as {"type": class, "state": {parameter: {key: tensor or number}}, "entries": {key: count}}.

    Names make it independent of wrappers and of the grouping of parameters. Hyperparameters are not in it, since they
    come from the config. "entries" counts how many parameters have each key: torch silently reinitializes missing
    state. (`torch.distributed.checkpoint.state_dict` would run a hidden optimizer step to create missing state.)
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Returns the state by name. A parameter that had no gradient yet has an empty state."""
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        named = ((name, p) for name, p in self.model.named_parameters() if id(p) in trained)
        by_name = {name: dict(self.optimizer.state.get(p, {})) for name, p in named}
        return {"type": type(self.optimizer).__name__, "entries": _count_entries(by_name), "state": by_name}

    def refit(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Returns a saved state with the parameters trained now: drops others, and gives new ones no state.

        Only for a run that changes which parameters are trained. Otherwise missing state is an error.
        """
        by_name = {name: saved["state"].get(name, fresh) for name, fresh in self.state_dict()["state"].items()}
        return {**saved, "entries": _count_entries(by_name), "state": by_name}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: if type, names or shapes are not those of this model and optimizer, or some are missing.
        """
        if saved["type"] != type(self.optimizer).__name__:
            raise CheckpointError(
                f"The checkpoint has the state of {saved['type']} and this run has {type(self.optimizer).__name__}; "
                "resume with the same training.optimizer."
            )
        named = dict(self.model.named_parameters())
        index_of = {id(p): i for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"])}
        trained = {name: parameter for name, parameter in named.items() if id(parameter) in index_of}
        if problems := _problems(saved, trained):
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise CheckpointError(f"The optimizer's state does not fit the model: {'; '.join(problems[:5])}{more}.")
        # Scalars that parameters shared when they were saved are one tensor now, and each parameter would count it up.
        state = {
            index_of[id(named[name])]: {
                key: value.clone() if isinstance(value, Tensor) and value.ndim == 0 else value
                for key, value in state.items()
            }
            for name, state in saved["state"].items()
            if state
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def _problems(saved: dict[str, Any], trained: dict[str, nn.Parameter]) -> list[str]:
    by_name, counts = saved["state"], _count_entries(saved["state"])
    problems = [f"{name} is not trained here" for name in sorted(by_name.keys() - trained.keys())]
    problems += [f"{name} is missing" for name in sorted(trained.keys() - by_name.keys())]
    problems += [
        f"{key} of {name} has {_shape(value)}, the parameter {tuple(trained[name].shape)}"
        for name, state in by_name.items()
        for key, value in state.items()
        if name in trained and not _fits(key, value, trained[name])
    ]
    if len({type(state["step"]) for state in by_name.values() if "step" in state}) > 1:
        problems.append("step is a tensor for some parameters and a number for others")  # torch checks only the first
    problems += [
        f"there are {counts.get(key, 0)} of {count} {key}"
        for key, count in saved["entries"].items()
        if counts.get(key, 0) != count
    ]
    return problems


def _count_entries(by_name: dict[str, dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(key for state in by_name.values() for key in state))


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"the value {value!r}"


def _fits(key: str, value: Any, parameter: Tensor) -> bool:
    """Returns True if a value can belong to a parameter. Adafactor, for one, keeps state of other shapes."""
    if key in SAME_SHAPE:
        return isinstance(value, Tensor) and value.shape == parameter.shape
    if key == "step":
        return value.numel() == 1 if isinstance(value, Tensor) else type(value) in (int, float)
    return True
