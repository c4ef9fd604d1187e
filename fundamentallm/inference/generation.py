"""Text from a language model, one sampled token at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fundamentallm.config.validation import AT_LEAST_ONE, NON_NEGATIVE, POSITIVE, RANGES, Interval
from fundamentallm.errors import ConfigError, FundamentaLLMError
from fundamentallm.models.transformer import LayerCache, Transformer, cache_option


class Sampling(NamedTuple):
    """How a token is drawn. What is set acts in this order, as in transformers' `generate`."""

    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that are there already (arXiv:1909.05858)."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int | None = None
    """Draw among this many most probable tokens only."""
    top_p: float | None = None
    """Draw among the fewest most probable tokens that have this probability together (arXiv:1904.09751)."""

    def problems(self) -> list[str]:
        """A sentence for each value that is outside its range."""
        ranges = (POSITIVE, NON_NEGATIVE, AT_LEAST_ONE, Interval(low=0, high=1, open_low=True))
        named = zip(self._fields, self, ranges, strict=True)
        return [
            f"{name} is {value!r}; allowed: {allowed}." for name, value, allowed in named if _is_out(value, allowed)
        ]

    def draw(self, logits: Tensor, seen: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """A token (B,) for each row of `logits` (B, V), by its generator; `seen` (B, V): which are there already."""
        logits = logits.float()  # in which softmax is safe
        if self.repetition_penalty != 1:
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        if self.temperature == 0:
            return _numbers(logits).argmax(-1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            likeliest = logits.topk(self.top_k)
            logits = torch.full_like(logits, -torch.inf).scatter(-1, likeliest.indices, likeliest.values)
        probabilities = _numbers(logits.softmax(-1))
        if self.top_p is not None and self.top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            is_beyond = ordered.cumsum(-1) - ordered >= self.top_p  # without it, they have as much already
            probabilities = probabilities.masked_fill(is_beyond.scatter(-1, order, is_beyond), 0.0)
        rows = zip(probabilities, generators, strict=True)
        return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])


def _numbers(values: Tensor) -> Tensor:
    if values.isnan().any():
        raise FundamentaLLMError(
            "the model gives no probabilities, but NaN: its weights are not finite, or the temperature is too small."
        )
    return values


UNCHANGED = Sampling()
"""Draws from the model's own distribution."""


