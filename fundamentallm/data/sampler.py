"""Which samples an optimizer step trains on: a pure function of (seed, epoch, place), on any number of processes."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

POSITIONS_AT_ONCE = 4096
"""Places of the order computed, and kept, at once."""


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from whole numbers: equal parts, equal seed; else unrelated ones."""
    text = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def permute(positions: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Where a pseudo-random permutation of range(size) takes each position: O(1) memory, O(1) a position.

    A Feistel network over the next power of four, walked until it lands inside (cycle-walking; Black and
    Rogaway, 2002). `torch.randperm` would need the whole epoch to know one batch of it.
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
    """Where an order of batches begins: at an optimizer step, at a place within an epoch, after some samples."""

    step: int = 0
    epoch: int = 0
    place: int = 0
    samples: int = 0


class Share(NamedTuple):
    """What one process computes of a step's batch."""

    indices: list[int]
    """Of its samples, and of what they are filled up with."""
    rows: int
    """Samples of its own, which come first; 0 where there are fewer than processes."""
    micro_batches: int
    """How many parts it is computed in; the same on all processes."""


class _Stretch(NamedTuple):
    """Batches of one size from a place on; to where the next stretch starts, if there is one."""

    start: Start
    batch_size: int
    num_samples: int
    drop_last: bool

    def steps_over(self, samples: int) -> int:
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    @property
    def begun(self) -> int:
        """Steps of the epoch that `start` lies in."""
        return self.steps_over(self.num_samples - self.start.place)

    def place(self, step: int) -> tuple[int, int]:
        since = step - self.start.step
        if since < self.begun:
            return self.start.epoch, self.start.place + since * self.batch_size
        epochs, step_in_epoch = divmod(since - self.begun, self.steps_over(self.num_samples))
        return self.start.epoch + 1 + epochs, step_in_epoch * self.batch_size

    def steps_before_epoch(self, epoch: int) -> int:
        epochs = epoch - self.start.epoch - 1
        return self.start.step + self.begun + epochs * self.steps_over(self.num_samples)

    def samples_before(self, step: int) -> int:
        epoch, place = self.place(step)
        if epoch == self.start.epoch:
            return self.start.samples + place - self.start.place
        begun = min(self.begun * self.batch_size, self.num_samples - self.start.place)
        whole = min(self.steps_over(self.num_samples) * self.batch_size, self.num_samples)
        return self.start.samples + begun + (epoch - self.start.epoch - 1) * whole + place


class StepSampler:
    """Yields, for each optimizer step, the dataset indices of one process's share of its batch.

    A batch is the next places of the epoch's order; each process takes an equal, contiguous part of them (sizes
    differ by one at most). The epoch's last batch may be short.

    Args:
        num_samples: size of the dataset.
        batch_size: samples per step over all processes.
        seed: of the order; None for the dataset's own order.
        process_index: whose share.
        num_processes: how many share a batch.
        micro_batch_size: most samples of a share to compute at once; None: all.
        drop_last: leave out an epoch's short last batch.
        is_even: fill the micro-batches of one batch size up to as many samples, of which no target counts.
        schedule: later batch sizes: pairs of the number of steps done and the size from there on, in order.

    Attributes:
        start: where the batches begin; a run whose batch size was changed goes on from where it was.
        micro_batch_size: most samples of a share to compute at once.
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
        is_even: bool = False,
        schedule: Sequence[Sequence[int]] = (),
    ) -> None:
        self.num_samples, self.batch_size, self.seed, self.drop_last = num_samples, batch_size, seed, drop_last
        self.schedule = [list(pair) for pair in schedule]
        self.sizes = [batch_size, *(size for _, size in self.schedule)]
        self.process_index, self.num_processes, self._is_even = process_index, num_processes, is_even
        self.micro_batch_size = micro_batch_size or max(self.sizes)
        first = _Stretch(Start(), batch_size, num_samples, drop_last)
        self.steps_per_epoch = first.steps_over(num_samples)
        self.start = Start()
        self._block: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    @property
    def largest_share(self) -> int:
        """Most samples that a process has in a step."""
        return self._largest_share(max(self.sizes))

    def _largest_share(self, batch_size: int) -> int:
        return -(-min(batch_size, self.num_samples) // self.num_processes)

    @property
    def start(self) -> Start:
        """Where the batches begin."""
        return self._stretches[0].start

    @start.setter
    def start(self, start: Start) -> None:
        size = [size for step, size in [(0, self.batch_size), *self.schedule] if step <= start.step][-1]
        self._stretches = [_Stretch(start, size, self.num_samples, self.drop_last)]
        for step, size in self.schedule:
            if step > start.step:  # the same order of samples goes on, in batches of another size
                begins = Start(step, *self.place(step), self.samples_before(step))
                self._stretches.append(_Stretch(begins, size, self.num_samples, self.drop_last))

    def _stretch(self, step: int) -> _Stretch:
        """The one whose batches `step` has."""
        for stretch in reversed(self._stretches):
            if stretch.start.step <= step:
                return stretch
        return self._stretches[0]

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, place in its order) at which the batch of `step` begins; place 0 is the beginning of an epoch."""
        return self._stretch(step).place(step)

    def steps_before_epoch(self, epoch: int) -> int:
        """Optimizer steps before the first one of `epoch`, which comes after the one that `start` lies in."""
        for stretch, after in itertools.pairwise(self._stretches):
            if (step := stretch.steps_before_epoch(epoch)) <= after.start.step:
                return step
        return self._stretches[-1].steps_before_epoch(epoch)

    def samples_before(self, step: int) -> int:
        """Samples consumed, over all processes and epochs, before `step`."""
        return self._stretch(step).samples_before(step)

    def epochs_before(self, step: int) -> float:
        """Passes over the data done before `step`, in samples (with `drop_last`, an epoch ends before its last one)."""
        epoch, place = self.place(step)
        return epoch + place / self.num_samples

    def sizes_from(self, step: int) -> str:
        """The batch size of `step`, and the last one if it is another, for people to read."""
        now, last = self._stretch(step).batch_size, self._stretches[-1].batch_size
        return f"{now}" if now == last else f"{now} to {last}"

    def batch(self, step: int) -> list[int]:
        """Dataset indices of the whole batch of `step`, over all processes."""
        return self._indices(*self._places(step))

    def share(self, step: int) -> Share:
        """This process's share of the batch of `step`, filled up to one for each micro-batch (with `is_even`, to all).

        The filling is the batch's first sample, and whoever computes it masks its targets. Thus every process
        always has something to compute, and none leaves the others waiting.
        """
        epoch, start, stop = self._places(step)
        size, index, count = stop - start, self.process_index, self.num_processes
        first, end = start + size * index // count, start + size * (index + 1) // count
        indices = self._indices(epoch, first, end)
        at_most, at_least = self.micro_batch_size, 1
        if self._is_even:
            largest = self._largest_share(self._stretch(step).batch_size)
            at_most = at_least = -(-largest // -(-largest // at_most))
        micro_batches = -(-size // (count * at_most))
        lacking = micro_batches * at_least - len(indices)
        if lacking > 0:
            indices += self._indices(epoch, start, start + 1) * lacking
        return Share(indices, end - first, micro_batches)

    def _places(self, step: int) -> tuple[int, int, int]:
        """The epoch of the batch of `step`, and the places in its order at which it begins and ends."""
        stretch = self._stretch(step)
        epoch, start = stretch.place(step)
        return epoch, start, min(start + stretch.batch_size, self.num_samples)

    def _indices(self, epoch: int, start: int, stop: int) -> list[int]:
        if self.seed is None:
            return list(range(start, stop))
        indices: list[int] = []
        while start < stop:
            number, offset = divmod(start, POSITIONS_AT_ONCE)
            take = min(POSITIONS_AT_ONCE - offset, stop - start)
            indices += self._order_block(epoch, number)[offset : offset + take].tolist()
            start += take
        return indices

    def _order_block(self, epoch: int, number: int) -> NDArray[np.int64]:
        if self._block is None or self._block[0] != (epoch, number):
            assert self.seed is not None
            first = number * POSITIONS_AT_ONCE
            places = np.arange(first, min(first + POSITIONS_AT_ONCE, self.num_samples))
            self._block = (epoch, number), permute(places, self.num_samples, derive_seed(self.seed, epoch))
        return self._block[1]
