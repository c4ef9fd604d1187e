"""Checks the first batch and the first output before the first step: shapes, types, ranges, and known traps.

Otherwise a run would end in an error of torch that names no setting, or silently train on something else.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from fundamentallm.config.schema import IGNORE_INDEX
from fundamentallm.data.loaders import device_batches
from fundamentallm.data.sampler import StepSampler
from fundamentallm.distributed.batches import LABELS, StepBatch, take_rows, tensors
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.models.with_loss import OBJECTIVE, ModelWithLoss, describe, entry_of, logits_of
from fundamentallm.training.loss import CrossEntropy
from fundamentallm.training.micro_batch import restored

MOST_WITHOUT_TARGETS = 100
"""Batches without any target that are read before a loader is refused."""
DISTANCES = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)


def _refuse(name: str, found: str, allowed: str, advice: str = "") -> ConfigError:
    return ConfigError(Problem(name, found, allowed, advice, text=found))


class CheckedArguments(TorchFunctionMode):
    """Checks what embeddings and losses are given, before a kernel sees it: on a GPU, a wrong index is fatal."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {parameter: name for name, parameter in model.named_parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check the arguments of the functions that look up by an index, and call the function."""
        kwargs = kwargs or {}
        if func in (F.embedding, F.cross_entropy, F.nll_loss, *DISTANCES):
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            if func is F.embedding:
                _check_ids(given["input"], given["weight"], self.names.get(given["weight"], "an embedding"))
            elif func not in DISTANCES:
                _check_targets(given["input"], given["target"], given.get("ignore_index", IGNORE_INDEX))
            elif given["input"].shape != given["target"].shape:  # torch would compare each with each
                found, allowed = (f"of shape {tuple(given[name].shape)}" for name in ("target", "input"))
                advice = "Give both one shape, by outputs.squeeze(-1) or targets.unsqueeze(-1)."
                raise _refuse("targets", found, f"{allowed}, as the outputs", advice)
        return func(*args, **kwargs)


def _check_ids(ids: Tensor, weight: Tensor, name: str) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise _refuse("inputs", f"{ids.dtype}", f"integers, which {name} looks up", "Convert token ids: ids.long().")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(weight):
        advice = (
            "Check that the tokenizer is the model's, and that samples are no longer than the model's context, or give "
            "the model more rows (resize_token_embeddings in transformers)."
        )
        raise _refuse(
            "inputs", f"{int(ids.min())} to {int(ids.max())}", f"0 to {len(weight) - 1}, the rows of {name}", advice
        )


def _check_targets(logits: Tensor, targets: Tensor, ignored: int) -> None:
    classes = logits.shape[min(1, logits.ndim - 1)]
    if targets.is_floating_point() and targets.shape == logits.shape:  # probabilities
        return
    if targets.dtype not in (torch.int64, torch.uint8):
        advice = "Convert class indices (targets.long()), or set training.loss to a loss for numbers."
        raise _refuse("targets", f"{targets.dtype}", "torch.int64, for a cross entropy", advice)
    if logits.ndim > 1 and targets.shape != (len(logits), *logits.shape[2:]):
        shapes = tuple(targets.shape), tuple(logits.shape)
        raise _refuse("targets", f"of shape {shapes[0]}", f"one for each of the logits, of shape {shapes[1]}")
    counted = targets[targets != ignored]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < classes:
        advice = f"Give the model as many classes as there are, or {IGNORE_INDEX} to targets that do not count."
        found = f"{int(counted.min())} to {int(counted.max())}"
        raise _refuse("targets", found, f"0 to {classes - 1}, the model's {classes} classes", advice)