def generate(
    model: nn.Module,
    token_ids: list[int],
    max_new_tokens: int,
    context: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    *,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Yield token ids that continue `token_ids`, each drawn from the model's distribution.

    Args:
        model: a `Transformer`, or any that maps ids (1, T) to logits (1, T, V), or to an output with `.logits`, as
            transformers' models do; it is put into evaluation mode while it generates.
        token_ids: the prompt, at least one id.
        max_new_tokens: most ids to draw.
        context: most ids the model looks back on (its training sequence length). Where that many are there, the model
            goes on from the later half of them: so the cost of a token stays the same, and nothing is computed from
            positions that the model has not been trained on.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: draw among this many most probable tokens only.
        seed: of the draws; the global random state is neither read nor changed.
        top_p: draw among the fewest most probable tokens that have this probability together.
        repetition_penalty: makes tokens that are there already less probable, where it is above 1 (see `Sampling`).
        stop: ids that end the text, and are not yielded.

    Raises:
        ConfigError: if a value is outside its range, before anything is drawn.
        FundamentaLLMError: if the model's logits are not numbers.

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
    context: int,
    sampling: Sampling = UNCHANGED,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[dict[int, int]]:
    """Yield, token by token, {index of the prompt: the id that continues it} of the prompts that have not ended.

    Each prompt is continued as if alone, by a seed that is `seed` plus its index. Arguments and errors: see `generate`.
    """
    ranges = {
        "max_new_tokens": (max_new_tokens, NON_NEGATIVE),
        "context": (context, AT_LEAST_ONE),
        "seed": (seed, RANGES["seed"]),
    }
    problems = [] if prompts and all(prompts) else ["the prompt is empty; give at least one token."]
    problems += [f"{name} is {value!r}; allowed: {ok}." for name, (value, ok) in ranges.items() if _is_out(value, ok)]
    if problems := problems + sampling.problems():
        raise ConfigError(problems)
    return _generate(model, prompts, max_new_tokens, context, sampling, seed, frozenset(stop))


def _is_out(value: float | None, allowed: Interval) -> bool:
    return value is not None and value not in allowed


@torch.no_grad()
def _generate(
    model: nn.Module,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    context: int,
    sampling: Sampling,
    seed: int,
    stop: frozenset[int],
) -> Iterator[dict[int, int]]:
    device = next(model.parameters()).device
    generators = [torch.Generator(device).manual_seed(seed + index) for index in range(len(prompts))]
    context = min(context, max(map(len, prompts)) + max_new_tokens)  # more will not be there: nor is memory kept for it
    reader: Reader = Cached(model, context) if isinstance(model, Transformer) else Theirs(model, context)
    texts, rows, seen = [list(prompt) for prompt in prompts], list(range(len(prompts))), None
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            with _uncompiled(model):
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


def _uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Meanwhile, compiled modules (a sharded model's blocks) are not: each length would take a compilation."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
    return nullcontext()


class Reader(Protocol):
    """Says what comes next in texts that grow by a token from one call to the next."""

    def next_logits(self, texts: Sequence[list[int]]) -> Tensor:
        """(B, V), of the token after each text."""

    def keep(self, rows: list[int]) -> None:
        """Go on with some of the texts only."""


def _window(length: int, first: int, context: int) -> int:
    """Where the part of a text of `length` tokens begins that the model sees, if it last began at `first`.

    As far back as it was, unless that is more than the context; then, all but the newest half of the context goes.
    """
    return first if length - first <= context else length - max(context // 2, 1)


class Cached:
    """A `Transformer`, which keeps keys and values: each token is computed once, and once more where its window moves.

    Texts of different lengths lie in one batch with their beginnings aligned: what fills up the shorter ones is in
    slots that nobody sees, until the text's own tokens replace it.
    """

    def __init__(self, model: Transformer, context: int) -> None:
        self.model, self.context = model, context
        self.firsts: list[int] = []
        self.cache: list[LayerCache] = []

    def next_logits(self, texts: Sequence[list[int]]) -> Tensor:
        """(B, V), of the token after each text."""
        device = next(self.model.parameters()).device
        befores = self.firsts or [max(len(text) - self.context, 0) for text in texts]
        firsts = [_window(len(text), first, self.context) for text, first in zip(texts, befores, strict=True)]
        windows = [text[first:] for text, first in zip(texts, firsts, strict=True)]
        lengths = torch.tensor([len(window) for window in windows], device=device)
        if firsts == self.firsts:
            ids, positions = torch.tensor([[window[-1]] for window in windows], device=device), lengths[:, None] - 1
        else:  # the beginning, or a text has grown beyond the context: all that is seen is computed (again)
            self.firsts, self.cache = firsts, self.model.new_cache(self.context)
            longest = int(lengths.max())
            ids = torch.tensor([window + [0] * (longest - len(window)) for window in windows], device=device)
            positions = torch.arange(longest, device=device).expand(len(ids), -1)
        last = (lengths - 1 - positions[:, 0])[:, None, None]

        def of_last(hidden: Tensor, weight: Tensor) -> Tensor:  # a prompt's other logits would be many
            return F.linear(hidden.take_along_dim(last, 1)[:, 0], weight)

        return self.model(ids, of_last, self.cache, positions)  # type: ignore[no-any-return]

    def keep(self, rows: list[int]) -> None:
        """Go on with some of the texts only."""
        self.firsts = [self.firsts[row] for row in rows]
        for layer in self.cache:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class Theirs:
    """Any model, a text at a time, since not all take texts of different lengths at once; a transformers model keeps
    what it has computed, as far as it can.
    """

    def __init__(self, model: nn.Module, context: int) -> None:
        self.model, self.context = model, context
        self.options: dict[str, Any] = cache_option(model, True)
        self.seen: list[tuple[int, Any]] = []
        """Of each text: where its window began, and what the model has kept of it."""

    def next_logits(self, texts: Sequence[list[int]]) -> Tensor:
        """(B, V), of the token after each text."""
        befores = self.seen or [(max(len(text) - self.context, 0), None) for text in texts]
        results = [self._next(text, *before) for text, before in zip(texts, befores, strict=True)]
        self.seen = [(first, kept) for _, first, kept in results]
        return torch.cat([logits for logits, _, _ in results])

    def _next(self, text: list[int], before: int, kept: Any) -> tuple[Tensor, int, Any]:
        device = next(self.model.parameters()).device
        first = _window(len(text), before, self.context)
        goes_on = kept is not None and first == before
        ids = torch.tensor([text[-1:] if goes_on else text[first:]], device=device)
        output = self.model(ids, **self.options, **({"past_key_values": kept} if goes_on else {}))
        logits = output if isinstance(output, Tensor) else output.logits
        return logits[:, -1], first, getattr(output, "past_key_values", None)

    def keep(self, rows: list[int]) -> None:
        """Go on with some of the texts only."""
        self.seen = [self.seen[row] for row in rows]
