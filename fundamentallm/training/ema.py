"""Averages of the weights on their devices: an exponential moving one, or that of a schedule-free optimizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fundamentallm.config.schema import TrainingConfig
from fundamentallm.distributed.dtensor import local
from fundamentallm.errors import CheckpointError, ConfigError, Problem


class WeightAverage:
    """average += (1 - d) (weights - average) after each optimizer step, with d = min(decay, (1 + n) / (10 + n)).

    n counts those steps. Early on the average forgets faster; otherwise it would keep the initial weights for long.
    (The rule of TensorFlow's ExponentialMovingAverage with num_updates.) Hooks of the optimizer update it on the
    device. A skipped step leaves it bit-identical. Only parameters that `optimizer` trains are averaged.
    """

    def __init__(self, model: nn.Module, optimizer: Any, decay: float = 0.0) -> None:
        self.model, self.optimizer, self.decay, self._is_applied = model, optimizer, decay, False
        self._average: dict[nn.Parameter, Tensor] = {}  # empty until the first step, before which weights are loaded
        self._trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._updates = torch.zeros((), dtype=torch.int64, device=self._trained[0].device)

    def begin(self, *_: Any) -> None:
        """Copy the weights before the first step."""
        self._average = self._averages()

    def _averages(self) -> dict[nn.Parameter, Tensor]:
        return self._average or self._weights()

    def _weights(self) -> dict[nn.Parameter, Tensor]:
        return {parameter: parameter.detach().clone() for parameter in self._trained}

    @torch.no_grad()
    def update(self, optimizer: Optimizer, *_: Any) -> None:
        """Move the averages towards the weights after a step."""
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)  # 1 if the optimizer has skipped the step
        taken = torch.ones_like(self._updates) if found_inf is None else 1 - found_inf
        weight = (9 / (10 + self._updates)).clamp(min=1 - self.decay) * taken  # 1 - d
        self._updates += taken.to(torch.int64)
        for parameter, average in self._average.items():
            local(average).lerp_(local(parameter), weight.to(average.dtype))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the averaged weights into the model on entry, and its own back on exit. Nested uses change nothing."""
        averages = {} if self._is_applied else self._averages()
        self._swap(averages)
        was_applied, self._is_applied = self._is_applied, True
        try:
            yield
        finally:
            self._swap(averages)
            self._is_applied = was_applied

    @torch.no_grad()
    def _swap(self, averages: dict[nn.Parameter, Tensor]) -> None:
        for module in self.model.modules():  # a forward pass may have left weights gathered, which the swap misses
            if hasattr(module, "reshard"):
                module.reshard()  # type: ignore[operator]  # an FSDPModule
        for parameter, average in averages.items():
            weight, averaged = local(parameter), local(average)
            held = weight.clone()  # in place, since others hold the weight
            weight.copy_(averaged)
            averaged.copy_(held)

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of updates, and the averages by parameter name. Raises CheckpointError in `applied`."""
        if self._is_applied:
            raise CheckpointError("the model holds its averaged weights; leave averaged_weights() before saving.")
        averages, named = self._averages(), self.model.named_parameters(remove_duplicate=False)  # as in a state dict
        return {"updates": self._updates, "weights": {name: averages[p] for name, p in named if p in averages}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore saved averages; one that was not saved starts from the weights."""
        self._average = self._weights()
        for name, parameter in self.model.named_parameters():
            if parameter in self._average and name in state["weights"]:
                average = local(self._average[parameter])
                average.copy_(local(state["weights"][name]).view_as(average))  # copy_ alone would broadcast
        self._updates.copy_(state["updates"])


class OptimizersAverage(WeightAverage):
    """The average that an optimizer keeps itself, as schedule-free ones do: eval() and train() switch the weights."""

    @torch.no_grad()
    def _averages(self) -> dict[nn.Parameter, Tensor]:
        self.optimizer.train()  # a caller may have switched it
        trained = self._weights()
        self.optimizer.eval()
        averages = self._weights()
        self.optimizer.train()
        for parameter, weight in trained.items():  # exactly: switching rounds
            local(parameter).copy_(local(weight))
        return averages

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the average follows from the weights and the optimizer's state."""


def make_average(config: TrainingConfig, model: nn.Module, optimizer: Optimizer) -> WeightAverage | None:
    """Returns the average of the weights, or None. Raises ConfigError if both `config` and `optimizer` average."""
    decay, averages_itself = config.ema_decay, switch_to_training(optimizer)
    if decay is None:
        return OptimizersAverage(model, optimizer) if averages_itself else None
    if averages_itself:
        reason = f"and {type(optimizer).__name__} averages the weights itself"
        raise ConfigError(Problem("training.ema_decay", decay, "null", reason=reason))
    average = WeightAverage(model, optimizer, decay)
    optimizer.register_step_pre_hook(average.begin)
    optimizer.register_step_post_hook(average.update)
    return average


def switch_to_training(optimizer: Any) -> bool:
    """Calls train() of an optimizer that switches between weights and their average. Returns whether it is one."""
    is_one = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    if is_one:
        optimizer.train()
    return is_one
