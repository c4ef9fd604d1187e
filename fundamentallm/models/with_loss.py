"""Model and objective in one module: what a batch of any kind is trained on."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fundamentallm.config.schema import IGNORE_INDEX
from fundamentallm.distributed.batches import LABELS, StepBatch, tensors
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.models.transformer import cache_option

OBJECTIVE = "To minimise something else, give Trainer(objective=...)."
Objective = Callable[[nn.Module, Any], Any]
"""Maps (model, batch) to the loss summed over targets, or to (loss, outputs) for validation metrics.

Its method `num_targets(batch)` counts the targets before the forward pass. Without one, each sample is a target."""


class ModelWithLoss(nn.Module):
    """Model and objective in one forward pass, which returns the loss summed over targets.

    A user's objective is for all batches. Without one, `PairLoss` is for (inputs, targets) and `OwnLoss` for mappings.

    The Accelerator wraps this module instead of the model. The logits then stay inside the forward pass: accelerate
    does not cast or copy them, and DistributedDataParallel sees a scalar.
    """

    def __init__(self, model: nn.Module, loss_fn: Any, objective: Objective | None = None) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn  # a submodule, which follows train() and eval()
        self.of_pairs, self.of_mappings = PairLoss(model, loss_fn), OwnLoss(model, loss_fn)
        self.trims = objective is not None  # cuts off padding: a user's objective need not know ignored targets
        if objective is not None:
            self._of_user = functools.partial(objective)  # not a submodule
            self._count = getattr(objective, "num_targets", _num_rows)

    def objective(self, batch: Any) -> PairLoss | OwnLoss | None:
        """Returns the objective of a batch, or None if it is a user's."""
        if self.trims:
            return None
        return self.of_mappings if isinstance(batch, Mapping) else self.of_pairs

    def num_targets(self, batch: Any) -> Tensor:
        """Returns the number of targets of a batch, a scalar on its device."""
        device, objective = next((tensor.device for tensor in tensors(batch)), None), self.objective(batch)
        count = self._count(batch) if objective is None else objective.num_targets(batch)
        return torch.as_tensor(count, device=device)

    def count(self, batch: StepBatch) -> Tensor:
        """Returns the number of targets of this process in a step. Padding has none."""
        count = self.num_targets(batch.own)
        return count if batch.rows else count * 0

    def forward(self, batch: Any, with_outputs: bool = False) -> Any:
        """Returns the loss summed over targets, or (loss, outputs) if `with_outputs`, which only metrics need."""
        objective = self.objective(batch)
        if objective is not None:
            result = objective(self.model, batch, with_outputs)
        else:
            result = self._of_user(self.model, batch)
        loss, outputs = result if isinstance(result, tuple) else (result, None)
        return (loss, outputs) if with_outputs else loss


