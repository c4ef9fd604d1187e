"""Samples of each optimizer step: a pure function of (seed, epoch, index), on any number of processes."""

import functools
import hashlib
import itertools
import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fundamentallm.distributed.dtensor import seed_device
from fundamentallm.errors import ConfigError, Problem

DRAWS = 1
"""Sets the seeds of what a dataset draws apart from those of the optimizer steps, which derive from the same numbers.
"""
POSITIONS_AT_ONCE = 4096
"""Positions of the order that are computed, and kept, at once."""


def derive_seed(*parts: int) -> int:
    """Derive a 63-bit seed from integers. Different integers give unrelated seeds."""
    text = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_draws(seed: int, rank: int, step: int) -> None:
    """Seeds the global generators of torch (on the CPU), numpy and Python for loading this rank's batch of a step."""
    seed_device(derive_seed(seed, rank, step, DRAWS), torch.device("cpu"))


def permute(positions: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Apply a pseudo-random permutation of range(size) to positions, in O(1) time and memory each.

    A Feistel network over the next power of four, repeated until the result is below `size` (cycle walking; Black and
    Rogaway, 2002). `torch.randperm` would need the whole epoch in memory to give one batch of it.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(derive_seed(seed, round_)) for round_ in range(6)]
    result = positions.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        result[outside] = (left << half) | right
        outside = result >= np.uint64(size)
    return result.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele et al., 2014): every input bit changes about half the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=4)
def _permuted_block(size: int, seed: int, epoch: int, number: int) -> NDArray[np.int64]:
    """Returns one block of the permuted order of an epoch."""
    first = number * POSITIONS_AT_ONCE
    return permute(np.arange(first, min(first + POSITIONS_AT_ONCE, size)), size, derive_seed(seed, epoch))


class Start(NamedTuple):
    """The start of an order of batches."""

    step: int = 0
    epoch: int = 0
    place: int = 0  # index in the epoch's order of samples
    samples: int = 0  # consumed before it


class RankBatch(NamedTuple):
    """One process's part of a step's batch."""

    indices: list[int]  # of its samples, then of padding
    rows: int  # number of its own samples; 0 if the batch has fewer samples than there are processes
    micro_batches: int  # number of them; the same on all processes


