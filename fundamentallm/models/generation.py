"""Text from a language model, one sampled token at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from fundamentallm.errors import ConfigError


@torch.no_grad()
def generate(
    model: nn.Module,
    token_ids: list[int],
    max_new_tokens: int,
    context: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yield token ids that continue `token_ids`, each drawn from the model's distribution.

    Args:
        model: maps ids (1, T) to logits (1, T, V); it is put into evaluation mode while it generates.
        token_ids: the prompt, at least one id.
        max_new_tokens: how many ids to draw.
        context: most ids the model looks back on (its training sequence length).
        temperature: divides the logits; 0 takes the most probable token.
        top_k: draw among this many most probable tokens only.
        seed: of the draws; the global random state is neither read nor changed.

    Raises:
        ConfigError: if a value is outside its range.
    """
    problems = []
    if not token_ids:
        problems.append("the prompt is empty; give at least one token.")
    if not 0 <= temperature < float("inf"):
        problems.append(f"temperature is {temperature!r}; allowed: at least 0.")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k is {top_k!r}; allowed: at least 1.")
    if problems:
        raise ConfigError(problems)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        ids = torch.tensor([token_ids], device=device)
        for _ in range(max_new_tokens):
            logits = model(ids[:, -context:])[0, -1].float()  # (V,)
            if top_k is not None and top_k < len(logits):
                logits[logits < logits.topk(top_k).values[-1]] = float("-inf")
            if temperature == 0:
                token = logits.argmax().view(1)
            else:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            ids = torch.cat((ids, token[None]), dim=1)
            yield int(token)
    finally:
        model.train(was_training)
