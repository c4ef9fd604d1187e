"""Losses of single tokens, and windows over long texts."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fundamentallm.config.schema import CHUNK, IGNORE_INDEX
from fundamentallm.models.transformer import Transformer, cache_option


@torch.no_grad()
def score(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the negative log-likelihood, in nats, of each of `targets` (B, T) after `inputs` (B, T).

    It is 0 for targets of `IGNORE_INDEX`. The model has to be in evaluation mode. The logits of our `Transformer` are
    computed for some positions at a time, since those of a large vocabulary need much memory.
    """

    def of_hidden(hidden: Tensor, weight: Tensor) -> Tensor:
        chunks = zip(torch.split(hidden.flatten(0, 1), CHUNK), torch.split(targets.flatten(), CHUNK), strict=True)
        return torch.cat([_losses(F.linear(rows, weight), wanted) for rows, wanted in chunks]).view(targets.shape)

    if isinstance(model, Transformer):
        return model(inputs, of_hidden)  # type: ignore[no-any-return]
    output = model(inputs, **cache_option(model, False))
    logits = output if isinstance(output, Tensor) else output.logits
    return torch.stack([_losses(rows, wanted) for rows, wanted in zip(logits, targets, strict=True)])


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=IGNORE_INDEX)


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
