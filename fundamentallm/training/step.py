"""One optimizer step: forward, backward, gradient exchange, clipping, guard, optimizer."""

from __future__ import annotations

from contextlib import nullcontext
from functools import reduce
from operator import add
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from fundamentallm.config.schema import IGNORE_INDEX
from fundamentallm.data.sampler import derive_seed
from fundamentallm.distributed.dtensor import seed_device, total_norm
from fundamentallm.training.guard import Guard


class StepResult(NamedTuple):
    """What a step was, over all processes; scalars on the device."""

    loss: Tensor
    """Summed over the targets."""
    num_targets: Tensor
    """Targets that count."""
    norm: Tensor
    """Of the gradient, before clipping."""


class OptimizerStep:
    """Takes optimizer steps; the host never waits for the device (an optimizer that cannot skip by itself excepted).

    Args:
        accelerator: placement, precision, gradient exchange and clipping.
        model_with_loss: maps (inputs, targets) to the loss summed over targets, as `prepare_model` made it.
        optimizer: over its parameters, or some of them.
        guard: says which steps must not be taken.
        max_norm: largest gradient norm; None: no clipping.
        seed: of the run.

    Attributes:
        is_updating: whether a step has begun to change weights and state, which whoever counts the step takes back.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model_with_loss: nn.Module,
        optimizer: Optimizer,
        guard: Guard,
        max_norm: float | None,
        seed: int,
    ) -> None:
        self.accelerator, self.model_with_loss = accelerator, model_with_loss
        self.num_processes, self.process_index = accelerator.num_processes, accelerator.process_index
        self.optimizer, self.guard = optimizer, guard
        self.max_norm, self.seed = max_norm, seed
        accelerator.prepare_optimizer(optimizer)  # which tells accelerate what to unscale before it clips
        self._trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._parameters = list(model_with_loss.parameters())  # of which the optimizer may have a part only
        self.is_updating = False

    def __call__(self, step: int, inputs: Tensor, targets: Tensor, parts: int) -> StepResult:
        """Train on this process's share of the batch of `step`, in `parts` micro-batches."""
        accelerator, model, scaler = self.accelerator, self.model_with_loss, self.accelerator.scaler
        # Derived, not carried: a resumed run draws the same dropout masks.
        seed_device(derive_seed(self.seed, step, self.process_index), accelerator.device)

        # Losses are sums over targets, divided once by the number of targets of the whole step: over all
        # micro-batches and processes. DistributedDataParallel averages, which num_processes undoes.
        count = self._sum((targets != IGNORE_INDEX).sum())
        divisor = count.clamp(min=1)
        scale = divisor.reciprocal() * self.num_processes
        pairs = [(inputs, targets)]
        if parts > 1:
            pairs = list(zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True))
        losses: list[Tensor] = []
        for part, (x, y) in enumerate(pairs, start=1):
            # Gradients of sharded weights are exchanged with each part: put off, they would be there unsharded.
            with nullcontext() if part == parts or accelerator.is_fsdp2 else accelerator.no_sync(model):
                loss_sum = model(x, y)
                # Not by accelerator.backward, which divides by a number of accumulation steps that is 1 here: a node
                # more, as multiplying by the scale would be.
                (loss_sum if scaler is None else scaler.scale(loss_sum)).backward(scale)
            losses.append(loss_sum.detach())
        loss = self._sum(reduce(add, losses))
        accelerator.unscale_gradients()
        norm = total_norm([parameter.grad for parameter in self._trained if parameter.grad is not None])
        self.is_updating = True
        self._update(norm, skip=self.guard.skips(step, loss / divisor, norm))
        for parameter in self._parameters:  # zero_grad() would walk through all modules first
            parameter.grad = None
        return StepResult(loss, count, norm)

    def _sum(self, tensor: Tensor) -> Tensor:
        """Over all processes."""
        return self.accelerator.reduce(tensor, "sum") if self.num_processes > 1 else tensor

    def _update(self, norm: Tensor, skip: Tensor) -> None:
        """Let the optimizer step, unless `skip` (a boolean scalar): then no weight and no moment changes.

        The gradient, of norm `norm`, is clipped to `max_norm`: by torch's fused kernels as they read it, which spares
        the pass over it that `accelerator.clip_grad_norm_` makes.
        """
        optimizer: Any = self.optimizer
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = skip.float()
            optimizer.grad_scale = None if self.max_norm is None else (norm / self.max_norm).clamp(min=1)
            optimizer.step()
        elif not skip:  # an optimizer that cannot do that by itself makes the host wait
            if self.max_norm is not None:
                clip_grads_with_norm_(self._trained, self.max_norm, norm)
            optimizer.step()
        if self.accelerator.scaler is not None:  # fp16: unscaling has told it what is not finite
            self.accelerator.scaler.update()
