"""An exponential moving average of the weights, kept beside them on their devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fundamentallm.config.schema import TrainingConfig
from fundamentallm.distributed.dtensor import is_sharded, local
from fundamentallm.errors import CheckpointError, ConfigError

AT_ONCE = 2**24
"""Elements averaged at once, but for larger tensors: what is between two kernels takes memory."""


class WeightAverage:
    """average += (1 - d) (weights - average) after each optimizer step that was taken, d = min(decay, (1+n) / (10+n)).

    n counts those steps: early on the average forgets faster, or it would long be made of the initial weights. (The
    rule of TensorFlow's ExponentialMovingAverage with num_updates.) The optimizer's own hooks call it, and the host
    waits for nothing: a step that is left out leaves it as it is, to the bit. Sharded weights are averaged slice by
    slice, on whoever holds them.

    Args:
        model: on its device, sharded or not.
        optimizer: over its parameters; what it does not train needs no average.
        decay: between 0 and 1.

    Raises:
        ConfigError: if there is nothing to average, or weights are not float32, in whose place an average of another
            precision could not be put.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, decay: float) -> None:
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        # A tied parameter under each of its names, as in the model's own state.
        named = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if id(p) in trained]
        if not named:
            raise ConfigError("training.ema_decay is set and the optimizer trains nothing of the model; give it one.")
        if wrong := [f"{name} is {p.dtype}" for name, p in named if p.dtype != torch.float32]:
            raise ConfigError(
                f"training.ema_decay is {decay} and {wrong[0]}; allowed: weights in float32, in which an average adds "
                "up (training.mixed_precision computes in 16 bits all the same)."
            )
        self.model, self.decay = model, decay
        self._parameters: dict[nn.Parameter, list[str]] = {}
        for name, parameter in named:
            self._parameters.setdefault(parameter, []).append(name)
        self._average: dict[nn.Parameter, Tensor] = {}  # empty before the first step, until which weights may be loaded
        self._is_applied = False
        self._updates = torch.zeros((), dtype=torch.int64, device=named[0][1].device)
        optimizer.register_step_pre_hook(lambda *_: self._begin())
        optimizer.register_step_post_hook(self._update)

    @torch.no_grad()
    def _begin(self) -> None:
        self._average = self._average or {p: p.detach().clone() for p in self._parameters}

    @torch.no_grad()
    def _update(self, optimizer: Optimizer, *_: Any) -> None:
        weight = (9 / (10 + self._updates)).clamp(min=1 - self.decay)  # 1 - d
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # else it is not called for a step to be left out
            taken = 1 - optimizer.found_inf  # type: ignore[attr-defined]
            weight = weight * taken
            self._updates += taken.to(torch.int64)
        else:
            self._updates += 1
        for weights, averages in self._pieces():
            # In three kernels, since lerp takes its weight from the host, or one as large as the weights.
            way = torch._foreach_sub(weights, averages)
            torch._foreach_mul_(way, weight)
            torch._foreach_add_(averages, way)

    def _pieces(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """What this process holds of weights and averages, some at a time."""
        weights: list[Tensor] = []
        averages: list[Tensor] = []
        for parameter, average in self._average.items():
            weights.append(local(parameter))
            averages.append(local(average))
            if sum(tensor.numel() for tensor in weights) >= AT_ONCE:
                yield weights, averages
                weights, averages = [], []
        if weights:
            yield weights, averages

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Meanwhile, the model has the averaged weights (before the first step there are none but its own).

        Within it, another one changes nothing.
        """
        if self._is_applied:
            yield
            return
        self._swap()
        self._is_applied = True
        try:
            yield
        finally:
            self._swap()
            self._is_applied = False

    @torch.no_grad()
    def _swap(self) -> None:
        if any(map(is_sharded, self._average)):  # what a forward pass has left gathered is the other weights
            for module in self.model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()  # type: ignore[operator]  # an FSDPModule
        for parameter, average in self._average.items():
            weight, averaged = local(parameter), local(average)
            held = weight.clone()  # a tensor at a time, in place, so that nothing that holds the weights notices
            weight.copy_(averaged)
            averaged.copy_(held)

    def refit(self, saved: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
        """A saved state for what is trained now: an average of what was not begins with its (saved) weights."""
        names = [name for names in self._parameters.values() for name in names]
        return {**saved, "weights": {name: saved["weights"].get(name, weights[name]) for name in names}}

    def state_dict(self) -> dict[str, Any]:
        """The number of updates, and the averages by their parameters' names.

        Raises:
            CheckpointError: where they are applied, so that each has the other's place.
        """
        if self._is_applied:
            raise CheckpointError("the model has its averaged weights; leave averaged_weights() before saving.")
        averages = self._average or {p: p.detach().clone() for p in self._parameters}
        by_name = {name: averages[p] for p, names in self._parameters.items() for name in names}
        return {"updates": self._updates, "weights": by_name}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved averages. Raises ValueError if they are not those of this model's parameters."""
        shapes = {name: tuple(p.shape) for p, names in self._parameters.items() for name in names}
        saved = {name: tuple(tensor.shape) for name, tensor in state["weights"].items()}
        if shapes != saved or state["updates"].shape != ():
            wrong = sorted(name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name))
            raise ValueError(f"the averages are not those of the weights trained here ({', '.join(wrong[:5])}).")
        self._begin()
        for parameter, names in self._parameters.items():
            local(self._average[parameter]).copy_(local(state["weights"][names[0]]))
        self._updates.copy_(state["updates"])


def make_average(config: TrainingConfig, model: nn.Module, optimizer: Optimizer) -> WeightAverage | None:
    """The moving average of the weights that `optimizer` trains; None where `config` asks for none."""
    return None if config.ema_decay is None else WeightAverage(model, optimizer, config.ema_decay)
