"""Checks the first batch, and what the model makes of it, before the first step."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from fundamentallm.config.schema import IGNORE_INDEX
from fundamentallm.data.loaders import device_batches
from fundamentallm.data.sampler import StepSampler
from fundamentallm.distributed.batches import LABELS, StepBatch, take_rows
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.models.transformer import Transformer
from fundamentallm.models.with_loss import OBJECTIVE, ModelWithLoss, OwnLoss, PairLoss, describe, logits_of
from fundamentallm.training.guard import copied_buffers
from fundamentallm.training.loss import SummedLoss, cross_entropy

MAX_BATCHES_WITHOUT_TARGETS = 100  # are read before a loader is refused
MIXED = 0.1  # a larger fraction of a text's effect on the next one is more than rounding
# Losses of which torch would compare each of (N, 1) outputs with each of (N,) targets.
DISTANCES = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)


def _refuse(name: str, found: str, allowed: str, advice: str = "") -> ConfigError:
    return ConfigError(Problem(name, found, allowed, advice, text=found))


class CheckedArguments(TorchFunctionMode):
    """Checks what embeddings and losses are given, before a kernel sees it: on a GPU, a wrong index is fatal."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {parameter: name for name, parameter in model.named_parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.embedding, F.cross_entropy, F.nll_loss, *DISTANCES):
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            inputs: Tensor = given["input"]
            targets: Any = given.get("target")
            if func is F.embedding:
                rows = f"the rows of {self.names.get(given['weight'], 'an embedding')}"
                advice = "Check that the tokenizer is the model's, and that samples fit into the model's context."
                _check_indices("inputs", inputs, len(given["weight"]), rows, advice)
            elif func in DISTANCES:
                if inputs.numel() == targets.numel():
                    _check_shape(targets, inputs.shape, inputs, "Use outputs.squeeze(-1).")
            elif not (targets.is_floating_point() and targets.shape == inputs.shape):  # not probabilities
                if inputs.ndim > 1:
                    _check_shape(targets, inputs.shape[:1] + inputs.shape[2:], inputs, OBJECTIVE)
                targets = targets[targets != given.get("ignore_index", IGNORE_INDEX)]
                advice = f"Use targets.long(), a model with more classes, or {IGNORE_INDEX} to leave targets out."
                _check_indices("targets", targets, inputs.shape[inputs.ndim > 1], "the model's classes", advice)
        return func(*args, **kwargs)


def _check_shape(targets: Tensor, allowed: torch.Size, outputs: Tensor, advice: str) -> None:
    if targets.shape != allowed:
        fact = f"{tuple(allowed)}, for outputs of shape {tuple(outputs.shape)}"
        raise _refuse("targets", f"of shape {tuple(targets.shape)}", fact, advice)


def _check_indices(name: str, indices: Tensor, size: int, meaning: str, advice: str) -> None:
    allowed = f"integers, 0 to {size - 1}, {meaning}"
    if indices.is_floating_point():
        raise _refuse(name, f"{indices.dtype}", allowed, advice)
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise _refuse(name, f"{int(indices.min())} to {int(indices.max())}", allowed, advice)


