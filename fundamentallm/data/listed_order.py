"""The order of a sampler of the caller's: its indices for an epoch, listed at once."""

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

LIBRARIES = ("torch", "torchdata", "accelerate")


class ListedOrder:
    """Lists what a sampler or batch sampler yields in an epoch, with its generators seeded by (seed, epoch).

    Attributes:
        length: entries of an epoch.
        is_batched: whether entries are batches of indices.
        description: the class and the digest of the first epoch. Another sampler, or other weights, have another one.

    Raises:
        ConfigError: if the order does not follow from the seed, or names no samples of the dataset.
    """

    def __init__(self, sampler: Any, seed: int, num_samples: int) -> None:
        self.sampler, self.seed, self.num_samples, self.length = sampler, seed, num_samples, 0
        self._known = functools.lru_cache(maxsize=2)(self._list)
        first = self(0)
        if any(self._list(0, global_seed) != first for global_seed in (1, 2)):
            advice = "Have it draw from an attribute `generator`, or from a seed that set_epoch(epoch) sets."
            raise self._problem("gives another order each time, so that no run can resume", advice)
        self.length, self.is_batched = len(first), isinstance(first[0], list)
        digest = hashlib.blake2b(repr(first).encode(), digest_size=8).hexdigest()
        self.description = f"{type(sampler).__name__} {digest}"

    def __call__(self, epoch: int) -> list[Any]:
        """Returns the indices or batches of an epoch."""
        order: list[Any] = self._known(epoch)
        return order

    def _list(self, epoch: int, global_seed: int = 0) -> list[Any]:
        most = 100 * self.num_samples
        _seed(self.sampler, derive_seed(self.seed, epoch), epoch)
        with global_states(global_seed):
            order = list(itertools.islice(iter(self.sampler), most + 1))
        if order and isinstance(order[0], (list, tuple)):
            order = [[int(index) for index in batch] for batch in order]
            indices = list(itertools.chain.from_iterable(order))
        else:
            order = indices = [int(index) for index in order]
        is_known = all(0 <= index < self.num_samples for index in indices)
        if not (is_known and 0 < len(order) <= most and len(order) == (self.length or len(order))):
            about = f"{min(indices, default=None)} to {max(indices, default=None)}"
            allowed = f"Allowed: indices of the {self.num_samples} samples, an end, and as many in each epoch."
            raise self._problem(f"yields {len(order)} entries in epoch {epoch}, of {about}", allowed)
        return order

    def _problem(self, found: str, advice: str) -> ConfigError:
        text = f"{type(self.sampler).__name__} {found}"
        return ConfigError(Problem("sampler", self.sampler, advice=advice, text=text))


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
    if _kind(batch_sampler) == "BatchSampler":
        return batch_sampler.sampler, batch_sampler.batch_size, batch_sampler.drop_last
    return batch_sampler, None, False


def is_shuffling(sampler: Any, num_samples: int) -> bool | None:
    """Returns whether a sampler is what shuffle=True makes, or shuffle=False; None if it is another one."""
    kind = _kind(sampler)
    if kind in ("DistributedSampler", "StatefulDistributedSampler"):
        return bool(sampler.shuffle)
    if kind in ("RandomSampler", "SeedableRandomSampler"):
        return True if not sampler.replacement and sampler.num_samples == num_samples else None
    return False if kind == "SequentialSampler" and len(sampler) == num_samples else None


def _kind(sampler: Any) -> str:
    """Returns the name of a sampler's class if it is of a known library, otherwise ""."""
    return type(sampler).__name__ if type(sampler).__module__.partition(".")[0] in LIBRARIES else ""
