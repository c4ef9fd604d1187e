"""An optimizer's state by parameter name, whatever class it is of."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fundamentallm.errors import CheckpointError


class NamedOptimizerState:
    """An optimizer's state by parameter name: {"type": class, "state": {parameter: {name: tensor or number}}}.

    "entries" counts what all parameters hold by each name, since torch would begin afresh, in silence, what an
    incomplete state lacks. By name, so that it fits any wrapping and any grouping of the same model; without the
    groups' hyper-parameters, which come from the config. (`torch.distributed.checkpoint.state_dict` would take a
    hidden optimizer step to create missing state.)
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """The state, by name."""
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        named = ((name, p) for name, p in self.model.named_parameters() if id(p) in trained)
        # Empty where a parameter has had no gradient yet: what is missing when loading has been lost.
        by_name = {name: dict(self.optimizer.state.get(p, {})) for name, p in named}
        return {"type": type(self.optimizer).__name__, "entries": _count_entries(by_name), "state": by_name}

    def refit(self, saved: dict[str, Any]) -> dict[str, Any]:
        """A saved state for what is trained now: without parameters that are no more, afresh for those that were not.

        For a run that is to train others from here on; else something missing is something lost.
        """
        by_name = {name: saved["state"].get(name, fresh) for name, fresh in self.state_dict()["state"].items()}
        return {**saved, "entries": _count_entries(by_name), "state": by_name}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: if type, names or shapes are not those of this model and optimizer, or some is lost.
        """
        if saved["type"] != type(self.optimizer).__name__:
            raise CheckpointError(
                f"The checkpoint has the state of {saved['type']} and this run has {type(self.optimizer).__name__}; "
                "resume with the same training.optimizer."
            )
        named = dict(self.model.named_parameters())
        index_of = {id(p): i for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"])}
        trained = {name for name, parameter in named.items() if id(parameter) in index_of}
        problems = [f"{name} is not trained here" for name in sorted(set(saved["state"]) - trained)]
        problems += [f"there is none for {name}" for name in sorted(trained - set(saved["state"]))]
        problems += [
            f"{key} of {name} has {_shape(value)}, the parameter {tuple(named[name].shape)}"
            for name, state in saved["state"].items()
            for key, value in state.items()
            if name in trained and not _fits(key, value, named[name])
        ]
        counts = _count_entries(saved["state"])
        if len({type(state["step"]) for state in saved["state"].values() if "step" in state}) > 1:
            problems.append("step is a tensor of some parameters and a number of others")  # torch looks at one of them
        problems += [
            f"there are {counts.get(key, 0)} of {count} {key}"
            for key, count in saved["entries"].items()
            if counts.get(key, 0) != count
        ]
        if problems:
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


def _count_entries(by_name: dict[str, dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(key for state in by_name.values() for key in state))


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"the value {value!r}"


LIKE_PARAMETERS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""What torch's fused kernels, and ours, read as many elements of as the parameter has, without looking."""


def _fits(key: str, value: Any, parameter: Tensor) -> bool:
    """Whether a state tensor has the parameter's shape, or is a factor of it (Adafactor's rows and columns)."""
    if key in LIKE_PARAMETERS:
        return isinstance(value, Tensor) and value.shape == parameter.shape
    if key == "step":
        return value.numel() == 1 if isinstance(value, Tensor) else type(value) in (int, float)
    if not isinstance(value, Tensor):
        return True
    sizes = zip(reversed(value.shape), reversed(parameter.shape), strict=False)
    return value.ndim <= parameter.ndim and all(size in (1, whole) for size, whole in sizes)
