"""How probable a model finds a text: losses of single tokens, windows over long texts, and how sure their mean is."""

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

FEWEST_BLOCKS = 8
"""Of windows, from whose means the confidence interval of a text's mean is told."""


class Scores(NamedTuple):
    """Of single targets, each (B, T)."""

    losses: Tensor
    """Negative log-likelihood, in nats; 0 where a target does not count."""
    is_first: Tensor
    """Whether the target is the most probable token."""


@torch.no_grad()
def score(model: nn.Module, inputs: Tensor, targets: Tensor) -> Scores:
    """What `model`, in evaluation mode, makes of `targets` (B, T) after `inputs` (B, T); of `IGNORE_INDEX`, nothing.

    The logits of our `Transformer` are made for some positions at a time: those of a large vocabulary take much memory.
    """
    parts: list[tuple[Tensor, Tensor]] = []

    def add(logits: Tensor, wanted: Tensor) -> None:
        losses = F.cross_entropy(logits.float(), wanted, reduction="none", ignore_index=IGNORE_INDEX)
        parts.append((losses, logits.argmax(-1) == wanted))

    def of_hidden(hidden: Tensor, weight: Tensor) -> Tensor:
        for rows, wanted in zip(
            torch.split(hidden.flatten(0, 1), CHUNK), torch.split(targets.flatten(), CHUNK), strict=True
        ):
            add(F.linear(rows, weight), wanted)
        return hidden

    if isinstance(model, Transformer):
        model(inputs, of_hidden)
    else:
        output = model(inputs, **cache_option(model, False))
        for rows, wanted in zip(output if isinstance(output, Tensor) else output.logits, targets, strict=True):
            add(rows, wanted)
    losses, is_first = (torch.cat(tensors).view(targets.shape) for tensors in zip(*parts, strict=True))
    return Scores(losses, is_first)


class Window(NamedTuple):
    """Part of a text that the model sees at once: inputs [start, end), targets [start + 1, end + 1)."""

    start: int
    end: int
    counted: int
    """How many of its first targets another window has counted."""


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows over a text in which every token but the first is a target that counts exactly once.

    Args:
        num_tokens: of the text.
        context: most inputs of a window.
        stride: targets that each window adds; with that of the context they follow each other as in validation, and
            with less, each target but the first has at least context - stride tokens before it.
    """
    done = 0
    while done < num_tokens - 1:
        end = min(done + (stride if done else context), num_tokens - 1)
        start = max(end - context, 0)
        yield Window(start, end, done - start)
        done = end


def interval(losses: Sequence[float], counts: Sequence[int], confidence: float) -> tuple[float, float] | None:
    """Confidence interval of the mean loss of a target, of a text like this one; None where it is too short for one.

    By batch means: windows of a text are not independent of their neighbours, so n of them make about sqrt(n) blocks of
    as many neighbours each (Flegal and Jones, Annals of Statistics 38, 2010). The mean is the ratio of the blocks'
    summed losses to their summed targets, its variance that of such a ratio (Cochran, Sampling Techniques, 1977,
    chapter 6), and its distribution Student's.

    Args:
        losses: summed over the targets of each window, in the order of the text.
        counts: targets of each window.
        confidence: probability that the interval holds the mean, such as 0.95.
    """
    if len(losses) < FEWEST_BLOCKS:
        return None
    blocks = max(math.isqrt(len(losses)), FEWEST_BLOCKS)
    totals, sizes = (
        np.array([part.sum() for part in np.array_split(np.asarray(values, dtype=np.float64), blocks)])
        for values in (losses, counts)
    )
    mean = totals.sum() / sizes.sum()
    error = math.sqrt(blocks / (blocks - 1) * ((totals - mean * sizes) ** 2).sum()) / sizes.sum()
    half = student_quantile((1 + confidence) / 2, blocks - 1) * error
    return float(mean - half), float(mean + half)


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution (Abramowitz and Stegun, 26.7.5: four terms, to 0.1 % from 7 degrees on)."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / degrees**power for power, term in enumerate(terms, start=1)))