class FirstBatches:
    """Loads batches. The first one of each loader is checked, by one forward pass in evaluation mode.

    Args:
        model: model and objective, not wrapped.
        accelerator: adds up the number of targets.
        group: the processes, which all fail if one does.
        say: prints a warning.
    """

    def __init__(
        self, model: ModelWithLoss, accelerator: Accelerator, group: HostGroup, say: Callable[[str], None]
    ) -> None:
        self.model, self.accelerator, self.group, self.say = model, accelerator, group, say
        self._checked: list[DataLoader[Any]] = []

    def load(
        self, loader: DataLoader[Any], samples: StepSampler, start: int, stop: int, needs_targets: bool = False
    ) -> Iterator[StepBatch]:
        """Yields `device_batches`.

        Raises:
            ConfigError: if a batch or the output does not fit the objective, or with `needs_targets` there are none.
        """
        device = self.accelerator.device
        for batch in device_batches(loader, samples, start, stop, device):
            if not any(loader is each for each in self._checked):
                self._checked.append(loader)
                self._check(batch, loader.collate_fn)
                if needs_targets:
                    self._check_count(
                        itertools.chain([batch], device_batches(loader, samples, start + 1, stop, device))
                    )
            yield batch

    @torch.no_grad()
    def _check(self, batch: StepBatch, collate_fn: Any) -> None:
        model, accelerator = self.model, self.accelerator
        with self.group.barrier_with_errors():
            _check_batch(model, batch.own)
        # Under FSDP2 a process that fails in its forward pass must end: the others wait for its shards.
        with (
            restored(model, accelerator.device),
            torch.compiler.set_stance("force_eager"),
            CheckedArguments(model.model),
        ):
            model.eval()
            exchange = nullcontext() if accelerator.is_fsdp2 else self.group.barrier_with_errors()
            with exchange, accelerator.autocast():
                _check_output(model, batch)
                _check_sum(model, batch)
        for line in (*_copies(model, batch.own), *_padding(model.model, collate_fn)):
            self.say(f"warning: {line}")

    def _check_count(self, batches: Iterator[StepBatch]) -> None:
        for batch in itertools.islice(batches, MOST_WITHOUT_TARGETS):
            if self.accelerator.reduce(self.model.count(batch), "sum") > 0:
                return
        advice = f"Check what is masked with {IGNORE_INDEX}, and whether prompts fill the sequence length."
        reason = f"in the first {MOST_WITHOUT_TARGETS} batches, or in all if there are fewer"
        raise ConfigError(Problem("the number of targets", 0, "at least 1", advice, reason))


def _check_batch(model: ModelWithLoss, batch: Any) -> None:
    """Checks a batch by itself."""
    if not tensors(batch):
        raise _refuse("batch", describe(batch), "tensors, in any nesting")
    if isinstance(batch, Mapping) and model.objective is None:
        name = type(model.model).__name__
        if missing := [each for each in model.required if each not in batch]:
            allowed = f"a mapping with {', '.join(missing)}, which {name}.forward needs"
            raise _refuse("batch", describe(batch), allowed, f"Rename the entries in collate_fn. {OBJECTIVE}")
        if model.has_own_loss and type(model.loss_fn) is not CrossEntropy:
            loss = type(model.loss_fn).__name__
            raise _refuse("training.loss", loss, f"cross_entropy, since {name} computes its own loss", OBJECTIVE)
        masks = ((key, mask) for key, mask in batch.items() if str(key).endswith("attention_mask"))
        for key, mask in masks:
            if isinstance(mask, Tensor) and mask.ndim == 2 and (hidden := (mask == 0).all(1)).any():
                found = f"hides every token of sample {int(hidden.int().argmax())} of the first batch"
                raise _refuse(f"batch[{key!r}]", found, "at least one token", "Leave empty samples out of the dataset.")
    model.num_targets(batch)  # raises if it cannot


def _check_output(model: ModelWithLoss, batch: StepBatch) -> None:
    for number, (content, _) in enumerate(batch.micro_batches(model.trims)):
        is_mapping = isinstance(content, Mapping)
        if number == 0 and model.objective is None and not is_mapping and not model.by_hidden:
            _check_output_of_pair(model, *content)
        loss, outputs = (model(content), None) if model.by_hidden else model(content, with_outputs=True)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            raise _refuse("the loss", describe(loss), "a scalar: the sum over the targets")
        if number == 0 and model.objective is None and is_mapping and model.has_own_loss:
            _find_shift(model, float(loss), outputs, content)