@contextmanager
def restored(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Set random numbers, buffers and training modes back on exit."""
    buffers = copied_buffers(model.modules())
    modes = [(module, module.training) for module in model.modules()]
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            yield
        finally:
            for module, name, buffer, before in buffers:
                buffer.copy_(before)
                setattr(module, name, buffer)  # a forward pass may have replaced it
            for module, mode in modes:
                module.training = mode


class FirstBatches:
    """Loads batches. The first one of each loader that has targets is checked, by a forward pass in evaluation mode.

    If a check fails on one process of `group`, it fails on all. `say` prints a warning.
    """

    def __init__(
        self, model: ModelWithLoss, accelerator: Accelerator, group: HostGroup, say: Callable[[str], None]
    ) -> None:
        self.model, self.accelerator, self.group, self.say = model, accelerator, group, say
        self._checked: list[DataLoader[Any]] = []

    def load(self, loader: DataLoader[Any], samples: StepSampler, start: int, stop: int) -> Iterator[StepBatch]:
        """Yields `device_batches`. Raises ConfigError if batch or output do not fit, or no batch has targets."""
        device = self.accelerator.device
        for batch in device_batches(loader, samples, start, stop, device):
            if loader not in self._checked:
                self._checked.append(loader)
                later = device_batches(loader, samples, start + 1, stop, device)
                self._check(self._first_with_targets(itertools.chain([batch], later)), loader)
            yield batch

    def _first_with_targets(self, batches: Iterator[StepBatch]) -> StepBatch:
        for batch in itertools.islice(batches, MAX_BATCHES_WITHOUT_TARGETS):
            with self.group.barrier_with_errors():
                count = self.model.count(batch)
            if self.accelerator.reduce(count, "sum") > 0:
                return batch
        advice = f"Check what is masked with {IGNORE_INDEX}, and whether prompts fill the sequence length."
        reason = f"in the first {MAX_BATCHES_WITHOUT_TARGETS} batches"
        raise ConfigError(Problem("the number of targets", 0, "at least 1", advice, reason))

    @torch.no_grad()
    def _check(self, batch: StepBatch, loader: DataLoader[Any]) -> None:
        model, accelerator = self.model, self.accelerator
        # Under FSDP2 a process that fails in its forward pass must end: the others wait for its shards.
        exchange = nullcontext() if accelerator.is_fsdp2 else self.group.barrier_with_errors()
        shifts: list[bool | None] = []
        with (
            restored(model, accelerator.device),
            torch.compiler.set_stance("force_eager"),
            CheckedArguments(model.model),
            exchange,
            accelerator.autocast(),
        ):
            model.eval()
            if getattr(loader.dataset, "is_packed", False):
                _check_packing(model, next(batch.micro_batches()).content)
            objective = model.objective(batch.own)
            if isinstance(objective, OwnLoss):
                _check_mapping(model, objective, batch.own)
            elif isinstance(objective, PairLoss) and not objective.by_hidden:
                _check_output(model.model, objective, batch.own)
            for content, _ in batch.micro_batches(model.trims):
                loss = model(content)
                if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
                    raise _refuse("the loss", describe(loss), "a scalar: the sum over the targets")
                if isinstance(objective, OwnLoss):
                    shifts.append(_find_shift(model, objective, content))
            _check_sum(model, batch)
        # The targets of one process may not show it, and all have to count alike.
        if known := [each for found in self.group.all_gather(shifts) for each in found if each is not None]:
            model.of_mappings.shifts = known[0]
        self._warn(batch.own, loader.collate_fn)

    def _warn(self, batch: Any, collate_fn: Any) -> None:
        """Prints what the run would silently train on."""
        model, objective = self.model.model, self.model.objective(batch)
        tokenizer = getattr(collate_fn, "tokenizer", None) or getattr(collate_fn, "processing_class", None)
        own, given = (getattr(each, "pad_token_id", None) for each in (getattr(model, "config", None), tokenizer))
        if None not in (own, given) and own != given:
            self.say(
                f"warning: model.config.pad_token_id is {own}, and the tokenizer pads with {given}; set it to that."
            )
        shifts = False
        inputs, targets = batch if isinstance(objective, PairLoss) else (None, None)
        if isinstance(objective, OwnLoss):
            inputs, targets = batch.get("input_ids"), batch.get(LABELS)
            shifts = objective.shifts
            if names := ", ".join(map(str, objective.unused(batch))):
                what = f"{type(model).__name__}.forward does not take {names} of the batch"
                self.say(f"warning: {what}. Rename them in collate_fn if it should take them.")
        if not _are_indices(inputs) or not _are_indices(targets) or inputs.shape != targets.shape:
            return
        if shifts:
            inputs, targets = inputs[:, 1:], targets[:, :-1]
        counted = targets != IGNORE_INDEX
        if counted.any() and (inputs == targets)[counted].all():
            what = "the first batch's labels are the next tokens, and this model shifts labels itself: use input_ids"
            if not shifts:
                what = "the first batch's targets equal its inputs: use collate_fn=fundamentallm.shift_labels"
            self.say(f"warning: {what}, or the model learns another task than the next token.")


def _check_mapping(model: ModelWithLoss, objective: OwnLoss, batch: Mapping[str, Any]) -> None:
    """Checks that no loss is given beside the model's own, and that no attention mask hides a whole sample."""
    minimised = getattr(model.loss_fn, "minimised", type(model.loss_fn))
    if objective.computes_loss and minimised is not cross_entropy:
        allowed = f"cross_entropy, since {type(model.model).__name__} computes its own loss"
        raise _refuse("training.loss", minimised.__name__, allowed, OBJECTIVE)
    for key, mask in batch.items():
        is_mask = str(key).endswith("attention_mask") and isinstance(mask, Tensor) and mask.ndim == 2
        if is_mask and (hidden := (mask == 0).all(1)).any():
            found = f"hides every token of sample {int(hidden.int().argmax())} of the batch"
            raise _refuse(f"batch[{key!r}]", found, "at least one token", "Leave empty samples out of the dataset.")


def _check_packing(model: ModelWithLoss, batch: Any) -> None:
    """Refuses a model that computes a sample in a packed window otherwise than alone."""
    (inputs, targets), name = batch, type(model.model).__name__
    ids = inputs["input_ids"]
    half = ids.shape[1] // 2
    if half == 0 or isinstance(model.model, Transformer):  # which is exact, and whose logits may be too large
        return
    if unused := model.of_mappings.unused(inputs):
        reason = f"and {name}.forward does not take {' and '.join(unused)}, by which packed samples are kept apart"
        raise ConfigError(Problem("data.packing", True, "false", reason=reason))
    # Two documents in each row, of any tokens: the first one changes, or is the same as the second.
    rows = ids[:, : 2 * half], ids[:, half : 2 * half].repeat(1, 2)

    def differences(length: int) -> Tensor:
        positions = (torch.arange(2 * half, device=ids.device) % length).expand_as(rows[0])
        given = ({"input_ids": each, "position_ids": positions} for each in rows)
        one, other = (logits_of(model.of_pairs.output(model.model, each, targets)) for each in given)
        first, second = other.chunk(2, dim=1)
        # In float32, whose range the sum of their squares needs.
        pairs = (one[:, half:], second), (first, second)
        return torch.stack([torch.linalg.vector_norm(a - b, dtype=torch.float32) for a, b in pairs])

    # Compared with the same of one document, so that a small effect is not taken for the rounding of bfloat16.
    if not (differences(half) <= MIXED * differences(2 * half)).all():
        reason = f"and {name} mixes packed samples: the logits of one depend on those before it"
        raise ConfigError(Problem("data.packing", True, "false", reason=reason))


def _check_output(model: nn.Module, objective: PairLoss, batch: Any) -> None:
    """Checks whether a model wants its targets, and whether its output has losses that `PairLoss` would leave out."""
    inputs, targets = take_rows(batch, len(batch[1]), slice(1))
    output = objective.output(model, inputs, targets)
    takes_targets = "targets" in inspect.signature(model.forward).parameters
    if takes_targets and logits_of(output).shape[:-1] != targets.shape:
        objective.gives_targets = True  # as nanoGPT's model, which otherwise computes the last logits only
        return
    if isinstance(output, (tuple, list)):
        losses = ["a scalar" for entry in output if isinstance(entry, Tensor) and not entry.ndim]
    else:
        entries = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
        losses = [name for name, entry in entries.items() if str(name).endswith("loss") and entry is not None]
    if losses and not (losses == ["aux_loss"] and hasattr(model, "router_aux_loss_coef")):
        allowed = "none, which (inputs, targets) would leave out"
        advice = f"Give mappings with {LABELS!r}, which are trained on the model's own loss. {OBJECTIVE}"
        raise _refuse("the model's output", f"has further losses ({', '.join(losses)})", allowed, advice)


def _find_shift(model: ModelWithLoss, objective: OwnLoss, batch: Mapping[str, Any]) -> bool | None:
    """Returns whether the model's own loss leaves out the first label of each row; None if it does not show."""
    labels = batch.get(LABELS)
    if objective.shifts or not objective.computes_loss or not _are_indices(labels):
        return None
    losses = []
    for column in (slice(0), slice(1), slice(-1, None)):  # with other labels in no column, the first, the last
        others = labels.clone()
        others[:, column] = (labels[:, column] == 0).long()
        given = {**batch, LABELS: others}
        losses.append(float(model(given)) / max(int(model.num_targets(given)), 1))
    # The count of the targets may differ, and with it the rounding.
    as_first, as_last = (math.isclose(losses[0], other, rel_tol=1e-6) for other in losses[1:])
    return None if as_last else as_first


def _are_indices(labels: Any) -> TypeGuard[Tensor]:
    return isinstance(labels, Tensor) and labels.ndim > 1 and not labels.is_floating_point()


def _check_sum(model: ModelWithLoss, batch: StepBatch) -> None:
    """Checks that a caller's loss is a sum over the targets: of rows given twice, a mean is the same."""
    if isinstance(model.loss_fn, SummedLoss) and not model.trims:
        return
    rows = [*range(max(batch.rows // batch.num_micro_batches // 2, 1))]
    try:
        once, twice = (take_rows(batch.content, batch.size, rows * times) for times in (1, 2))
        is_doubled = model.num_targets(twice) == 2 * model.num_targets(once)
        before, after = float(model(once)), float(model(twice))
    except Exception:  # this batch cannot be cut, or this model takes one size only
        return
    if is_doubled and before and abs(after / before - 1) < 0.01:
        found = "has the same value for rows given twice, as a mean has"
        raise _refuse("the loss", found, "the sum over the targets", 'Return the sum, by reduction="sum".')
