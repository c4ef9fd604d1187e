"""Checks of the first batch and the first output, before the first step: shapes, types, ranges, and known traps.

A run without them would end in an error of torch that names no setting, on a GPU in a device assert, or would train on
something else than its author means, without a word.
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
from fundamentallm.models.with_loss import ModelWithLoss, describe, entry_of, logits_of
from fundamentallm.training.loss import CrossEntropy
from fundamentallm.training.micro_batch import restored

MOST_WITHOUT_TARGETS = 100
"""Batches without any target that are looked at before a loader is refused."""


DISTANCES = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
CHECKED = (F.embedding, F.cross_entropy, F.nll_loss, *DISTANCES)


class CheckedRanges(TorchFunctionMode):
    """Checks what embeddings and cross entropies are given, before a kernel sees it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {parameter: name for name, parameter in model.named_parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check the arguments of the functions that look up by an index, and call the function."""
        kwargs = kwargs or {}
        if func in CHECKED:
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            if func is F.embedding:
                self._check_lookup(given["input"], given["weight"])
            elif func in DISTANCES:
                _check_shapes(given["input"], given["target"])
            else:
                _check_targets(given["input"], given["target"], given.get("ignore_index", IGNORE_INDEX))
        return func(*args, **kwargs)

    def _check_lookup(self, ids: Tensor, weight: Tensor) -> None:
        name = self.names.get(weight, "an embedding")  # type: ignore[call-overload]
        if ids.dtype not in (torch.int64, torch.int32):
            advice = "Give token ids as integers, such as ids.long()."
            raise ConfigError(Problem("inputs", ids.dtype, f"integers, which {name} looks up", advice))
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(weight):
            advice = (
                "Check that the tokenizer is the model's, that samples are no longer than the model's context, or give "
                "the model more rows (resize_token_embeddings in transformers)."
            )
            found = f"from {int(ids.min())} to {int(ids.max())}"
            raise ConfigError(Problem("inputs", found, f"0 to {len(weight) - 1}, the rows of {name}", advice))


def _check_shapes(outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape != targets.shape:  # torch would compare each with each
        advice = "Give both one shape, by outputs.squeeze(-1) or targets.unsqueeze(-1)."
        found = f"of shape {tuple(targets.shape)}"
        raise ConfigError(Problem("targets", found, f"{tuple(outputs.shape)}, that of the outputs", advice))


def _check_targets(logits: Tensor, targets: Tensor, ignored: int) -> None:
    shape, classes = tuple(logits.shape), logits.shape[1 if logits.ndim > 1 else 0]
    if targets.is_floating_point():
        if targets.shape != logits.shape:
            advice = "Give class indices as integers (targets.long()), or set training.loss to a loss for numbers."
            raise ConfigError(Problem("targets", targets.dtype, "integers for a cross entropy", advice))
        return
    if targets.dtype not in (torch.int64, torch.uint8):
        raise ConfigError(Problem("targets", targets.dtype, "torch.int64", "Convert them: targets.long()."))
    if targets.shape != (*shape[:1], *shape[2:]) if logits.ndim > 1 else targets.ndim:
        raise ConfigError(Problem("targets", f"of shape {tuple(targets.shape)}", f"one for each logits of {shape}"))
    counted = targets[targets != ignored]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < classes:
        advice = f"Give the model as many classes as there are, or {IGNORE_INDEX} for targets that do not count."
        found = f"from {int(counted.min())} to {int(counted.max())}"
        raise ConfigError(Problem("targets", found, f"0 to {classes - 1}, the model's {classes} classes", advice))


class FirstBatches:
    """Checks the first batch of each loader, and the model's output for it, by one forward pass in evaluation mode.

    Args:
        model: model and objective, not wrapped.
        accelerator: adds up the number of targets.
        group: the processes, which all fail if one does.
        say: prints a sentence about what is allowed and hardly ever meant.
    """

    def __init__(
        self, model: ModelWithLoss, accelerator: Accelerator, group: HostGroup, say: Callable[[str], None]
    ) -> None:
        self.model, self.accelerator, self.group, self.say = model, accelerator, group, say
        self._checked: list[DataLoader[Any]] = []

    def load(
        self, loader: DataLoader[Any], samples: StepSampler, start: int, stop: int, needs_targets: bool = False
    ) -> Iterator[StepBatch]:
        """Yields `device_batches`, and checks the first one of each loader.

        Args:
            loader: loads the batches.
            samples: which samples they have.
            start: first step.
            stop: the step after the last.
            needs_targets: whether a loader without any target is an error.

        Raises:
            ConfigError: if a batch or the output does not fit the objective.
        """
        device = self.accelerator.device
        for batch in device_batches(loader, samples, start, stop, device):
            if not any(loader is each for each in self._checked):
                self._checked.append(loader)
                self._check(loader, batch)
                if needs_targets:
                    later = device_batches(loader, samples, start + 1, stop, device)
                    self._check_targets(itertools.chain([batch], later))
            yield batch

    @torch.no_grad()
    def _check(self, loader: DataLoader[Any], batch: StepBatch) -> None:
        model, accelerator, group = self.model, self.accelerator, self.group
        with group.barrier_with_errors():
            _check_batch(model, batch.own)
        # Under FSDP2 a process that fails in its forward pass must end: the others wait for its shards.
        with restored(model, accelerator.device), torch.compiler.set_stance("force_eager"), CheckedRanges(model.model):
            model.eval()
            with nullcontext() if accelerator.is_fsdp2 else group.barrier_with_errors():
                _check_output(model, batch)
        for line in (*_copied(model, batch.own), *_unlike_tokenizer(model.model, loader.collate_fn)):
            self.say(line)

    def _check_targets(self, batches: Iterator[StepBatch]) -> None:
        for batch in itertools.islice(batches, MOST_WITHOUT_TARGETS):
            if self.accelerator.reduce(self.model.count(batch), "sum") > 0:
                return
        advice = f"Check what is masked with {IGNORE_INDEX}, and whether prompts fill the whole sequence length."
        reason = f"in the first {MOST_WITHOUT_TARGETS} batches, or in all if there are fewer"
        raise ConfigError(Problem("the number of targets", 0, "at least 1", advice, reason))


def _check_output(model: ModelWithLoss, batch: StepBatch) -> None:
    first = next(batch.micro_batches(model.trims)).content
    is_pair = model.objective is None and not isinstance(first, Mapping)
    if is_pair and not model.by_hidden:
        _check_output_of_pair(model, *first)
    for number, (content, _) in enumerate(batch.micro_batches(model.trims)):
        loss, outputs = model(content, with_outputs=True) if not model.by_hidden else (model(content), None)
        if number == 0 and isinstance(content, Mapping) and model.objective is None and model.has_own_loss:
            _find_shift(model, float(loss), outputs, content)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            raise ConfigError(Problem("the loss", describe(loss), "a scalar: the sum over the targets"))


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
        advice = (
            f"Give mappings with {LABELS!r}, which are trained on the model's own loss, or say what to minimise: "
            "Trainer(objective=...)."
        )
        reason = "which (inputs, targets) would leave out"
        raise ConfigError(Problem("the model's output", f"one with {', '.join(further)}", "", advice, reason))
    shape = tuple(logits_of(output).shape)
    if hasattr(model.loss_fn, "of_hidden") and shape[:-1] != tuple(targets.shape):
        advice = "The last dimension of the logits is the classes; set training.loss to another loss if it is not."
        allowed = f"logits of shape {(*targets.shape, 'classes')} for targets of shape {tuple(targets.shape)}"
        raise ConfigError(Problem("the model's output", f"of shape {shape}", allowed, advice))


def _find_shift(model: ModelWithLoss, loss: float, output: Any, batch: Mapping[str, Any]) -> None:
    """Finds out whether the model shifts labels, if its loss is the cross entropy of its logits with or without."""
    logits, labels = entry_of(output, "logits"), batch.get(LABELS)
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or logits.shape[:-1] != labels.shape:
        return
    if labels.ndim < 2 or labels.is_floating_point():
        return
    count, errors = int(model.num_targets(batch)), []
    for x, y in ((logits, labels), (logits[:, :-1], labels[:, 1:])):
        total = float(F.cross_entropy(x.float().flatten(0, -2), y.flatten(), reduction="sum"))
        own = max(int((y != IGNORE_INDEX).sum()), 1)
        # The model divides by the count that it is given, or by its own.
        errors.append(min(abs(loss - total), abs(loss - total / own * count)) / max(total, 1e-9))
    if min(errors) < 1e-4 and min(errors) * 10 < max(errors):
        model.shifts = errors[1] < errors[0]


def _further_losses(output: Any, model: nn.Module) -> list[str]:
    """Returns the losses in an output that `ModelWithLoss` would leave out."""
    if isinstance(output, (tuple, list)):
        scalars = [entry for entry in output if isinstance(entry, Tensor) and not entry.ndim]
        return ["a scalar beside the logits"] if scalars else []
    names = list(output) if isinstance(output, Mapping) else list(vars(output)) if hasattr(output, "logits") else []
    known = "aux_loss" if hasattr(model, "router_aux_loss_coef") else ""
    return [
        name for name in names if str(name).endswith("loss") and name != known and entry_of(output, name) is not None
    ]


def _check_batch(model: ModelWithLoss, batch: Any) -> None:
    """Checks a batch by itself."""
    if not any(True for _ in tensors(batch)):
        raise ConfigError(Problem("batch", describe(batch), "tensors, in any nesting"))
    model.num_targets(batch)  # raises if the batch has none
    if isinstance(batch, Mapping) and model.objective is None:
        _check_mapping(model, batch)


def _check_mapping(model: ModelWithLoss, batch: Mapping[str, Any]) -> None:
    if model.has_own_loss and type(model.loss_fn) is not CrossEntropy:
        reason = f"and {type(model.model).__name__} computes its own loss from a batch with keys"
        advice = "Set training.loss to cross_entropy, or say what to minimise: Trainer(objective=...)."
        raise ConfigError(Problem("training.loss", type(model.loss_fn).__name__, advice=advice, reason=reason))
    if missing := [name for name in model.required if name not in batch]:
        advice = "Rename the entries in collate_fn, or say what to minimise: Trainer(objective=...)."
        allowed = f"a mapping with {', '.join(missing)}, which {type(model.model).__name__}.forward needs"
        raise ConfigError(Problem("batch", describe(batch), allowed, advice))
    for name, mask in batch.items():
        if str(name).endswith("attention_mask") and isinstance(mask, Tensor) and mask.ndim == 2:
            hidden = (mask == 0).all(dim=1).nonzero().flatten().tolist()
            if hidden:
                advice = "Leave empty samples out of the dataset."
                reason = f"and hides every token of sample {hidden[0]} of the first batch"
                raise ConfigError(Problem(f"batch[{name!r}]", "a mask", "at least one token a sample", advice, reason))


def _copied(model: ModelWithLoss, batch: Any) -> Iterator[str]:
    """Yields a warning if the targets are the inputs, or moved on twice."""
    if model.objective is not None:
        return
    is_mapping = isinstance(batch, Mapping)
    inputs, targets = (batch.get("input_ids"), batch.get(LABELS)) if is_mapping else batch
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor) or inputs.shape != targets.shape:
        return
    if inputs.is_floating_point() or inputs.ndim < 2 or inputs.shape[1] < 2:
        return

    def same(x: Tensor, y: Tensor) -> bool:
        counted = y != IGNORE_INDEX
        return bool(counted.any()) and bool((x == y)[counted].all())

    shifts = is_mapping and model.has_own_loss and model.shifts
    if not shifts and same(inputs, targets):
        yield (
            "warning: the targets of the first batch equal its inputs, so the model learns to copy. To predict the "
            "next token, give the loader collate_fn=fundamentallm.shift_labels."
        )
    if shifts and same(inputs[:, 1:], targets[:, :-1]):
        yield (
            "warning: the labels of the first batch are the next tokens already, and this model shifts labels itself. "
            "Give it labels that equal input_ids."
        )


def _unlike_tokenizer(model: nn.Module, collate_fn: Any) -> Iterator[str]:
    """Yields a warning if the collator pads with another token than the model expects."""
    tokenizer = getattr(collate_fn, "tokenizer", None) or getattr(collate_fn, "processing_class", None)
    ours, theirs = (getattr(each, "pad_token_id", None) for each in (tokenizer, getattr(model, "config", None)))
    if isinstance(ours, int) and ours != theirs and (theirs is not None or hasattr(model, "score")):
        yield (
            f"warning: the tokenizer pads with token {ours}, and the model's config.pad_token_id is {theirs}. Set "
            "model.config.pad_token_id = tokenizer.pad_token_id."
        )