def _check_sum(model: ModelWithLoss, batch: StepBatch) -> None:
    """Checks that a caller's loss is a sum over the targets: of rows given twice, a mean is the same."""
    if isinstance(model.loss_fn, CrossEntropy) and not model.trims:
        return
    rows = range(max(min(batch.rows, batch.size // batch.num_micro_batches) // 2, 1))
    try:
        parts = [take_rows(batch.content, batch.size, [*rows] * times) for times in (1, 2)]
        counts, losses = [int(model.num_targets(part)) for part in parts], [float(model(part)) for part in parts]
    except Exception:  # this batch cannot be cut, or this model takes one size only
        return
    if counts[1] == 2 * counts[0] and losses[0] and abs(losses[1] / losses[0] - 1) < 0.01:
        found = "has the same value for rows given twice as for the rows themselves, as a mean has"
        advice = 'Return the sum, by reduction="sum". It is divided once, by the targets of the whole step.'
        raise _refuse("the loss", found, "the sum over the targets", advice)


def _check_output_of_pair(model: ModelWithLoss, inputs: Any, targets: Tensor) -> None:
    """Checks what the model returns for one sample, and whether it wants its targets."""
    size = len(targets)
    inputs, targets = (take_rows(each, size, slice(1)) for each in (inputs, targets))
    output = model.call(inputs, targets)
    is_short = logits_of(output).shape[:-1] != targets.shape
    if is_short and "targets" in inspect.signature(model.model.forward).parameters:
        model.gives_targets = True  # as nanoGPT's model, which otherwise computes the last logits only
        output = model.call(inputs, targets)
    elif further := _further_losses(output, model.model):
        allowed = "none, which (inputs, targets) would leave out"
        advice = f"Give mappings with {LABELS!r}, which are trained on the model's own loss. {OBJECTIVE}"
        raise _refuse("the model's output", f"has further losses ({', '.join(further)})", allowed, advice)
    shape = tuple(logits_of(output).shape)
    if hasattr(model.loss_fn, "of_hidden") and shape[:-1] != tuple(targets.shape):
        allowed = f"logits of shape {(*targets.shape, 'classes')} for targets of shape {tuple(targets.shape)}"
        raise _refuse("the model's output", f"of shape {shape}", allowed, OBJECTIVE)


def _further_losses(output: Any, model: nn.Module) -> list[str]:
    """Returns the losses in an output that `ModelWithLoss` would leave out."""
    if isinstance(output, (tuple, list)):
        return ["a scalar" for entry in output if isinstance(entry, Tensor) and not entry.ndim]
    names = list(output) if isinstance(output, Mapping) else list(getattr(output, "__dict__", ()))
    known = "aux_loss" if hasattr(model, "router_aux_loss_coef") else ""
    losses = [name for name in names if str(name).endswith("loss") and name != known]
    return [name for name in losses if entry_of(output, name) is not None]


def _find_shift(model: ModelWithLoss, loss: float, output: Any, batch: Mapping[str, Any]) -> None:
    """Finds out whether the model shifts labels, if its loss is the cross entropy of its logits with or without."""
    logits, labels = entry_of(output, "logits"), batch.get(LABELS)
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or logits.shape[:-1] != labels.shape:
        return
    if labels.ndim < 2 or labels.is_floating_point():
        return
    given, errors = int(model.num_targets(batch)), []
    for x, y in ((logits, labels), (logits[:, :-1], labels[:, 1:])):
        total = float(F.cross_entropy(x.float().flatten(0, -2), y.flatten(), reduction="sum"))
        count = max(int((y != IGNORE_INDEX).sum()), 1)
        # The model divides by the count that it is given, or by its own.
        errors.append(min(abs(loss - total), abs(loss - total / count * given)) / max(total, 1e-9))
    if min(errors) < 1e-4 and min(errors) * 10 < max(errors):
        model.shifts = errors[1] < errors[0]


def _copies(model: ModelWithLoss, batch: Any) -> Iterator[str]:
    """Yields a warning if the targets are the inputs, or were shifted twice."""
    is_mapping = isinstance(batch, Mapping)
    inputs, targets = (batch.get("input_ids"), batch.get(LABELS)) if is_mapping else (batch[0], batch[-1])
    found = [each for each in (inputs, targets) if isinstance(each, Tensor) and each.ndim > 1]
    if model.objective is not None or len(found) < 2 or inputs.shape != targets.shape or inputs.is_floating_point():
        return

    def equal(x: Tensor, y: Tensor) -> bool:
        counted = y != IGNORE_INDEX
        return bool(counted.any()) and bool((x == y)[counted].all())

    shifts = is_mapping and model.has_own_loss and model.shifts
    if not shifts and equal(inputs, targets):
        yield (
            "the targets of the first batch equal its inputs, so the model learns to copy. To predict the next token, "
            "give the loader collate_fn=fundamentallm.shift_labels."
        )
    if shifts and equal(inputs[:, 1:], targets[:, :-1]):
        yield (
            "the labels of the first batch are the next tokens already, and this model shifts labels itself. Give it "
            "labels that equal input_ids."
        )


def _padding(model: nn.Module, collate_fn: Any) -> Iterator[str]:
    """Yields a warning if the collator pads with another token than the model expects."""
    tokenizer = getattr(collate_fn, "tokenizer", None) or getattr(collate_fn, "processing_class", None)
    given, expected = (getattr(each, "pad_token_id", None) for each in (tokenizer, getattr(model, "config", None)))
    if given is not None and expected is not None and given != expected:
        yield (
            f"the tokenizer pads with token {given}, and the model's config.pad_token_id is {expected}. Set "
            "model.config.pad_token_id = tokenizer.pad_token_id."
        )
