"""Text from a language model, one sampled token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from fundamentallm.errors import ConfigError
from fundamentallm.validation import AT_LEAST_ONE, NON_NEGATIVE, RANGES


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
        ConfigError: if a value is outside its range, before anything is drawn.

    Example:
        >>> import torch
        >>> from fundamentallm import ModelConfig, Transformer, generate
        >>> model = Transformer(ModelConfig(vocab_size=10, d_model=16, num_heads=2, num_layers=1))
        >>> ids = list(generate(model, [1, 2, 3], max_new_tokens=5, context=16, seed=7))
        >>> len(ids), ids == list(generate(model, [1, 2, 3], max_new_tokens=5, context=16, seed=7))
        (5, True)
    """
    ranges = {
        "max_new_tokens": (max_new_tokens, NON_NEGATIVE),
        "context": (context, AT_LEAST_ONE),
        "temperature": (temperature, NON_NEGATIVE),
        "top_k": (top_k, AT_LEAST_ONE),
        "seed": (seed, RANGES["seed"]),
    }
    problems = [] if token_ids else ["the prompt is empty; give at least one token."]
    problems += [
        f"{name} is {value!r}; allowed: {allowed}."
        for name, (value, allowed) in ranges.items()
        if value is not None and value not in allowed
    ]
    if problems:
        raise ConfigError(problems)
    return _generate(model, token_ids, max_new_tokens, context, temperature, top_k, seed)


@torch.no_grad()
def _generate(
    model: nn.Module,
    token_ids: list[int],
    max_new_tokens: int,
    context: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> Iterator[int]:
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        ids = torch.tensor([token_ids], device=device)
        for _ in range(max_new_tokens):
            with _uncompiled(model):  # (1, T) to (V,), in the precision in which softmax is safe
                logits = model(ids[:, -context:])[0, -1].float()
            if top_k is not None and top_k < len(logits):
                likeliest = logits.topk(top_k)
                logits = torch.full_like(logits, float("-inf")).scatter(0, likeliest.indices, likeliest.values)
            if temperature == 0:
                token = logits.argmax().view(1)
            else:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            ids = torch.cat((ids, token[None]), dim=1)
            yield int(token)
    finally:
        model.train(was_training)


def _uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Meanwhile, compiled modules (a sharded model's blocks) are not: each length would take a compilation."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
    return nullcontext()
