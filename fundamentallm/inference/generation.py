"""Text generation, one sampled token at a time."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fundamentallm.config.validation import AT_LEAST_ONE, NON_NEGATIVE, POSITIVE, RANGES, Interval
from fundamentallm.errors import ConfigError, FundamentaLLMError, Problem
from fundamentallm.models.transformer import LayerCache, Transformer, cache_option


class Sampling(NamedTuple):
    """How a token is sampled. The settings act in this order, as in transformers' `generate`."""

    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that have occurred (arXiv:1909.05858)."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int | None = None
    """Sample among this many most probable tokens only."""
    top_p: float | None = None
    """Sample among the fewest most probable tokens that have this probability together (arXiv:1904.09751)."""

    def draw(self, logits: Tensor, seen: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Sample a token (B,) from each row of `logits` (B, V), by its generator. `seen` (B, V) marks past tokens."""
        logits = logits.float()  # softmax needs the precision
        if self.repetition_penalty != 1:
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        if self.temperature == 0:
            return _refuse_nan(logits).argmax(-1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            likeliest = logits.topk(self.top_k)
            logits = torch.full_like(logits, -torch.inf).scatter(-1, likeliest.indices, likeliest.values)
        probabilities = _refuse_nan(logits.softmax(-1))
        if self.top_p is not None and self.top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            is_beyond = ordered.cumsum(-1) - ordered >= self.top_p  # the tokens before it suffice
            probabilities = probabilities.masked_fill(is_beyond.scatter(-1, order, is_beyond), 0.0)
        rows = zip(probabilities, generators, strict=True)
        return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])


def _refuse_nan(values: Tensor) -> Tensor:
    if values.isnan().any():
        raise FundamentaLLMError(
            "The model's probabilities are NaN: its weights are not finite, or the temperature is too small."
        )
    return values


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
        context: maximum number of ids that the model sees (its training sequence length); None: no limit. When the
            context is full, its older half is dropped. So the cost of a token stays the same, and no position occurs
            that the model was not trained on.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample among this many most probable tokens only.
        seed: seed of the samples. The global random state is neither read nor changed.
        top_p: sample among the fewest most probable tokens that have this probability together.
        repetition_penalty: above 1, makes tokens less probable that have occurred (see `Sampling`).
        stop: ids that end the text, and are not yielded.

    Raises:
        ConfigError: if a value is outside its range, before anything is sampled.
        FundamentaLLMError: if the model's logits are NaN.

    Examples:
        >>> import torch
        >>> from fundamentallm import ModelConfig, Transformer, generate
        >>> model = Transformer(ModelConfig(vocab_size=10, d_model=16, num_heads=2, num_layers=1))
        >>> ids = list(generate(model, [1, 2, 3], max_new_tokens=5, context=16, seed=7))
        >>> len(ids), ids == list(generate(model, [1, 2, 3], max_new_tokens=5, context=16, seed=7))
        (5, True)
    """
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p)
    return (row[0] for row in generate_batch(model, [token_ids], max_new_tokens, context, sampling, seed, stop) if row)