@dataclass(eq=False, repr=False)
class StepSampler:
    """Yields, for each optimizer step, the dataset indices of its batch and of one process's part of it.

    A batch is the next samples in the epoch's order. Each process gets an equal, contiguous part of it (sizes differ by
    one at most). The last batch of an epoch may be short.
    """

    num_samples: int  # size of the dataset; number of batches, if `order` lists batches
    batch_size: int  # samples a step over all processes; 1 if `order` lists batches
    seed: int | None  # of the order; None: the dataset's own order
    process_index: int = 0
    num_processes: int = 1
    micro_batch_size: int | None = None  # maximum number of a process's samples to compute at once; None: all
    drop_last: bool = False  # skip an epoch's short last batch
    pad: bool = False  # pad micro-batches to one size (padding is masked), so that a compiled model sees one shape
    schedule: Sequence[Sequence[int]] = ()  # later batch sizes: the number of steps done, and the size from then on
    skip: Sequence[Sequence[int]] = ()  # [first, last] steps, from 1, whose samples are left out (`DataConfig.skip`)
    order: "ListedOrder | None" = None  # of an epoch, in place of `seed`
    stream: Any = None  # a `Stream`, whose positions take the place of indices
    data: Any = None  # the dataset, or the stream; its entry 0 is the first sample
    draw_seed: int = 0  # of what the dataset draws at random
    start: Start = field(default_factory=Start)  # a run whose batch size was changed continues from its last sample

    def __post_init__(self) -> None:
        self.schedule, self.skip = [list(pair) for pair in self.schedule], [list(pair) for pair in self.skip]
        self.sizes = [self.batch_size, *(size for _, size in self.schedule)]
        self.sampler = getattr(self.order or self.stream, "description", None)
        self._largest_unit = max(map(len, self.order.of_epoch(0))) if self.order and self.order.is_batched else 1
        self.steps_per_epoch = self._steps_over(self.num_samples, self.batch_size)

    def _size(self, step: int) -> int:
        """Returns the batch size at `step`."""
        return [size for first, size in [(0, self.batch_size), *self.schedule] if first <= step][-1]

    def largest_rank_batch(self, batch_size: int) -> int:
        """Returns the maximum number of samples that a process has in a batch of this size."""
        return -(-min(batch_size, self.num_samples) * self._largest_unit // self.num_processes)

    def _steps_over(self, samples: int, batch_size: int) -> int:
        return samples // batch_size if self.drop_last else -(-samples // batch_size)

    def at(self, step: int, is_before_skip: bool = False) -> Start:
        """Returns where the batches from `step` on start. Its samples are those consumed before `step`.

        `is_before_skip`: where the samples begin that are left out, if there are any between `step` and the one before.
        """
        at = self.start
        for first, last in self.skip:
            begin = first - 1
            if self.start.step <= begin <= step - is_before_skip:
                left_out = self._later(at, begin)
                at = self._later(left_out, last)._replace(step=begin, samples=left_out.samples)
        return self._later(at, step)

    def _later(self, at: Start, step: int) -> Start:
        """Returns where `step` starts, if nothing is left out since `at`."""
        for change, _ in self.schedule:
            if at.step < change <= step:
                at = self._advanced(at, change)
        return self._advanced(at, step)

    def _advanced(self, start: Start, step: int) -> Start:
        """Returns where `step` starts, if all batches since `start` have one size."""
        size, rest, since = self._size(start.step), self.num_samples - start.place, step - start.step
        rest_steps, epoch_steps = self._steps_over(rest, size), self._steps_over(self.num_samples, size)
        if since < rest_steps:
            return Start(step, start.epoch, start.place + since * size, start.samples + since * size)
        epochs, steps = divmod(since - rest_steps, epoch_steps)
        samples = min(rest_steps * size, rest) + epochs * min(epoch_steps * size, self.num_samples) + steps * size
        return Start(step, start.epoch + 1 + epochs, steps * size, start.samples + samples)

    def steps_before_epoch(self, epoch: int) -> int:
        """Returns the number of steps before the first one of `epoch`, which is later than the epoch of `start`."""
        first = self.start.step
        steps = range(first, first + (epoch - self.start.epoch) * self.num_samples)  # batches of one sample at least
        return first + bisect_left(steps, epoch, key=lambda step: self.at(step).epoch)

    def samples_seen(self, step: int) -> int:
        """Returns the samples before `step`, if each epoch's batches have as many as those of the first."""
        at = self.at(step)
        if self.order is None or not self.order.is_batched:
            return at.samples
        order, present = self.order.of_epoch(0), self.order.of_epoch(at.epoch)
        return at.epoch * sum(map(len, order)) + sum(map(len, present[: at.place]))

    def epochs_before(self, step: int) -> float:
        """Returns the passes over the data before `step`; of a stream, only those that were read to their end."""
        at = self.at(step)
        return at.epoch + at.place / self.num_samples if self.stream is None else float(self.stream.epoch)

    def batch(self, step: int) -> list[int]:
        """Returns the dataset indices of the whole batch of `step`, over all processes."""
        _, epoch, start, _ = self.at(step)
        stop = min(start + self._size(step), self.num_samples)
        if self.order is not None:
            listed = self.order.of_epoch(epoch)[start:stop]
            return list(itertools.chain(*listed)) if self.order.is_batched else listed
        if self.seed is None:
            return list(range(start, stop))
        number, begin = divmod(start, POSITIONS_AT_ONCE)
        numbers = range(number, -(-stop // POSITIONS_AT_ONCE))
        blocks = [_permuted_block(self.num_samples, self.seed, epoch, number) for number in numbers]
        indices: list[int] = np.concatenate(blocks)[begin : begin + stop - start].tolist()
        return indices

    def rank_batch(self, step: int) -> RankBatch:
        """Returns this process's part of the batch of `step`, padded to one sample for each micro-batch.

        With `pad`, all micro-batches are padded to one size. Padding repeats the batch's first sample, and its targets
        must be masked. So every process has something to compute, and none leaves the others waiting.
        """
        batch, rank, count = self.batch(step), self.process_index, self.num_processes
        size, largest = len(batch), self.largest_rank_batch(self._size(step))
        indices = batch[size * rank // count : size * (rank + 1) // count]
        at_most, at_least = self.micro_batch_size or largest, 1
        if self.pad:
            at_most = at_least = -(-largest // -(-largest // at_most))
        micro_batches = -(-size // (count * at_most))
        missing = max(micro_batches * at_least - len(indices), 0)
        return RankBatch(indices + batch[:1] * missing, len(indices), micro_batches)


class ListedOrder:
    """Lists what a caller's sampler or batch sampler yields in an epoch, with its generators seeded by (seed, epoch).

    `description` has the class and the digest of the first epoch. Another sampler, or other weights, have another one.
    Raises ConfigError if the order does not follow from the seed, or names no samples of the dataset.
    """

    def __init__(self, sampler: Any, seed: int, num_samples: int) -> None:
        self.sampler, self.seed, self.num_samples, self.length = sampler, seed, num_samples, 0
        self.of_epoch = functools.lru_cache(maxsize=2)(self._list)
        first = self.of_epoch(0)
        if any(self._list(0, global_seed) != first for global_seed in (1, 2)):
            advice = "Have it draw from an attribute `generator`, or from a seed that set_epoch(epoch) sets."
            raise self._problem("gives another order each time, so that no run can resume", advice)
        self.length, self.is_batched = len(first), isinstance(first[0], list)
        digest = hashlib.blake2b(repr(first).encode(), digest_size=8).hexdigest()
        self.description = f"{type(sampler).__name__} {digest}"

    def _list(self, epoch: int, global_seed: int = 0) -> list[Any]:
        """Returns the indices or batches of an epoch."""
        most = 100 * self.num_samples
        _seed(self.sampler, derive_seed(self.seed, epoch), epoch)
        with global_states(global_seed):
            order = list(itertools.islice(self.sampler, most + 1))
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
        return ConfigError(Problem("sampler", self.sampler, "", advice, text=f"{type(self.sampler).__name__} {found}"))


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
