"""Losses: modules that map (logits, targets) to the SUM over target tokens, in float32.

The trainer divides the sum once, by the number of targets of the whole optimizer step. In evaluation mode each loss is
plain cross entropy, so that validation losses are comparable between runs and perplexity is right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fundamentallm.config.registry import resolve, unknown_options
from fundamentallm.config.schema import CHUNK, IGNORE_INDEX, LARGE_VOCABULARY, LOSS_NAMES, TrainingConfig
from fundamentallm.config.validation import FRACTION, NON_NEGATIVE
from fundamentallm.errors import ConfigError, Problem, raise_all
from fundamentallm.models.with_loss import Objective

# What training minimises: of logits (N, V) in float32 and targets (N,), the sum over targets that count.

_nll = partial(F.cross_entropy, reduction="sum", ignore_index=IGNORE_INDEX)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of the targets, in nats."""
    return _nll(logits, targets)


def label_smoothing(logits: Tensor, targets: Tensor, smoothing: float = 0.1) -> Tensor:
    """Cross entropy towards 1 - smoothing on the target and smoothing spread over all (arXiv:1512.00567)."""
    return _nll(logits, targets, label_smoothing=smoothing)


def focal(logits: Tensor, targets: Tensor, gamma: float = 2.0) -> Tensor:
    """(1 - p)^gamma times cross entropy, with p the target's probability (arXiv:1708.02002)."""
    nll = _nll(logits, targets, reduction="none")  # 0 for ignored targets
    # expm1 keeps 1 - p exact for p near 1; at 1 - p = 0 a power below 1 has an infinite slope.
    return ((-(-nll).expm1()).clamp(min=torch.finfo(nll.dtype).tiny) ** gamma * nll).sum()


def z_loss(logits: Tensor, targets: Tensor, weight: float = 1e-4) -> Tensor:
    """Cross entropy plus weight * log(Z)^2, which keeps the logits from drifting (PaLM, arXiv:2204.02311)."""
    log_z_squared = logits.logsumexp(-1).square()
    # Boolean indexing would make the host wait for the number of targets.
    return _nll(logits, targets) + weight * log_z_squared.where(targets != IGNORE_INDEX, 0.0).sum()


LOSSES = dict(zip(LOSS_NAMES, (cross_entropy, label_smoothing, focal, z_loss), strict=True))
RANGES = {"smoothing": FRACTION, "gamma": NON_NEGATIVE, "weight": NON_NEGATIVE}


class SummedLoss(nn.Module):
    """A loss of this package: `minimised`, one of `LOSSES`, with its options."""

    def __init__(self, minimised: Callable[..., Tensor], **options: float) -> None:
        super().__init__()
        self.minimised, self.options = minimised, options

    def of_hidden(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss of the logits `hidden` (..., D) times `weight` (V, D), in chunks of tokens if V is large.

        With a large vocabulary, logits, log-probabilities and their gradients take most of the memory. In float32,
        torch computes the gradients of a chunk together with its loss (since 2.13). Otherwise the logits of a chunk are
        recomputed in the backward pass. A compiler gets all logits, since it fuses these operations.
        """
        hidden, targets = hidden.flatten(0, -2), targets.flatten()
        if len(weight) < LARGE_VOCABULARY or len(hidden) <= CHUNK or torch.compiler.is_compiling():
            return self(F.linear(hidden, weight), targets)  # type: ignore[no-any-return]
        learns = torch.is_grad_enabled() and self.minimised is cross_entropy
        # torch's function accumulates in the precision of its input, and 16 bits are too few.
        is_wide = hidden.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(hidden.device.type)
        if learns and is_wide and hasattr(F, "linear_cross_entropy"):
            chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK, chunking_method=None, acc_policy="compact")
            options: dict[str, Any] = {"reduction": "sum", "ignore_index": IGNORE_INDEX, "options": chunks}
            return F.linear_cross_entropy(hidden, weight, targets, **options)
        of_chunk = lambda hidden, targets: self(F.linear(hidden, weight), targets)  # noqa: E731
        total = torch.zeros((), device=hidden.device)
        for pair in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True):
            total = total + checkpoint(of_chunk, *pair, use_reentrant=False)
        return total

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum over the targets that are not `IGNORE_INDEX`; logits (..., V), targets (...); a scalar."""
        logits, targets = logits.float().flatten(0, -2), targets.flatten()
        return self.minimised(logits, targets, **self.options) if self.training else cross_entropy(logits, targets)


def create_loss(loss_type: str = "cross_entropy", **options: Any) -> nn.Module:
    """Returns a loss by name, or an instance of a 'module:name' class.

    Raises:
        ConfigError: if the name or an option is not known, or an option is outside its range.

    Examples:
        >>> import torch
        >>> from fundamentallm import create_loss
        >>> loss = create_loss("label_smoothing", smoothing=0.1)
        >>> logits, targets = torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [3, -100, -100]])
        >>> loss(logits, targets)  # log 4 for each of four targets; -100 is ignored
        tensor(5.5452)
    """
    named, ranges = resolve("loss", loss_type, LOSSES), RANGES if loss_type in LOSSES else {}
    known = [name for name in inspect.signature(named).parameters if name not in ("logits", "targets")]
    problems = unknown_options("loss_options", loss_type, options, known)
    wrong = [name for name, allowed in ranges.items() if name in options and options[name] not in allowed]
    problems += [Problem(f"loss_options.{name}", options[name], str(ranges[name])) for name in wrong]
    raise_all(problems)
    return SummedLoss(named, **options) if loss_type in LOSSES else named(**options)


def make_objective(
    config: TrainingConfig, loss_fn: Any = None, objective: Objective | None = None
) -> tuple[Any, Objective | None]:
    """Returns the loss function, and the objective that replaces it, if the caller or the config gives one.

    Raises ConfigError if an objective and a loss are given, or one of them has weights, which would not be trained.
    """
    if objective is None and config.objective is not None:
        objective = resolve("training.objective", config.objective, {})
        objective = objective() if isinstance(objective, type) else objective
    if objective is not None and (loss_fn is not None or config.loss != TrainingConfig.loss):
        raise ConfigError(Problem("training.objective", objective, "null", reason="and a loss is given too"))
    loss_fn = loss_fn or create_loss(config.loss, **config.loss_options)
    for name, part in (("loss", loss_fn), ("objective", objective)):
        if isinstance(part, nn.Module) and any(parameter.requires_grad for parameter in part.parameters()):
            advice = "Make its weights part of the model, or set requires_grad to False."
            raise ConfigError(Problem(f"training.{name}", part, advice=advice, reason="whose weights are not trained"))
    return loss_fn, objective