class _Loss:
    def __init__(self, model: nn.Module, loss_fn: Any) -> None:
        parameters = inspect.signature(model.forward).parameters.values()
        self._takes_all = any(each.kind == each.VAR_KEYWORD for each in parameters)
        self._names = [each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
        caches = self._takes_all or "use_cache" in self._names  # keys and values, for generating text
        self._options = cache_option(model, False) if caches else {}
        self.loss_fn = loss_fn


class PairLoss(_Loss):
    """Minimises `loss_fn(model(inputs), targets)` over pairs (inputs, targets). The outputs are the logits."""

    def __init__(self, model: nn.Module, loss_fn: Any) -> None:
        super().__init__(model, loss_fn)
        # From hidden states, so that the logits of a large vocabulary never exist all at once.
        self.by_hidden = hasattr(loss_fn, "of_hidden") and "of_hidden" in self._names
        self.gives_targets = False  # to a model that would return only the last logits without them

    def num_targets(self, batch: Any) -> Tensor:
        """Returns the number of targets that are not ignored."""
        return (_pair(batch)[1] != IGNORE_INDEX).sum()

    def __call__(self, model: Any, batch: Any, with_outputs: bool) -> tuple[Tensor, Any]:
        """Returns the loss, with a router loss of the model's for each target in training, and the logits."""
        inputs, targets = _pair(batch)
        if self.by_hidden and not with_outputs:
            of_hidden = lambda hidden, weight: self.loss_fn.of_hidden(hidden, weight, targets)  # noqa: E731
            return self.output(model, inputs, targets, of_hidden=of_hidden), None
        output = self.output(model, inputs, targets)
        logits = logits_of(output)
        loss = self.loss_fn(logits, targets)
        if model.training and (router_loss := getattr(output, "aux_loss", None)) is not None:
            loss = loss + model.router_aux_loss_coef * router_loss * (targets != IGNORE_INDEX).sum()
        return loss, logits

    def output(self, model: nn.Module, inputs: Any, targets: Tensor, **options: Any) -> Any:
        """Returns the model's output for inputs that are a tensor, several in a tuple or list, or a mapping."""
        options = self._options | options
        if isinstance(inputs, Mapping):
            return model(**inputs, **options)
        arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        if self.gives_targets:  # only the logits are used, so any target will do
            arguments = (*arguments, targets.clamp(min=0))
        return model(*arguments, **options)


class OwnLoss(_Loss):
    """Minimises the model's own loss over mappings, or `loss_fn(logits, labels)` if its forward takes no `labels`.

    A loss of a model's own is a mean, which is multiplied by its number of targets. What the model adds to it, such as
    a router loss, is a mean as well: over micro-batches and processes it is averaged by their numbers of targets.
    """

    def __init__(self, model: nn.Module, loss_fn: Any) -> None:
        super().__init__(model, loss_fn)
        self.computes_loss = self._takes_all or LABELS in self._names
        # Whether the first label does not count, as the function of a transformers model's loss says.
        is_causal = getattr(getattr(model, "loss_function", None), "__name__", "") == "ForCausalLMLoss"
        is_decoder = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.shifts = self.computes_loss and is_causal and is_decoder
        # transformers' models that take any argument hand the count on to their loss function.
        hands_on = self._takes_all and hasattr(model, "loss_type") and getattr(model, "accepts_loss_kwargs", True)
        self._takes_count = hands_on or "num_items_in_batch" in self._names

    def unused(self, batch: Mapping[str, Any]) -> list[str]:
        """Returns the entries of a batch that neither the model's forward nor the loss takes."""
        return [] if self._takes_all else [name for name in batch if name not in (*self._names, LABELS)]

    def num_targets(self, batch: Mapping[str, Any]) -> Any:
        """Returns the number of labels that count, or of samples if there are no labels."""
        labels = batch.get(LABELS)
        if not isinstance(labels, Tensor):
            return _num_rows(batch)
        if self.computes_loss and labels.is_floating_point():  # numbers to predict
            return labels.numel()
        return ((labels[..., 1:] if self.shifts else labels) != IGNORE_INDEX).sum()

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], with_outputs: bool) -> tuple[Tensor, Any]:
        """Returns the loss and the model's output."""
        unused, labels = self.unused(batch), batch.get(LABELS)
        arguments = self._options | {name: entry for name, entry in batch.items() if name not in unused}
        if not self.computes_loss:
            arguments.pop(LABELS, None)
            output = model(**arguments)
            if not isinstance(labels, Tensor):
                raise _misfit("batch", batch, f"a mapping with a tensor {LABELS!r}")
            return self.loss_fn(logits_of(output), labels), output
        count = torch.as_tensor(self.num_targets(batch))
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            # A mean over no targets is 0 / 0. One that does not count makes it finite, and its weight is zero.
            arguments[LABELS] = labels = labels.clone()
            labels[..., -1] = torch.where(count == 0, 0, labels[..., -1])
        if self._takes_count:
            arguments["num_items_in_batch"] = count.clamp(min=1)
        output = model(**arguments)
        loss = _tensor_of(output, "loss", "one with a scalar loss", lambda tensor: tensor.numel() == 1)
        return loss.reshape(()) * count, output


def _pair(batch: Any) -> tuple[Any, Tensor]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise _misfit("batch", batch, "(inputs, targets), or a mapping", "Have collate_fn return one of them. ")


def _num_rows(batch: Any) -> int:
    return next((len(tensor) for tensor in tensors(batch) if tensor.ndim), 1)


def describe(value: Any) -> str:
    """Returns the type of a batch or an output and what it contains, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    entries: list[str] = []
    if isinstance(value, (Mapping, tuple, list)):
        entries = [str(entry) if isinstance(value, Mapping) else type(entry).__name__ for entry in value]
    return f"a {type(value).__name__}" + (f" of {', '.join(entries)}" if entries else "")


def _misfit(name: str, value: Any, allowed: str, advice: str = "") -> ConfigError:
    return ConfigError(Problem(name, describe(value), allowed, f"{advice}{OBJECTIVE}"))


def _tensor_of(output: Any, name: str, allowed: str, fits: Callable[[Tensor], bool]) -> Tensor:
    """Returns a model's output if it is a tensor, its entry `name`, or the first tensor of a tuple, if it fits."""
    if isinstance(output, (Tensor, tuple, list)):
        entries = [output] if isinstance(output, Tensor) else output
    else:
        entries = [output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)]
    for entry in entries:
        if isinstance(entry, Tensor) and fits(entry):
            return entry
    raise _misfit("the model's output", output, allowed)


def logits_of(output: Any) -> Tensor:
    """Returns the logits of a model's output, or raises ConfigError if there are none."""
    return _tensor_of(output, "logits", "a tensor, or one with logits", lambda tensor: tensor.ndim > 0)
