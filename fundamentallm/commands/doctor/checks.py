"""Checks of the parts of a run: data, model, loss, gradients."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fundamentallm.commands.doctor.case import (
    Case,
    Finding,
    counted,
    distance,
    draws_random_numbers,
    listed,
    tolerance,
    within,
)
from fundamentallm.commands.trial import forward_rows, without_dropout
from fundamentallm.config.schema import IGNORE_INDEX
from fundamentallm.data.sampler import derive_seed
from fundamentallm.distributed.dtensor import seed_device


def check_data(case: Case) -> Finding:
    """A sample is the same whenever, and after whatever, it is read."""
    trainer, read = case.make(), 0
    for part, loader in (("training", trainer.train_loader), ("validation", trainer.val_loader)):
        if loader is None:
            continue
        last = len(loader.dataset) - 1  # type: ignore[arg-type]
        indices = sorted({0, last // 2, last, *(trainer.samples.batch(0)[:6] if part == "training" else ())})
        once, again = _read(loader, indices, seed=1), _read(loader, indices, seed=1)
        elsewhere = _read(loader, indices[::-1], seed=2)
        for index in indices:
            cause = ""
            if not _same(once[index], again[index]):
                cause = (
                    "changes with every read: the dataset (or collate_fn) draws from a generator of its own, or counts"
                )
            elif not _same(once[index], elsewhere[index]):
                cause = (
                    "depends on what was drawn or read before: the dataset (or collate_fn) draws from a global random "
                    "state (torch's, numpy's or python's)"
                )
            if cause:
                return Finding(
                    "fail",
                    f"{part} sample {index} {cause}",
                    "Then no restart and no other number of processes sees the same data. Derive its randomness from "
                    "(seed, index), as in np.random.default_rng((seed, index)).",
                )
        read += len(indices)
    return Finding("pass", f"{read} samples read three times, in two orders: the same each time")


def _read(loader: DataLoader[Any], indices: Sequence[int], seed: int) -> dict[int, Any]:
    """Samples by index, each collated by itself as the DataLoader would; global generators in a state of their own."""
    _seed_globals(seed)
    many: Any = getattr(loader.dataset, "__getitems__", None)
    return {index: loader.collate_fn(many([index]) if many else [loader.dataset[index]]) for index in indices}


def _seed_globals(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def check_model(case: Case) -> Finding:
    """The same config gives the same weights; these, a batch and a seed the same loss and gradients, and in
    evaluation mode they need no seed.
    """
    _seed_globals(1)
    weights = {name: tensor.clone() for name, tensor in case.make().model.state_dict().items()}
    _seed_globals(2)
    trainer = case.make()
    if names := [name for name, now in trainer.model.state_dict().items() if not torch.equal(now, weights[name])]:
        return Finding(
            "fail",
            f"made twice, the model has other initial weights in {listed(names)}",
            "Call torch.manual_seed(config.training.seed) just before the model is made.",
        )
    inputs, targets = forward_rows(trainer)
    trainer.model_with_loss.train()
    losses, gradients = [], []
    for _ in range(3):
        trainer.model.load_state_dict(weights)
        trainer.model.zero_grad()
        seed_device(derive_seed(trainer.config.training.seed, 0, 0), inputs.device)
        loss = trainer.model_with_loss(inputs, targets) / (targets != IGNORE_INDEX).sum().clamp(min=1)
        trainer.accelerator.backward(loss)
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
    if not np.isfinite(losses).all():
        return Finding("fail", f"the loss of the first batch is {losses[0]}", "Check the data and the initial weights.")
    if len(set(losses)) > 1:
        return Finding(
            "fail",
            f"the same weights, batch and seed give the losses {' and '.join(map(str, losses[:2]))}",
            "The model has randomness that torch's seeded generator does not govern (python's random, numpy, a "
            "generator of its own, the clock), or remembers calls outside its state_dict(). Draw with torch's own "
            "functions, which the trainer seeds for each step.",
        )
    names = [name for name in gradients[0] if any(not torch.equal(gradients[0][name], g[name]) for g in gradients)]
    if names:
        return Finding(
            "fail",
            f"the same loss has other gradients the second time, in {listed(names)}",
            f"An operation's backward pass is not deterministic on {inputs.device.type}. "
            "torch.use_deterministic_algorithms(True) names it, or replaces it.",
        )
    trainer.model_with_loss.eval()
    evaluated = []
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            evaluated.append(trainer.model_with_loss(inputs, targets).item())
    if len(set(evaluated)) > 1:
        return Finding(
            "fail",
            f"in evaluation mode the same weights and batch give {' and '.join(map(str, evaluated[:2]))}",
            "The model draws random numbers in evaluation mode, so that validation is a matter of luck. The usual "
            "cause: F.dropout(x, p) without training=self.training.",
        )
    return Finding("pass", "three passes over one batch: loss and gradients equal to the bit")


def check_loss(case: Case) -> Finding:
    """The loss is a sum over targets: over rows [a; b] it is that over a and that over b."""
    trainer = case.make(dropout=False)
    inputs, targets = forward_rows(trainer, max(2, min(8, trainer.samples.micro_batch_size)))
    if len(targets) < 2:
        return Finding("skipped", "the training data has a single sample")
    cut = max(1, len(targets) // 3)
    rows, counts = torch.tensor([cut, len(targets) - cut]), torch.tensor([
        (part != IGNORE_INDEX).sum() for part in (targets[:cut], targets[cut:])
    ])  # fmt: skip
    error = 0.0
    with without_dropout(trainer.model), torch.no_grad():
        stochastic = draws_random_numbers(trainer, inputs, targets)
        for mode in ("evaluation",) if stochastic else ("evaluation", "training"):
            trainer.model_with_loss.train(mode == "training")
            whole, a, b = (
                trainer.model_with_loss(inputs[s], targets[s]).double().cpu()
                for s in (slice(None), slice(cut), slice(cut, None))
            )
            parts = torch.stack((a, b))
            if whole.dim():
                shape = tuple(whole.shape)
                return Finding("fail", f"the loss has shape {shape}", "Return the sum over targets, a scalar.")
            error = max(error, distance(whole, parts.sum()))
            if error <= tolerance(trainer, 1e-5):
                continue
            if any(distance(whole, (parts * n).sum() / n.sum()) <= tolerance(trainer, 1e-5) for n in (rows, counts)):
                return Finding(
                    "fail",
                    f"the loss returns a mean: {whole:.4f} over {len(targets)} rows, {a:.4f} and {b:.4f} over parts",
                    "Return the sum over targets (reduction='sum'): the trainer divides once, by the number of targets "
                    "of the whole step over all micro-batches and processes.",
                )
            return Finding(
                "fail",
                f"in {mode} mode the loss over {len(targets)} rows is {whole:.4f}, and {parts.sum():.4f} when "
                "computed in two parts",
                "Rows must not influence each other: no batch normalisation and no statistics over the batch in the "
                "model (LayerNorm and RMSNorm are fine), and no division in the loss.",
            )
        nothing = trainer.model_with_loss(inputs, torch.full_like(targets, IGNORE_INDEX)).item()
    if nothing != 0:
        return Finding(
            "fail",
            f"the loss of a batch without targets (all {IGNORE_INDEX}) is {nothing}",
            f"Leave targets of {IGNORE_INDEX} out of the sum, as F.cross_entropy(..., reduction='sum') does: the "
            "trainer masks with them what it repeats to fill up a process's share.",
        )
    return Finding("pass", f"the sum over targets: parts add up to the whole, {within(error)}")


def check_gradients(case: Case) -> Finding:
    """Within a few steps every trainable parameter gets a gradient that is not all zero."""
    seen = case.rehearsal
    if seen.without_gradient:
        return Finding(
            "fail",
            f"no gradient in {counted(seen.steps, 'step')} reached {listed(seen.without_gradient)}",
            "Use them in the forward pass (no detach() or no_grad() on the way), remove them, or freeze them with "
            "requires_grad_(False): they do not learn, and several processes refuse to run.",
        )
    return Finding("pass", f"every trainable parameter got one within {counted(seen.steps, 'step')}")
