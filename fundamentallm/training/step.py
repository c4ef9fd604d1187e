"""One optimizer step: forward and backward over the micro-batches, clipping, and the optimizer's update."""

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Optimizer

from fundamentallm.config.schema import TrainingConfig
from fundamentallm.data.sampler import derive_seed
from fundamentallm.distributed.batches import StepBatch
from fundamentallm.distributed.dtensor import full, seed_device
from fundamentallm.errors import CheckpointError
from fundamentallm.models.with_loss import ModelWithLoss
from fundamentallm.training.guard import Guard, ModelGuard
from fundamentallm.training.muon import Muon


class StepResult(NamedTuple):
    """The numbers of a step over all processes, as scalars on the device."""

    loss: Tensor  # sum over the targets
    num_targets: Tensor  # that count
    norm: Tensor  # of the gradient, before clipping


class OptimizerStep:
    """Takes optimizer steps. The host waits for the device only if the optimizer cannot skip a step on the device.

    `model_with_loss` maps a batch to the loss summed over targets, as `prepare_model` returned it.

    Attributes:
        is_updating: True from just before `optimizer.step()` until the trainer has counted the step. Still True after
            an exception: weights may be half updated.
    """

    def __init__(
        self, accelerator: Accelerator, model_with_loss: nn.Module, optimizer: Optimizer, config: TrainingConfig
    ) -> None:
        self.accelerator, self.model_with_loss, self.optimizer = accelerator, model_with_loss, optimizer
        self.objective: ModelWithLoss = accelerator.unwrap_model(model_with_loss)
        self.seed = config.seed
        self.max_norm = math.inf if config.gradient_clip_norm is None else config.gradient_clip_norm
        self.guard = Guard(accelerator.device, config.max_bad_steps, config.skip_spikes_above)
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.model_parameters = list(model_with_loss.parameters())  # also those that a caller's optimizer leaves out
        self.is_updating = False
        self._num_processes, self._is_sharded = accelerator.num_processes, accelerator.is_fsdp2
        self.model_guard = ModelGuard(accelerator, model_with_loss)

    def __call__(self, step: int, batch: StepBatch) -> StepResult:
        """Train on this process's share of the batch of `step`, in micro-batches."""
        accelerator, model = self.accelerator, self.model_with_loss
        # Derived from the step, not carried on: a resumed run draws the same dropout masks.
        seed_device(derive_seed(self.seed, step, accelerator.process_index), accelerator.device)

        # Losses are sums over targets, divided once by the targets of the whole step, over all processes and
        # micro-batches. DDP and FSDP average gradients over processes, which num_processes undoes.
        num_targets = self._reduced(self.objective.count(batch))
        divisor = num_targets.masked_fill(num_targets == 0, 1)
        scale = self._num_processes / divisor
        total = torch.zeros((), device=accelerator.device)
        self.model_guard.begin()
        for index, micro_batch in enumerate(batch.micro_batches(self.objective.trims), start=1):
            # Sharded gradients are exchanged with each micro-batch: kept until the last, they would be unsharded.
            is_exchanged = index == batch.num_micro_batches or self._is_sharded
            self.model_guard.reached.clear()
            with nullcontext() if is_exchanged else accelerator.no_sync(model):
                loss = model(micro_batch.content)
                if micro_batch.rows == 0:  # padding only
                    loss = loss * 0
                accelerator.backward(loss * scale)
            total += loss.detach()
        self.model_guard.check(batch.num_micro_batches)
        loss = self._reduced(total)

        # What accelerator.clip_grad_norm_ does. That method itself compares the parameters with those of each prepared
        # model under FSDP2, which raises if there are two models, or if some parameters are frozen.
        accelerator.unscale_gradients(self.optimizer)
        norm = full(clip_grad_norm_(self.parameters, self.max_norm))
        skip = self.guard.skips(step, loss / divisor, norm)
        self.is_updating = True
        self._update(skip)
        self.model_guard.end(skip)
        for parameter in self.model_parameters:  # model.zero_grad() would walk all modules
            parameter.grad = None
        return StepResult(loss, num_targets, norm)

    def _reduced(self, value: Tensor) -> Tensor:
        """Returns the sum over all processes. On a single one, accelerate's `reduce` would make a copy."""
        return value if self._num_processes == 1 else self.accelerator.reduce(value, "sum")

    def raise_if_updating(self) -> None:
        """Raises CheckpointError if an exception ended the last step within the optimizer's update."""
        if self.is_updating:
            reason = "An exception ended the last step while the optimizer changed the weights."
            raise CheckpointError(f"{reason} Load a checkpoint, or make a new Trainer, which resumes.")

    def _update(self, skip: Tensor) -> None:
        """Let the optimizer step, unless `skip` (a boolean scalar): then no weight and no optimizer state changes."""
        optimizer: Any = self.optimizer
        if skips_on_device(optimizer):
            optimizer.found_inf = skip.float()
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf
        elif not skip:  # the host waits for the device
            optimizer.step()
        if self.accelerator.scaler is not None:  # fp16
            self.accelerator.scaler.update()


def skips_on_device(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer skips a step if its attribute `found_inf` is 1, as GradScaler sets it.

    Only classes known to do so: a subclass inherits torch's flag for it, and may still ignore the attribute.
    """
    if type(optimizer) not in (AdamW, Adam, SGD, Muon):
        return False
    if type(optimizer) is SGD and any(
        group["momentum"] and optimizer.state.get(parameter, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        for parameter in group["params"]
    ):
        return False  # torch's fused SGD takes uninitialised memory for the momentum if it skips its first step
    return all(group["fused"] for group in optimizer.param_groups)
