"""Model and objective in one module: what a batch of any kind is trained on."""

from __future__ import annotations

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

    - Pairs (inputs, targets): `loss_fn(model(inputs), targets)`. Inputs may be a tensor, a tuple or a mapping.
    - Mappings: the model's own loss, or `loss_fn(logits, labels)` if its forward takes no `labels`.
    - Anything else needs an objective of the user's.

    A loss of a model's own is a mean, which is multiplied by its number of targets. What the model adds to it, such as
    a router loss, is a mean as well: over micro-batches and processes it is averaged by their numbers of targets.

    The Accelerator wraps this module instead of the model. The logits then stay inside the forward pass: accelerate
    does not cast or copy them, and DistributedDataParallel sees a scalar.

    Attributes:
        required: arguments of the model's forward that have no default.
        shifts: whether the model compares its outputs with the next label, so that the first one does not count.
        trims: whether padding has to be cut off, since the objective need not know targets that are ignored.
        gives_targets: whether the model is given the targets too, since it would return only the last logits without.
    """

    def __init__(self, model: nn.Module, loss_fn: Any, objective: Objective | None = None) -> None:
        super().__init__()
        self.model, self.loss_fn, self.objective = model, loss_fn, objective
        self.trims = objective is not None
        parameters = inspect.signature(model.forward).parameters
        self._takes_all = any(each.kind == each.VAR_KEYWORD for each in parameters.values())
        self._names = [name for name, each in parameters.items() if each.kind != each.VAR_KEYWORD]
        self.required = [name for name in self._names if parameters[name].default is inspect.Parameter.empty]
        self._options = cache_option(model, False) if self._takes_all or "use_cache" in parameters else {}
        # If both can compute the loss from hidden states, the logits of a large vocabulary never exist all at once.
        self.by_hidden = hasattr(loss_fn, "of_hidden") and "of_hidden" in parameters
        self.has_own_loss = self._takes_all or LABELS in parameters
        self.shifts, self.gives_targets = _shifts_labels(model), False
        self._counts = "num_items_in_batch" in parameters or (
            self._takes_all and hasattr(model, "loss_type") and getattr(model, "accepts_loss_kwargs", True)
        )

    def num_targets(self, batch: Any) -> Tensor:
        """Returns the number of targets of a batch, a scalar on its device."""
        if self.objective is not None:
            count = getattr(self.objective, "num_targets", _num_rows)(batch)
        elif isinstance(batch, Mapping):
            labels = batch.get(LABELS)
            if not isinstance(labels, Tensor) or (labels.is_floating_point() and self.has_own_loss):
                count = labels.numel() if isinstance(labels, Tensor) else _num_rows(batch)
            else:
                shifts = self.shifts and self.has_own_loss
                return ((labels[..., 1:] if shifts else labels) != IGNORE_INDEX).sum()
        else:
            return (_pair(batch)[1] != IGNORE_INDEX).sum()
        return torch.as_tensor(count, device=next((tensor.device for tensor in tensors(batch)), None))

    def count(self, batch: StepBatch) -> Tensor:
        """Returns the number of targets of this process in a step. Padding has none."""
        count = self.num_targets(batch.own)
        return count if batch.rows else count * 0

    def forward(self, batch: Any, with_outputs: bool = False) -> Any:
        """Returns the loss summed over targets, or (loss, outputs) if `with_outputs`, which only metrics need.

        The outputs of pairs are the logits.
        """
        if self.objective is not None:
            result = self.objective(self.model, batch)
            loss, outputs = result if isinstance(result, tuple) else (result, None)
        elif isinstance(batch, Mapping):
            loss, outputs = self._of_mapping(batch)
        else:
            loss, outputs = self._of_pair(*_pair(batch), with_outputs)
        return (loss, outputs) if with_outputs else loss

    def metric_batch(self, batch: Any) -> Any:
        """Returns what validation metrics are given beside the outputs: the batch, or the targets of a pair."""
        return batch if self.objective is not None or isinstance(batch, Mapping) else _pair(batch)[1]

    def _of_pair(self, inputs: Any, targets: Tensor, with_logits: bool) -> tuple[Tensor, Any]:
        if self.by_hidden and not with_logits:
            of_hidden = lambda hidden, weight: self.loss_fn.of_hidden(hidden, weight, targets)  # noqa: E731
            return self.model(inputs, of_hidden=of_hidden), None
        output = self.call(inputs, targets)
        logits = logits_of(output)
        loss = self.loss_fn(logits, targets)
        if self.training and (router_loss := getattr(output, "aux_loss", None)) is not None:
            loss = loss + self.model.router_aux_loss_coef * router_loss * (targets != IGNORE_INDEX).sum()
        return loss, logits

    def call(self, inputs: Any, targets: Tensor) -> Any:
        """Returns the model's output for the inputs of a pair."""
        options = self._options
        if isinstance(inputs, Mapping):
            return self.model(**inputs, **options)
        arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        if self.gives_targets:  # only the logits are used, so any target will do
            arguments = (*arguments, targets.clamp(min=0))
        return self.model(*arguments, **options)

    def taken(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the entries of a mapping that the model's forward takes."""
        return {name: value for name, value in batch.items() if self._takes_all or name in self._names}

    def _of_mapping(self, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        arguments: dict[str, Any] = {**self._options, **self.taken(batch)}
        if not self.has_own_loss:
            output = self.model(**arguments)
            return self.loss_fn(logits_of(output), _labels(batch)), output
        count = self.num_targets(batch)
        if isinstance(labels := batch.get(LABELS), Tensor) and not labels.is_floating_point():
            # A mean over no targets is 0 / 0. One that does not count makes it finite, and its weight is zero.
            arguments[LABELS] = labels = labels.clone()
            labels[..., -1] = torch.where(count == 0, 0, labels[..., -1])
        if self._counts:
            arguments["num_items_in_batch"] = count.clamp(min=1)
        output = self.model(**arguments)
        return loss_of(output) * count, output


def _pair(batch: Any) -> tuple[Any, Tensor]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    advice = f"Have collate_fn return one of them. {OBJECTIVE}"
    raise ConfigError(Problem("batch", describe(batch), "(inputs, targets), or a mapping", advice))


def _labels(batch: Mapping[str, Any]) -> Tensor:
    if isinstance(labels := batch.get(LABELS), Tensor):
        return labels
    raise ConfigError(Problem("batch", describe(batch), f"a mapping with a tensor {LABELS!r}", OBJECTIVE))


def _num_rows(batch: Any) -> int:
    return next((len(tensor) for tensor in tensors(batch) if tensor.ndim), 1)


def _shifts_labels(model: nn.Module) -> bool:
    """Returns whether a transformers model shifts labels, as the function of its loss says."""
    is_causal = getattr(getattr(model, "loss_function", None), "__name__", "") == "ForCausalLMLoss"
    return is_causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def describe(value: Any) -> str:
    """Returns the type of a batch or an output and what it contains, for messages."""
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(entry).__name__ for entry in value)}"
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def entry_of(output: Any, name: str) -> Any:
    """Returns an entry of a model's output by name, or None if there is none."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def logits_of(output: Any) -> Tensor:
    """Returns the logits of a model's output: a tensor, the entry `logits`, or the first tensor of a tuple.

    Raises:
        ConfigError: if there are none.
    """
    if isinstance(output, (tuple, list)):
        output = next((entry for entry in output if isinstance(entry, Tensor) and entry.ndim), output)
    logits = output if isinstance(output, Tensor) else entry_of(output, "logits")
    if not isinstance(logits, Tensor):
        raise ConfigError(Problem("the model's output", describe(output), "a tensor, or one with logits", OBJECTIVE))
    return logits


def loss_of(output: Any) -> Tensor:
    """Returns the loss in a model's output: a scalar, the entry `loss`, or the first scalar of a tuple.

    Raises:
        ConfigError: if there is none.
    """
    if isinstance(output, (tuple, list)):
        output = next((entry for entry in output if isinstance(entry, Tensor) and entry.numel() == 1), output)
    loss = output if isinstance(output, Tensor) else entry_of(output, "loss")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        advice = (
            "Give the batch the labels that the model's loss needs, or say what to minimise: Trainer(objective=...)."
        )
        raise ConfigError(Problem("the model's output", describe(output), "one with a scalar loss", advice))
    return loss.reshape(())
