"""Losses: modules that map (logits, targets) to the SUM over target tokens, in float32.

The trainer divides the sum once, by the number of targets of the whole optimizer step. In evaluation mode each loss is
plain cross entropy, so that validation losses are comparable between runs and perplexity is right.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fundamentallm.config.registry import resolve, unknown_options
from fundamentallm.config.schema import CHUNK, IGNORE_INDEX, LARGE_VOCABULARY, LOSS_NAMES, TrainingConfig
from fundamentallm.config.validation import FRACTION, NON_NEGATIVE, Interval
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.models.with_loss import Objective


class CrossEntropy(nn.Module):
    """Negative log-likelihood of the targets, in nats."""

    def __init__(self) -> None:  # nn.Module's signature would accept any options
        super().__init__()

    def of_hidden(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss of the logits `hidden` (..., D) times `weight` (V, D), in chunks of tokens if V is large.

        With a large vocabulary, logits, log-probabilities and their gradients take most of the memory. In float32,
        torch computes the gradients of a chunk together with its loss (since 2.13). Otherwise the logits of a chunk are
        recomputed in the backward pass. A loss that is not ours gets all logits, since it may combine tokens. So does a
        compiler, which fuses these operations.
        """
        hidden, targets = hidden.flatten(0, -2), targets.flatten()
        is_small = len(weight) < LARGE_VOCABULARY or len(hidden) <= CHUNK
        if is_small or type(self) not in LOSSES.values() or torch.compiler.is_compiling():
            return self(F.linear(hidden, weight), targets)  # type: ignore[no-any-return]
        learns = torch.is_grad_enabled()
        # torch's function accumulates in the precision of its input, and 16 bits are too few.
        is_wide = hidden.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(hidden.device.type)
        if learns and type(self) is CrossEntropy and is_wide and hasattr(F, "linear_cross_entropy"):
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
        return self.objective(logits, targets) if self.training else _nll(logits, targets)

    def objective(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What training minimises; logits (N, V), targets (N,)."""
        return _nll(logits, targets)


class LabelSmoothing(CrossEntropy):
    """Cross entropy towards 1 - smoothing on the target and smoothing spread over all (arXiv:1512.00567)."""

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        self.smoothing = _checked("smoothing", smoothing, FRACTION)

    def objective(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Smoothed cross entropy."""
        return _nll(logits, targets, label_smoothing=self.smoothing)


class Focal(CrossEntropy):
    """(1 - p)^gamma times cross entropy, with p the target's probability (arXiv:1708.02002)."""

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = _checked("gamma", gamma, NON_NEGATIVE)

    def objective(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Focal loss."""
        nll = _nll(logits, targets, reduction="none")  # 0 for ignored targets
        # expm1 keeps 1 - p exact for p near 1; at 1 - p = 0 a power below 1 has an infinite slope.
        return ((-(-nll).expm1()).clamp(min=torch.finfo(nll.dtype).tiny) ** self.gamma * nll).sum()


class ZLoss(CrossEntropy):
    """Cross entropy plus weight * log(Z)^2, which keeps the logits from drifting (PaLM, arXiv:2204.02311)."""

    def __init__(self, weight: float = 1e-4) -> None:
        super().__init__()
        self.weight = _checked("weight", weight, NON_NEGATIVE)

    def objective(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy with z-loss."""
        log_z_squared = logits.logsumexp(-1).square()
        # Boolean indexing would make the host wait for the number of targets.
        return _nll(logits, targets) + self.weight * log_z_squared.where(targets != IGNORE_INDEX, 0.0).sum()


def _nll(logits: Tensor, targets: Tensor, reduction: str = "sum", **options: Any) -> Tensor:
    return F.cross_entropy(logits, targets, reduction=reduction, ignore_index=IGNORE_INDEX, **options)


def _checked(name: str, value: Any, allowed: Interval) -> float:
    if value not in allowed:
        raise ConfigError(Problem(f"loss_options.{name}", value, str(allowed)))
    return float(value)


LOSSES = dict(zip(LOSS_NAMES, (CrossEntropy, LabelSmoothing, Focal, ZLoss), strict=True))


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
    made_by = resolve("loss", loss_type, LOSSES)
    if problems := unknown_options("loss_options", loss_type, options, inspect.signature(made_by).parameters):
        raise ConfigError(problems)
    return made_by(**options)  # type: ignore[no-any-return]


def make_objective(
    config: TrainingConfig, loss_fn: Any = None, objective: Objective | None = None
) -> tuple[Any, Objective | None]:
    """Returns the loss function, and the objective that replaces it, if there is one: the caller's, or the config's.

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
