"""Text generation, one sampled token at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fundamentallm.config.validation import range_problems
from fundamentallm.errors import FundamentaLLMError, Problem, raise_all
from fundamentallm.models.transformer import Transformer, cache_option


def generate(
    model: nn.Module,
    token_ids: list[int],
    max_new_tokens: int,
    context: int | None,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    *,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Yield token ids that continue `token_ids`, each sampled from the model's distribution.

    Args:
        model: a `Transformer`, or any model that maps ids (1, T) to logits (1, T, V), or to an output with `.logits`,
            as transformers' models do. It is in evaluation mode while it generates.
        token_ids: the prompt, at least one id.
        max_new_tokens: maximum number of ids to sample.
        context: maximum number of ids that the model sees (its training sequence length); None: no limit. When it is
            full, its older half is dropped, so no position occurs that the model was not trained on.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample among this many most probable tokens only.
        seed: seed of the samples. The global random state is neither read nor changed.
        top_p: sample among the fewest most probable tokens that have this probability together.
        repetition_penalty: above 1, makes tokens less probable that have occurred (arXiv:1909.05858).
        stop: ids that end the text, and are not yielded.

    Raises:
        ConfigError: if a value is outside its range, before anything is sampled.
        FundamentaLLMError: if the model's logits are NaN or infinite.

    Examples:
        >>> import torch
        >>> from fundamentallm import ModelConfig, Transformer, generate
        >>> model = Transformer(ModelConfig(vocab_size=10, d_model=16, num_heads=2, num_layers=1))
        >>> len(list(generate(model, [1, 2, 3], max_new_tokens=5, context=16)))
        5
    """
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling["repetition_penalty"] = repetition_penalty
    problems = [] if token_ids else [Problem("prompt", "", "at least one token")]
    problems += range_problems(max_new_tokens=max_new_tokens, context=context, seed=seed, **sampling)
    if unknown := row_problem(model, "prompt", token_ids, token_ids):
        problems.append(unknown)
    raise_all(problems)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    draw = functools.partial(_sample, generator=generator, **sampling)
    text = [*token_ids]
    return _generate(model, text, max_new_tokens, context or len(text) + max_new_tokens, frozenset(stop), draw)


def row_problem(model: nn.Module, setting: str, value: object, ids: Sequence[int]) -> Problem | None:
    """Returns the problem with ids that have no row in the model's embedding table, or None if all have one."""
    find: Any = getattr(model, "get_input_embeddings", None)
    rows = len(find().weight) if find is not None else math.inf
    if wrong := [index for index in ids if not 0 <= index < rows]:
        allowed = f"0 to {rows - 1}, the rows of the model's embeddings"
        return Problem(setting, value, allowed, reason=f"with the id {wrong[0]}")
    return None


@torch.no_grad()
def _generate(
    model: nn.Module, text: list[int], max_new_tokens: int, context: int, stop: frozenset[int], draw: Callable[..., int]
) -> Iterator[int]:
    first, cache = max(len(text) - context, 0), None  # the index of the first token that the model sees
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if len(text) - first > context:
                first, cache = len(text) - max(context // 2, 1), None
            new = torch.tensor([text[first:] if cache is None else text[-1:]], device=next(model.parameters()).device)
            logits, cache = _next_logits(model, new, cache)
            token = draw(logits, text)
            if token in stop:
                return
            text.append(token)
            yield token
    finally:
        model.train(was_training)


def _next_logits(model: nn.Module, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Returns the logits (V,) of the token after ids (1, T) that follow the cached ones, and the cache with them."""
    if isinstance(model, Transformer):
        cache = cache or model.new_cache()
        # The logits of a whole prompt need much memory.
        return model(ids, lambda hidden, weight: F.linear(hidden[0, -1], weight), cache), cache
    output = model(ids, **cache_option(model, True), **({} if cache is None else {"past_key_values": cache}))
    logits = output if isinstance(output, Tensor) else output.logits
    return logits[0, -1], getattr(output, "past_key_values", None)


def _sample(
    logits: Tensor,
    text: Sequence[int],
    generator: torch.Generator,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
) -> int:
    """Sample the token after `text` from its logits (V,). The settings act in the order of transformers' `generate`."""
    logits = logits.float()  # softmax needs the precision
    if repetition_penalty != 1:  # arXiv:1909.05858
        past = torch.tensor(text, device=logits.device)
        values = logits[past]
        logits[past] = torch.where(values > 0, values / repetition_penalty, values * repetition_penalty)
    highest = logits.max()
    if not highest.isfinite():
        raise FundamentaLLMError("The model's logits are NaN or infinite: its weights are not finite.")
    if temperature == 0:
        return int(logits.argmax())
    logits = (logits - highest) / temperature  # any temperature leaves the largest one finite
    if top_k is not None and top_k < len(logits):
        likeliest = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, likeliest.indices, likeliest.values)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:  # arXiv:1904.09751
        ordered, order = probabilities.sort(descending=True)
        is_beyond = ordered.cumsum(-1) - ordered >= top_p  # the tokens before it suffice
        probabilities[order[is_beyond]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))
