"""A model of ours for EleutherAI's lm-evaluation-harness (the extra `eval`), which knows hundreds of tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fundamentallm.config.schema import IGNORE_INDEX
from fundamentallm.errors import ConfigError
from fundamentallm.inference.generation import Sampling, generate
from fundamentallm.inference.loading import Opened, open_model
from fundamentallm.inference.scoring import score, windows

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ConfigError("lm-eval is not installed; pip install 'fundamentallm[eval]'.") from error


@register_model("fundamentallm")
class HarnessModel(TemplateLM):  # type: ignore[misc]
    """What the harness asks of a model.

    Args:
        checkpoint: as `fundamentallm evaluate --checkpoint` takes it; or a model that is open already.
        batch_size: requests computed at once.
    """

    def __init__(self, checkpoint: str | Opened, batch_size: int = 8, **_: Any) -> None:
        super().__init__()
        self.opened = open_model(Path(checkpoint)) if isinstance(checkpoint, str) else checkpoint
        self.batch_size = int(batch_size)
        self.max_length = self.opened.context or 1024

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, before which a text begins; else that of a line's end, or the first there is."""
        return min(self.opened.stop, default=self.opened.tokenizer.token_to_id("\n") or 0)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, as in training: without special tokens."""
        ids: list[int] = self.opened.tokenizer.encode(string, add_special_tokens=False).ids
        return ids

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows that follow each other."""
        texts = [[self.prefix_token_id, *self.tok_encode(request.args[0])] for request in requests]
        pieces = [
            (
                row,
                ids[window.start : window.start + window.counted + 1],
                ids[window.start + window.counted + 1 : window.end + 1],
            )
            for row, ids in enumerate(texts)
            for window in windows(len(ids), self.max_length, self.max_length)
        ]
        sums = [0.0] * len(texts)
        found = self._loglikelihood_tokens([(("", ""), before, after) for _, before, after in pieces])
        for (row, _, _), (logprob, _) in zip(pieces, found, strict=True):
            sums[row] += logprob
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is what greedy decoding gives), for each request."""
        device = next(self.opened.model.parameters()).device
        results: dict[int, tuple[float, bool]] = {}
        # Longest first: what does not fit in memory does not at once.
        order = sorted(range(len(requests)), key=lambda row: -len(requests[row][1]) - len(requests[row][2]))
        for first in range(0, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            texts = [(requests[row][1] + requests[row][2])[-self.max_length - 1 :] for row in rows]
            inputs = torch.zeros(len(rows), max(map(len, texts)) - 1, dtype=torch.int64)
            targets = torch.full_like(inputs, IGNORE_INDEX)
            for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
                ids, count = torch.tensor(text), min(len(requests[row][2]), len(text) - 1)
                inputs[index, : len(text) - 1] = ids[:-1]
                targets[index, len(text) - 1 - count : len(text) - 1] = ids[len(ids) - count :]
            scores = score(self.opened.model, inputs.to(device), targets.to(device))
            is_other = ~scores.is_first.cpu() & (targets != IGNORE_INDEX)
            sums, greedy = (-scores.losses.sum(-1)).tolist(), (~is_other.any(-1)).tolist()
            results |= dict(zip(rows, zip(sums, greedy, strict=True), strict=True))
        return [results[row] for row in range(len(requests))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text that continues each request, up to one of the texts it is to stop at."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, prompt: str, options: dict[str, Any]) -> str:
        ends = options.get("until") or []
        ends = [ends] if isinstance(ends, str) else ends
        sampling = Sampling(
            temperature=options.get("temperature", 0.0) if options.get("do_sample", True) else 0.0,
            top_k=options.get("top_k"),
            top_p=options.get("top_p"),
        )
        ids, written, text = self.tok_encode(prompt) or [self.prefix_token_id], [], ""
        for token in generate(
            self.opened.model,
            ids,
            options.get("max_gen_toks", 256),
            self.max_length,
            sampling.temperature,
            sampling.top_k,
            top_p=sampling.top_p,
            stop=self.opened.stop,
        ):
            written.append(token)
            text = self.opened.tokenizer.decode(written)
            if found := [place for end in ends if (place := text.find(end)) >= 0]:
                return text[: min(found)]
        return text


def run_tasks(
    opened: Opened, tasks: Sequence[str], include_path: Path | None, limit: int | None, batch_size: int
) -> dict[str, dict[str, Any]]:
    """{task: {measure: value}} of the harness.

    Raises:
        ConfigError: if a task is not known.
    """
    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not all(manager.match_tasks([task]) for task in tasks):  # those of lm-eval take many seconds to list
        manager = TaskManager(include_path=folder)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ConfigError(f"--tasks has {', '.join(unknown)}, which lm-eval does not know; see: lm-eval ls tasks.")
    found = simple_evaluate(
        model=HarnessModel(opened, batch_size), tasks=list(tasks), limit=limit, task_manager=manager
    )
    return {
        task: {name.removesuffix(",none"): value for name, value in measures.items() if _is_number(value)}
        for task, measures in found["results"].items()
    }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
