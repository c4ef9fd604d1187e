"""Samples of each optimizer step: a pure function of (seed, epoch, index), on any number of processes."""

import functools
import hashlib
import itertools
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fundamentallm.distributed.dtensor import seed_device

DRAWS = 1
"""Makes seeds of what a dataset draws other ones than those of the optimizer steps, which derive from the same numbers.
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


class StepSampler:
    """Yields, for each optimizer step, the dataset indices of its batch and of one process's part of it.

    A batch is the next samples in the epoch's order. Each process gets an equal, contiguous part of it (sizes differ by
    one at most). The last batch of an epoch may be short.

    Args:
        num_samples: size of the dataset.
        batch_size: samples a step over all processes.
        seed: seed of the order; None for the dataset's own order.
        process_index: rank of this process.
        num_processes: number of processes.
        micro_batch_size: maximum number of a process's samples to compute at once; None: all.
        drop_last: skip an epoch's short last batch.
        pad: pad micro-batches to one size (padding is masked), so that a compiled model sees one shape.
        schedule: later batch sizes, as pairs of the number of steps done and the size from then on, in order.
        order: a `ListedOrder` of an epoch, which replaces `seed`. If it lists batches, each is one step:
            `num_samples` then counts batches, and `batch_size` is 1.
        stream: a `Stream`, whose positions take the place of indices.

    Attributes:
        data: the dataset, or the stream. Its entry 0 is the first sample.
        draw_seed: seed of what the dataset draws at random.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int | None,
        process_index: int = 0,
        num_processes: int = 1,
        micro_batch_size: int | None = None,
        drop_last: bool = False,
        pad: bool = False,
        schedule: Sequence[Sequence[int]] = (),
        order: Any = None,
        stream: Any = None,
    ) -> None:
        self.num_samples, self.batch_size, self.seed, self.drop_last = num_samples, batch_size, seed, drop_last
        self.schedule = [list(pair) for pair in schedule]
        self.sizes = [batch_size, *(size for _, size in self.schedule)]
        self.process_index, self.num_processes, self.pad = process_index, num_processes, pad
        self.order, self.stream, self.data, self.draw_seed = order, stream, stream, seed or 0
        self.sampler = getattr(order or stream, "description", None)
        self._is_batched = order is not None and order.is_batched
        self._largest_unit = max(map(len, order(0))) if self._is_batched else 1
        self.micro_batch_size = micro_batch_size or max(self.sizes) * self._largest_unit
        self.steps_per_epoch = self._steps_over(num_samples, batch_size)
        self.start = Start()
        self._block = functools.lru_cache(maxsize=2)(self._order_block)

    @property
    def start(self) -> Start:
        """Where the batches start. A run whose batch size was changed continues from its last sample."""
        return self._segments[0][0]

    @start.setter
    def start(self, start: Start) -> None:
        size = [size for step, size in [(0, self.batch_size), *self.schedule] if step <= start.step][-1]
        self._segments = [(start, size)]
        for step, size in self.schedule:
            if step > start.step:  # the order of samples continues, in batches of another size
                self._segments.append((self._at(step), size))

    def largest_rank_batch(self, batch_size: int) -> int:
        """Returns the maximum number of samples that a process has in a batch of this size."""
        return -(-min(batch_size, self.num_samples) * self._largest_unit // self.num_processes)

    def _segment(self, step: int) -> tuple[Start, int]:
        """Returns the start of the batches that have the size of those of `step`, and this size."""
        for segment in reversed(self._segments):
            if segment[0].step <= step:
                return segment
        return self._segments[0]

    def _steps_over(self, samples: int, batch_size: int) -> int:
        return samples // batch_size if self.drop_last else -(-samples // batch_size)

    def _at(self, step: int) -> Start:
        """Returns where the batches from `step` on start."""
        start, size = self._segment(step)
        rest, since = self.num_samples - start.place, step - start.step
        rest_steps, epoch_steps = self._steps_over(rest, size), self._steps_over(self.num_samples, size)
        if since < rest_steps:
            return Start(step, start.epoch, start.place + since * size, start.samples + since * size)
        epochs, steps = divmod(since - rest_steps, epoch_steps)
        samples = min(rest_steps * size, rest) + epochs * min(epoch_steps * size, self.num_samples) + steps * size
        return Start(step, start.epoch + 1 + epochs, steps * size, start.samples + samples)

    def place(self, step: int) -> tuple[int, int]:
        """Returns (epoch, index in its order) of the first sample of `step`. Index 0 is the start of an epoch."""
        start = self._at(step)
        return start.epoch, start.place

    def steps_before_epoch(self, epoch: int) -> int:
        """Returns the number of steps before the first one of `epoch`, which is later than the epoch of `start`."""
        first = self.start.step
        steps = range(first, first + (epoch - self.start.epoch) * self.num_samples)  # batches of one sample at least
        return first + bisect_left(steps, epoch, key=lambda step: self._at(step).epoch)

    def samples_before(self, step: int) -> int:
        """Returns the samples consumed before `step`, over all processes and epochs; listed batches count as one."""
        return self._at(step).samples

    def samples_seen(self, step: int) -> int:
        """Returns the samples before `step`, if each epoch's batches have as many as those of the first."""
        if not self._is_batched:
            return self.samples_before(step)
        epoch, index = self.place(step)
        return epoch * sum(map(len, self.order(0))) + sum(map(len, self.order(epoch)[:index]))

    def epochs_before(self, step: int) -> float:
        """Returns the passes over the data before `step`. With `drop_last`, an epoch ends before its last sample.

        Of a stream, it is the number of passes that were read to their end.
        """
        epoch, index = self.place(step)
        return epoch + index / self.num_samples if self.stream is None else float(self.stream.epoch)

    def batch(self, step: int) -> list[int]:
        """Returns the dataset indices of the whole batch of `step`, over all processes."""
        epoch, start = self.place(step)
        stop = min(start + self._segment(step)[1], self.num_samples)
        if self.order is not None:
            listed = self.order(epoch)[start:stop]
            return list(itertools.chain(*listed)) if self._is_batched else listed
        if self.seed is None:
            return list(range(start, stop))
        indices = list[int]()
        while start < stop:
            number, offset = divmod(start, POSITIONS_AT_ONCE)
            indices += self._block(epoch, number)[offset : offset + stop - start].tolist()
            start = min((number + 1) * POSITIONS_AT_ONCE, stop)
        return indices

    def rank_batch(self, step: int) -> RankBatch:
        """Returns this process's part of the batch of `step`, padded to one sample for each micro-batch.

        With `pad`, all micro-batches are padded to one size. Padding repeats the batch's first sample, and its targets
        must be masked. So every process has something to compute, and none leaves the others waiting.
        """
        batch, rank, count = self.batch(step), self.process_index, self.num_processes
        size = len(batch)
        indices = batch[size * rank // count : size * (rank + 1) // count]
        at_most, at_least = self.micro_batch_size, 1
        if self.pad:
            largest = self.largest_rank_batch(self._segment(step)[1])
            at_most = at_least = -(-largest // -(-largest // at_most))
        micro_batches = -(-size // (count * at_most))
        missing = max(micro_batches * at_least - len(indices), 0)
        return RankBatch(indices + batch[:1] * missing, len(indices), micro_batches)

    def _order_block(self, epoch: int, number: int) -> NDArray[np.int64]:
        assert self.seed is not None
        first = number * POSITIONS_AT_ONCE
        positions = np.arange(first, min(first + POSITIONS_AT_ONCE, self.num_samples))
        return permute(positions, self.num_samples, derive_seed(self.seed, epoch))
