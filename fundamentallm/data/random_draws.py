"""Seeds what a dataset draws at random, so that a resumed run draws the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import get_worker_info

from fundamentallm.data.sampler import derive_seed
from fundamentallm.distributed.dtensor import seed_device

STREAM = 1
"""Makes these seeds other ones than those of the optimizer steps, which derive from the same numbers."""


def seed_draws(seed: int, rank: int, step: int) -> None:
    """Seeds the global generators of torch (on the CPU), numpy and Python for loading this rank's batch of a step."""
    seed_device(derive_seed(seed, rank, step, STREAM), torch.device("cpu"))


def seeded(batches: Iterable[list[int]], seed: int, rank: int, first_step: int) -> Iterator[list[int]]:
    """Yields the batches. The process that asks for one is seeded for it."""
    for step, batch in enumerate(batches, first_step):
        seed_draws(seed, rank, step)
        yield batch


class SeededWorkers:
    """A collate function for worker processes. Having collated one batch, it seeds its worker for the next.

    torch gives batches to workers in turn, so each worker knows the step of its next batch.
    """

    def __init__(self, collate_fn: Callable[[Any], Any], seed: int, rank: int, first_step: int) -> None:
        self.collate_fn, self.seed, self.rank, self.step = collate_fn, seed, rank, first_step

    def start(self, worker_id: int) -> None:
        """Seeds a worker for its first batch."""
        self.step += worker_id
        seed_draws(self.seed, self.rank, self.step)

    def __call__(self, samples: Any) -> Any:
        """Returns the collated samples."""
        batch, worker = self.collate_fn(samples), get_worker_info()
        assert worker is not None
        self.step += worker.num_workers
        seed_draws(self.seed, self.rank, self.step)
        return batch