def generate_batch(
    model: nn.Module,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    context: int | None,
    sampling: Sampling = Sampling(),  # noqa: B008  # immutable
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[dict[int, int]]:
    """Yield, token by token, {index of the prompt: the id that continues it} for the prompts that have not ended.

    Each prompt is continued as if alone, with `seed` plus its index. Arguments and errors are those of `generate`.
    """
    ranges: dict[str, tuple[float | None, Interval]] = {
        "max_new_tokens": (max_new_tokens, NON_NEGATIVE),
        "context": (context, AT_LEAST_ONE),
        "seed": (seed, RANGES["seed"]),
        "repetition_penalty": (sampling.repetition_penalty, POSITIVE),
        "temperature": (sampling.temperature, NON_NEGATIVE),
        "top_k": (sampling.top_k, AT_LEAST_ONE),
        "top_p": (sampling.top_p, Interval(low=0, high=1, open_low=True)),
    }
    problems = [] if prompts and all(prompts) else [Problem("prompt", "", "at least one token")]
    problems += filter(None, (row_problem(model, "prompt", prompt, prompt) for prompt in prompts))
    problems += [
        Problem(name, value, str(allowed))
        for name, (value, allowed) in ranges.items()
        if value is not None and value not in allowed
    ]
    if problems:
        raise ConfigError(problems)
    return _generate(model, prompts, max_new_tokens, context, sampling, seed, frozenset(stop))


def row_problem(model: nn.Module, setting: str, value: object, ids: Sequence[int]) -> Problem | None:
    """Returns the problem with ids that have no row in the model's embedding table, or None if all have one."""
    find: Any = getattr(model, "get_input_embeddings", None)
    if find is not None:
        rows = len(find().weight)
        if wrong := [index for index in ids if not 0 <= index < rows]:
            allowed = f"0 to {rows - 1}, the rows of the model's embeddings"
            return Problem(setting, value, allowed, reason=f"with the id {wrong[0]}")
    return None


@torch.no_grad()
def _generate(
    model: nn.Module,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    context: int | None,
    sampling: Sampling,
    seed: int,
    stop: frozenset[int],
) -> Iterator[dict[int, int]]:
    device = next(model.parameters()).device
    generators = [torch.Generator(device).manual_seed(seed + index) for index in range(len(prompts))]
    longest = max(map(len, prompts)) + max_new_tokens
    context = longest if context is None else min(context, longest)  # the cache need not be larger than the text
    reader = _CachedReader(model, context) if isinstance(model, Transformer) else _Reader(model, context)
    texts, rows, seen = [list(prompt) for prompt in prompts], list(range(len(prompts))), None
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            with _uncompiled():
                logits = reader.next_logits([texts[row] for row in rows])
            if seen is None:
                seen = torch.zeros_like(logits, dtype=torch.bool)
                for row, text in enumerate(texts):
                    seen[row, text] = True
            tokens = sampling.draw(logits, seen, [generators[row] for row in rows])
            seen.scatter_(-1, tokens[:, None], True)
            drawn = dict(zip(rows, tokens.tolist(), strict=True))
            kept = [index for index, row in enumerate(rows) if drawn[row] not in stop]
            if len(kept) < len(rows):
                rows, seen = [rows[index] for index in kept], seen[kept]
                reader.keep(kept)
            if not rows:
                return
            for row in rows:
                texts[row].append(drawn[row])
            yield {row: drawn[row] for row in rows}
    finally:
        model.train(was_training)


def _uncompiled() -> AbstractContextManager[object]:
    """Runs compiled modules (the blocks of a sharded model) uncompiled: every new length would be compiled."""
    # Without torch._dynamo in memory nothing is compiled, and importing it takes a second.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _Reader:
    """Computes the logits after growing texts with any model, one text at a time, since not all models take texts of
    different lengths at once. Reuses what a transformers model caches.

    (transformers' own `generate` has no seed for each text and does not continue beyond the context.)
    """

    def __init__(self, model: nn.Module, context: int) -> None:
        self.model, self.context = model, context
        self.device = next(model.parameters()).device
        self.options: dict[str, Any] = cache_option(model, True)
        self.firsts: list[int] = []
        """Index of the first token of each text that the model sees."""
        self.caches: list[Any] = []

    def next_logits(self, texts: Sequence[list[int]]) -> Tensor:
        """Returns the logits (B, V) of the token after each text, which is a token longer than at the last call."""
        befores, self.firsts = self.firsts, self._windows(texts)
        rows = []
        for row, (text, first) in enumerate(zip(texts, self.firsts, strict=True)):
            cache = self.caches[row] if befores and first == befores[row] else None
            ids = torch.tensor([text[first:] if cache is None else text[-1:]], device=self.device)
            output = self.model(ids, **self.options, **({} if cache is None else {"past_key_values": cache}))
            logits = output if isinstance(output, Tensor) else output.logits
            rows.append((logits[:, -1], getattr(output, "past_key_values", None)))
        self.caches = [cache for _, cache in rows]
        return torch.cat([logits for logits, _ in rows])

    def _windows(self, texts: Sequence[list[int]]) -> list[int]:
        """Returns the new `firsts`: unchanged while the context holds the text, otherwise its newest half is kept."""
        firsts = self.firsts or [max(len(text) - self.context, 0) for text in texts]
        return [
            first if len(text) - first <= self.context else len(text) - max(self.context // 2, 1)
            for text, first in zip(texts, firsts, strict=True)
        ]

    def keep(self, rows: list[int]) -> None:
        """Drop all texts but those of `rows`."""
        self.firsts = [self.firsts[row] for row in rows]
        self.caches = [self.caches[row] for row in rows]


class _CachedReader(_Reader):
    """Computes the logits of a `Transformer` for a batch of texts, with a cache of keys and values.

    Texts of different lengths are aligned at their starts. Padding lies in cache slots that are masked until the text's
    own tokens replace it.
    """

    model: Transformer

    def next_logits(self, texts: Sequence[list[int]]) -> Tensor:
        """Returns the logits (B, V) of the token after each text, which is a token longer than at the last call."""
        befores, self.firsts = self.firsts, self._windows(texts)
        windows = [text[first:] for text, first in zip(texts, self.firsts, strict=True)]
        lengths = torch.tensor([len(window) for window in windows], device=self.device)
        if self.firsts == befores:
            ids = torch.tensor([[window[-1]] for window in windows], device=self.device)
            positions = lengths[:, None] - 1
        else:  # at the start, or if a window has moved, everything is computed
            self.caches = self.model.new_cache(self.context)
            longest = int(lengths.max())
            ids = torch.tensor([window + [0] * (longest - len(window)) for window in windows], device=self.device)
            positions = torch.arange(longest, device=self.device).expand(len(ids), -1)
        last = (lengths - 1 - positions[:, 0])[:, None, None]

        def of_last(hidden: Tensor, weight: Tensor) -> Tensor:  # the logits of a whole prompt need much memory
            return F.linear(hidden.take_along_dim(last, 1)[:, 0], weight)

        return self.model(ids, of_last, self.caches, positions)  # type: ignore[no-any-return]

    def keep(self, rows: list[int]) -> None:
        """Drop all texts but those of `rows`."""
        self.firsts = [self.firsts[row] for row in rows]
        layer: LayerCache
        for layer in self.caches:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
