"""The order of a sampler of the caller's: its indices for an epoch, listed at once."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fundamentallm.data.sampler import derive_seed, seed_draws
from fundamentallm.errors import ConfigError, Problem

LISTINGS = 3
"""Number of times that an epoch is listed, with other global random states, to find out whether it depends on them."""


class ListedOrder:
    """Lists what a sampler or batch sampler yields in an epoch, with its generators seeded by (seed, epoch).

    Args:
        sampler: yields indices, or batches of them.
        seed: of the run.
        num_samples: size of the dataset.

    Attributes:
        description: the class and the digest of the first epoch. Another sampler, or other weights, have another one.

    Raises:
        ConfigError: if the order does not follow from the seed, or names no samples of the dataset.
    """

    def __init__(self, sampler: Any, seed: int, num_samples: int) -> None:
        self.sampler, self.seed, self.num_samples = sampler, seed, num_samples
        self.name = type(sampler).__name__
        self._known = functools.lru_cache(maxsize=2)(self._list)
        first = self(0)
        for number in range(1, LISTINGS):
            if self._list(0, global_seed=number) != first:
                advice = "Have it draw from an attribute `generator`, or from a seed that set_epoch(epoch) sets."
                raise self._problem("gives another order each time, so that no run can resume", advice)
        self.length, self.is_batched = len(first), isinstance(first[0], list)
        digest = hashlib.blake2b(repr(first).encode(), digest_size=8).hexdigest()
        self.description = f"{self.name} {digest}"

    def __call__(self, epoch: int) -> list[Any]:
        """Returns the indices or batches of an epoch."""
        order: list[Any] = self._known(epoch)
        return order

    def _list(self, epoch: int, global_seed: int = 0) -> list[Any]:
        too_many = 100 * self.num_samples + 1
        _seed(self.sampler, derive_seed(self.seed, epoch), epoch)
        with global_states(global_seed):
            order = list(itertools.islice(iter(self.sampler), too_many))
        if not order or len(order) == too_many:
            raise self._problem(f"yields {'no end of' if order else 'no'} indices", "Give it an end.")
        if isinstance(order[0], (list, tuple)):
            order = [[int(index) for index in batch] for batch in order]
            indices = list(itertools.chain.from_iterable(order))
        else:
            order = indices = [int(index) for index in order]
        if not all(0 <= index < self.num_samples for index in indices):
            found = f"yields {min(indices)} to {max(indices)}"
            raise self._problem(found, f"The dataset has {self.num_samples} samples.")
        if epoch and len(order) != self.length:
            found = f"yields {len(order)} in epoch {epoch} and {self.length} in epoch 0"
            raise self._problem(found, "Give it one length.")
        return order

    def _problem(self, found: str, advice: str) -> ConfigError:
        return ConfigError(Problem("sampler", self.sampler, advice=advice, text=f"{self.name} {found}"))


def _seed(sampler: Any, seed: int, epoch: int) -> None:
    """Give a sampler, and those within it, seeded generators and the epoch."""
    while sampler is not None:
        for name, value in list(getattr(sampler, "__dict__", {}).items()):
            if isinstance(value, torch.Generator) or (name == "generator" and value is None):
                setattr(sampler, name, torch.Generator().manual_seed(seed))
            elif isinstance(value, np.random.Generator):
                setattr(sampler, name, np.random.default_rng(seed))
            elif isinstance(value, random.Random):
                setattr(sampler, name, random.Random(seed))
        if callable(getattr(sampler, "set_epoch", None)):
            sampler.set_epoch(epoch)
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)


@contextmanager
def global_states(seed: int) -> Iterator[None]:
    """Seed the global generators on entry, and set them back on exit."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed_draws(seed, 0, 0)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def unwrapped(loader: Any) -> tuple[Any, int | None, bool]:
    """Returns what decides about a loader's order: a sampler with its batch size and drop_last, or a batch sampler.

    What accelerate has put around a batch sampler is taken off. The batch size of a batch sampler is None.
    """
    batch_sampler: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batch_sampler, "batch_sampler") and not getattr(batch_sampler, "skip_batches", 0):
        batch_sampler = batch_sampler.batch_sampler
    if is_kind(batch_sampler, "BatchSampler"):
        return batch_sampler.sampler, batch_sampler.batch_size, batch_sampler.drop_last
    return batch_sampler, None, False


def is_kind(sampler: Any, *names: str) -> bool:
    """Returns whether a sampler is of one of these classes of torch, torchdata or accelerate, not of a subclass."""
    package = type(sampler).__module__.partition(".")[0]
    return type(sampler).__name__ in names and package in ("torch", "torchdata", "accelerate")
