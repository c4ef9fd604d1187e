"""The state of a run by name: what a checkpoint holds."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fundamentallm.checkpoint.snapshot import AVERAGE_KEY, MODEL_KEY, OPTIMIZER_KEY
from fundamentallm.checkpoint.state_json import encode
from fundamentallm.checkpoint.tensor_files import Like
from fundamentallm.distributed.dtensor import is_sharded
from fundamentallm.run.environment import versions

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer


def exchange(state: dict[str, Any]) -> None:
    """Exchange weights and averages of a run's state, where it has any: the averages are what a checkpoint opens as."""
    if AVERAGE_KEY in state:
        model, averages = state[MODEL_KEY], state[AVERAGE_KEY]["weights"]
        state[AVERAGE_KEY]["weights"] = {name: model[name] for name in averages}
        state[MODEL_KEY] = {**model, **averages}


def run_state(trainer: Trainer) -> dict[str, Any]:
    """The state of every part by name, and what it was made with."""
    state = {f"{part}_state_dict": holder.state_dict() for part, holder in trainer.state.items()}
    exchange(state)
    return {**state, "config": stored_config(trainer), "versions": versions()}


def stored_config(trainer: Trainer) -> dict[str, Any]:
    """The settings that a checkpoint stores: those of the training only if the caller gave no whole `Config`."""
    config = dataclasses.asdict(trainer.config)
    return config["training"] if trainer.output_dir is None else config


def like_of(trainer: Trainer) -> Like | None:
    """Which slices of a checkpoint's tensors this process needs; None: all of all of them."""
    if not trainer.is_sharded:
        return None
    tensors: dict[str, Tensor] = {}
    weights = trainer.model.state_dict()
    # Averages, which this run may have given up, are sliced as the weights are: the checkpoint has the two exchanged.
    encode({MODEL_KEY: weights, AVERAGE_KEY: {"weights": weights}}, (), tensors)
    parameters: dict[str, Tensor] = {}
    encode({OPTIMIZER_KEY: {"state": dict(trainer.model.named_parameters())}}, (), parameters)

    def like(name: str, shape: tuple[int, ...]) -> Tensor | None:
        # What an optimizer keeps of a parameter is sliced as the parameter is.
        tensor = tensors.get(name, parameters.get(name.rpartition("/")[0]))
        if tensor is None or not is_sharded(tensor) or len(shape) == 0:
            return None
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {shape} and is to be sliced like a tensor of {tuple(tensor.shape)}")
        return tensor

    return like
