"""Losses of single tokens, windows over long texts, and the confidence interval of the mean loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fundamentallm.config.schema import CHUNK, IGNORE_INDEX
from fundamentallm.models.transformer import Transformer, cache_option

MIN_BLOCKS = 8
"""Minimum number of blocks of windows for a confidence interval."""


@torch.no_grad()
def score(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the negative log-likelihood, in nats, of each of `targets` (B, T) after `inputs` (B, T).

    It is 0 for targets of `IGNORE_INDEX`. The model has to be in evaluation mode. The logits of our `Transformer` are
    computed for some positions at a time, since those of a large vocabulary need much memory.
    """
    losses: list[Tensor] = []

    def add(logits: Tensor, wanted: Tensor) -> None:
        losses.append(F.cross_entropy(logits.float(), wanted, reduction="none", ignore_index=IGNORE_INDEX))

    def of_hidden(hidden: Tensor, weight: Tensor) -> Tensor:
        chunks = torch.split(hidden.flatten(0, 1), CHUNK), torch.split(targets.flatten(), CHUNK)
        for rows, wanted in zip(*chunks, strict=True):
            add(F.linear(rows, weight), wanted)
        return hidden

    if isinstance(model, Transformer):
        model(inputs, of_hidden)
    else:
        output = model(inputs, **cache_option(model, False))
        for rows, wanted in zip(output if isinstance(output, Tensor) else output.logits, targets, strict=True):
            add(rows, wanted)
    return torch.cat(losses).view(targets.shape)


class Window(NamedTuple):
    """A part of a text that the model sees at once: inputs [start, end), targets [start + 1, end + 1)."""

    start: int
    end: int
    counted: int
    """Number of its first targets that the previous window has counted."""


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Yield windows over a text in which every token but the first is a target that counts exactly once.

    Args:
        num_tokens: length of the text.
        context: maximum number of inputs of a window.
        stride: targets that each window adds. If it is the context, windows do not overlap, as in validation. If it is
            less, each later target has at least context - stride tokens before it.
    """
    done = 0
    while done < num_tokens - 1:
        end = min(done + (stride if done else context), num_tokens - 1)
        start = max(end - context, 0)
        yield Window(start, end, done - start)
        done = end


def interval(losses: Sequence[float], counts: Sequence[int], confidence: float) -> tuple[float, float] | None:
    """Returns the confidence interval of a text's mean loss, or None if the text is too short for one.

    Uses batch means: windows are not independent of their neighbours, so n of them are grouped into about sqrt(n)
    blocks of neighbours (Flegal and Jones, Annals of Statistics 38, 2010). The mean is the ratio of the blocks' summed
    losses to their summed targets, with the variance of such a ratio (Cochran, Sampling Techniques, 1977, chapter 6)
    and Student's distribution.

    Args:
        losses: summed over the targets of each window, in the order of the text.
        counts: targets of each window.
        confidence: probability that the interval contains the mean, such as 0.95.
    """
    if len(losses) < MIN_BLOCKS:
        return None
    blocks = max(math.isqrt(len(losses)), MIN_BLOCKS)
    totals, sizes = (
        np.array([part.sum() for part in np.array_split(np.asarray(values, dtype=np.float64), blocks)])
        for values in (losses, counts)
    )
    mean = totals.sum() / sizes.sum()
    error = math.sqrt(blocks / (blocks - 1) * ((totals - mean * sizes) ** 2).sum()) / sizes.sum()
    half = student_quantile((1 + confidence) / 2, blocks - 1) * error
    return float(mean - half), float(mean + half)


def student_quantile(probability: float, degrees: int) -> float:
    """Returns a quantile of Student's t distribution, within 0.1 % from 7 degrees of freedom up.

    Uses four terms of an asymptotic series (Abramowitz and Stegun, 26.7.5).
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / degrees**power for power, term in enumerate(terms, start=1)))
