"""Tokens as samples."""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from fundamentallm.config.schema import IGNORE_INDEX
from fundamentallm.data.corpus import Tokens
from fundamentallm.data.sampler import permute
from fundamentallm.data.tokenizers import num_bytes
from fundamentallm.distributed.batches import tensors
from fundamentallm.errors import ConfigError, Problem

Batch = tuple[Any, Tensor]
"""Inputs and targets, each (B, T) int64; targets are the inputs' next tokens. (Packed inputs are a mapping of two.)"""
Indices = NDArray[np.int64]

FINGERPRINT_BLOCK, FINGERPRINT_BLOCKS = 2**16, 2**8
"""Tokens in a block, and maximum number of blocks, that a fingerprint covers: 16.7 million tokens."""
WIDTHS = 64
"""Pairs are padded to a multiple of this many inputs, so that few shapes are compiled and cached."""


class Tokenized:
    """Base of datasets of tokens."""

    sequence_length: int  # maximum number of inputs of a sample
    tokenizer: Tokenizer | None  # stored with checkpoints
    end_of_text: int | None  # the token after each document


class TokenDataset(Tokenized, Dataset[Batch]):
    """Consecutive windows over a token array, in which every token but the first is a target exactly once.

    The last window is moved back to end at the last token. The targets that it repeats are masked with `IGNORE_INDEX`.

    Args:
        tokens: 1-D integers, memory-mapped or not; read only where a sample lies.
        sequence_length: inputs of a sample.
        tokenizer: the tokenizer of the tokens; stored with checkpoints.
        num_bytes: UTF-8 bytes of the text of all targets, for bits per byte; None if unknown.
        end_of_text: the token after each document; None if there is none.

    Raises:
        ConfigError: if there are too few tokens for one sample, or `sequence_length` is below 1.

    Examples:
        >>> import numpy as np
        >>> from fundamentallm import TokenDataset
        >>> dataset = TokenDataset(np.arange(10), sequence_length=4)
        >>> dataset
        TokenDataset(3 samples of 4 tokens)
        >>> inputs, targets = dataset[2]
        >>> inputs.tolist(), targets.tolist()
        ([5, 6, 7, 8], [-100, -100, -100, 9])
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(dataset, batch_size=2, shuffle=True)  # for a Trainer
    """

    num_cut = num_lost = 0  # pairs that are cut off, and those of them that have no target left
    is_packed = False  # whether several pairs share a sample
    turns: NDArray[np.int64] | None = None

    def __init__(
        self,
        tokens: NDArray[np.integer],
        sequence_length: int,
        tokenizer: Tokenizer | None = None,
        num_bytes: int | None = None,
        end_of_text: int | None = None,
    ) -> None:
        if not 1 <= sequence_length < len(tokens):
            reason = f"and a part of the text has {len(tokens)} tokens"
            allowed, advice = "less than the tokens of each part", "Give more text, or another data.train_split."
            raise ConfigError(Problem("data.sequence_length", sequence_length, allowed, advice, reason))
        self.tokens, self.sequence_length = tokens, sequence_length
        self.tokenizer, self.num_bytes, self.end_of_text = tokenizer, num_bytes, end_of_text

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.sequence_length)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self):,} samples of {self.sequence_length} tokens)"

    def _segments(self, indices: Indices) -> tuple[Indices, Indices, Indices]:
        """Returns each sample's first token, its first target, and the token after its last target."""
        begins = indices * self.sequence_length
        starts = np.minimum(begins, len(self.tokens) - self.sequence_length - 1)
        return starts, begins + 1, starts + self.sequence_length + 1

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        inputs, targets = self.__getitems__([index % len(self)])
        first = {name: each[0] for name, each in inputs.items()} if self.is_packed else inputs[0]
        return first, targets[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Returns a whole batch by one gather; torch's loader calls this. Shorter samples are padded on the right."""
        starts, firsts, stops = self._segments(np.asarray(indices, dtype=np.int64))
        width = int(_width((stops - starts).max() - 1, self.sequence_length))
        positions = starts[:, None] + np.arange(width + 1)
        # Attention is causal, so any token will do as padding.
        windows = self.tokens[np.minimum(positions, len(self.tokens) - 1)]
        pair = np.empty((2, len(starts), width), np.int64)
        pair[0], pair[1] = windows[:, :-1], windows[:, 1:]
        is_target = (positions >= firsts[:, None]) & (positions < stops[:, None])
        if self.turns is not None:
            is_target &= _within(self.turns, positions)
        pair[1][~is_target[:, 1:]] = IGNORE_INDEX
        inputs, targets = torch.from_numpy(pair).unbind()
        return inputs, targets

    def locate(self, index: int) -> tuple[str, NDArray[np.integer]]:
        """Returns the first and last position of a sample's inputs, for people to read, and their tokens."""
        starts, _, stops = self._segments(np.array([index]))
        start, stop = int(starts[0]), int(min(stops[0], starts[0] + self.sequence_length))
        return f"{start:,}-{stop - 1:,}", self.tokens[start:stop]

    def fingerprint(self) -> str:
        """Returns 32 hexadecimal digits that are equal for equal samples."""
        return _digest(f"{len(self.tokens)} {self.sequence_length} ", self.tokens)


class PairDataset(TokenDataset):
    """Prompts with their answers, each pair a sample. Targets are the answer and the end-of-text token after it.

    A batch is as wide as its longest sample, rounded up to a multiple of `WIDTHS`. A pair is cut off after
    `sequence_length` inputs. Of chats, only the tokens of the assistant's turns are targets.
    Raises ConfigError if no pair has a target left.
    """

    def __init__(
        self, pairs: Tokens, sequence_length: int, tokenizer: Tokenizer | None = None, end_of_text: int | None = None
    ) -> None:
        tokens, rows, self.num_bytes, turns = pairs
        assert rows is not None
        self.tokens, self.rows, self.turns, self.sequence_length = tokens, rows, turns, sequence_length
        self.tokenizer, self.end_of_text = tokenizer, end_of_text
        _, answers, stops = self._segments(np.arange(len(rows)))
        ends = rows[:, 1]
        cut = np.flatnonzero(stops < ends)
        self.num_cut, self.num_lost = len(cut), int((stops <= answers).sum())
        if self.num_lost == len(rows):
            reason = f"and no answer is left in a part of {len(rows)} pairs"
            advice = "Give more pairs, or another data.train_split."
            raise ConfigError(Problem("data.sequence_length", sequence_length, "more than the prompts", advice, reason))
        if self.num_bytes is not None and tokenizer is not None and len(cut):
            positions = np.concatenate([np.arange(max(stops[i], answers[i]), ends[i]) for i in cut])
            lost = tokens[positions if turns is None else positions[_within(turns, positions)]]
            # One call for all, since each call goes through the whole vocabulary.
            self.num_bytes -= num_bytes(tokenizer, lost, end_of_text)

    def __len__(self) -> int:
        return len(self.rows)

    def _segments(self, indices: Indices) -> tuple[Indices, Indices, Indices]:
        starts = np.where(indices > 0, self.rows[indices - 1, 1], 0)
        answers, ends = self.rows[indices, 0], self.rows[indices, 1]
        return starts, answers, np.minimum(ends, starts + self.sequence_length + 1)

    def fingerprint(self) -> str:
        """Returns the same of the tokens, the pairs' positions and the sequence length."""
        turns = () if self.turns is None else (self.turns,)
        return _digest(f"pairs {len(self.rows)} {self.sequence_length} ", self.rows.reshape(-1), self.tokens, *turns)


class PackedDataset(PairDataset):
    """Pairs packed into windows of at most `sequence_length` inputs. Each window is a sample.

    Inputs are a mapping of "input_ids" and "position_ids". Positions restart at 0 with each pair, and with the padding
    after the last one. Which pairs a window has follows from all lengths. Pairs without a target are left out.
    """

    is_packed = True

    def __init__(
        self, pairs: Tokens, sequence_length: int, tokenizer: Tokenizer | None = None, end_of_text: int | None = None
    ) -> None:
        super().__init__(pairs, sequence_length, tokenizer, end_of_text)
        starts, answers, stops = self._segments(np.arange(len(self.rows)))
        kept = np.flatnonzero(stops > np.maximum(answers, starts + 1))
        self.lengths = (stops - starts - 1)[kept]
        windows = best_fit(self.lengths, sequence_length)
        self.pairs = kept[np.argsort(windows, kind="stable")]  # those of a window are neighbours
        self.bounds = np.concatenate([[0], np.bincount(windows).cumsum()])

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Returns a whole batch by one gather, as wide as its fullest window, rounded up to a multiple of `WIDTHS`."""
        windows = [self.pairs[self.bounds[index] : self.bounds[index + 1]] for index in indices]
        starts, answers, stops = self._segments(np.concatenate(windows))
        lengths = stops - starts - 1
        ends = lengths.cumsum()
        sizes = np.diff(ends[np.cumsum([len(window) for window in windows]) - 1], prepend=0)
        columns = np.arange(_width(sizes.max(), self.sequence_length)) - sizes[:, None]
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        nexts = np.repeat(starts, lengths) + positions + 1
        is_target = nexts >= np.repeat(answers, lengths) if self.turns is None else _within(self.turns, nexts)
        batch = np.zeros((3, *columns.shape), np.int64)
        batch[1], batch[2] = columns, IGNORE_INDEX
        targets = np.where(is_target, self.tokens[nexts].astype(np.int64), IGNORE_INDEX)
        batch[:, columns < 0] = self.tokens[nexts - 1], positions, targets
        ids, position_ids, labels = torch.from_numpy(batch).unbind()
        return {"input_ids": ids, "position_ids": position_ids}, labels

    def locate(self, index: int) -> tuple[str, NDArray[np.integer]]:
        """Returns the same of each pair of a window, with the last token of each."""
        starts, _, stops = self._segments(self.pairs[self.bounds[index] : self.bounds[index + 1]])
        spans = list(zip(starts, stops, strict=True))
        where = ", ".join(f"{start:,}-{stop - 1:,}" for start, stop in spans)
        return where, np.concatenate([self.tokens[start:stop] for start, stop in spans])

    def fingerprint(self) -> str:
        """Returns the same of the pairs, and of their windows."""
        return _digest(f"packed {super().fingerprint()} ", self.pairs, self.bounds)

    def describe(self, batch_size: int) -> str:
        """Returns a line about the windows, and the share of padding that shuffled batches of unpacked pairs have."""
        count, length, kind = len(self.pairs), self.sequence_length, "pairs" if self.turns is None else "chats"
        shuffled = self.lengths[permute(np.arange(count), count, 0)]
        widths = _width(np.maximum.reduceat(shuffled, np.arange(0, count, batch_size)), length)
        before = 1 - shuffled.sum() / np.repeat(widths, batch_size)[:count].sum()
        after = 1 - shuffled.sum() / (len(self) * length)
        about = f"{len(self):,} windows of {length:,} tokens, {count / len(self):.1f} in each"
        return f"{count:,} {kind} are packed into {about}; padding is {after:.1%}, unpacked {before:.1%}"


class MixedDataset(TokenDataset):
    """Several datasets of one tokenizer as one, mixed by weight; without `weights`, each sample occurs once.

    An epoch is the shortest in which each sample of each dataset occurs at least once. Samples of an over-weighted
    dataset are repeated, some once more than others. The sample behind an index is fixed, so shuffling and resuming
    are the sampler's task alone.
    """

    def __init__(self, datasets: Mapping[str, TokenDataset], weights: Sequence[float] | None = None) -> None:
        self.names, self.datasets = list(datasets), list(datasets.values())
        first = self.datasets[0]
        self.sequence_length, self.tokenizer = first.sequence_length, first.tokenizer
        self.end_of_text, self.is_packed = first.end_of_text, first.is_packed
        sizes = [dataset.num_bytes for dataset in self.datasets]
        self.num_bytes = sum(size or 0 for size in sizes) if None not in sizes else None
        self.num_cut = sum(dataset.num_cut for dataset in self.datasets)
        self.num_lost = sum(dataset.num_lost for dataset in self.datasets)
        self.sizes = self.counts = np.array([len(dataset) for dataset in self.datasets])
        if weights is not None:
            per_weight = max(len(dataset) / weight for dataset, weight in zip(self.datasets, weights, strict=True))
            self.counts = np.maximum(self.sizes, [round(per_weight * weight) for weight in weights])
        self._ends = self.counts.cumsum()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, indices: Indices) -> tuple[Indices, Indices]:
        """Returns the dataset of each index and the sample in it. A dataset's repetitions are spread evenly."""
        numbers = np.searchsorted(self._ends, indices, side="right")
        positions = indices - (self._ends - self.counts)[numbers]
        return numbers, positions * self.sizes[numbers] // self.counts[numbers]

    def fingerprint(self) -> str:
        """Returns the same of all datasets, and how often their samples occur."""
        return _digest(repr(([dataset.fingerprint() for dataset in self.datasets], self.counts.tolist())))

    def locate(self, index: int) -> tuple[str, NDArray[np.integer]]:
        """Returns the name of the dataset and the position in it, and the tokens."""
        number, sample = (int(found[0]) for found in self._find(np.array([index])))
        where, ids = self.datasets[number].locate(sample)
        return f"{self.names[number]} {where}", ids

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        numbers, samples = self._find(np.asarray(indices, dtype=np.int64))
        rows = {number: np.flatnonzero(numbers == number) for number in np.unique(numbers)}
        batches = {number: self.datasets[number].__getitems__(samples[at].tolist()) for number, at in rows.items()}
        width = max(targets.shape[1] for _, targets in batches.values())
        inputs = torch.zeros(1 + self.is_packed, len(numbers), width, dtype=torch.int64)
        targets = torch.full_like(inputs[0], IGNORE_INDEX)
        for number, (x, y) in batches.items():
            targets[rows[number], : y.shape[1]] = y
            for whole, part in zip(inputs, tensors(x), strict=True):
                whole[rows[number], : y.shape[1]] = part
        return {"input_ids": inputs[0], "position_ids": inputs[1]} if self.is_packed else inputs[0], targets


def opening(sample: Batch) -> list[int]:
    """Returns the prompt of a sample; if it has none, its first tokens."""
    inputs: Tensor = sample[0]["input_ids"] if isinstance(sample[0], Mapping) else sample[0]
    first = int((sample[1] != IGNORE_INDEX).int().argmax())
    return inputs[: first + 1 if first else 32].tolist()


def best_fit(lengths: Indices, capacity: int) -> Indices:
    """Returns the window of each sample: the longest first, each in the fullest window of `capacity` that has room.

    (Best fit decreasing: no more than 11/9 of the fewest windows possible, and 4. Johnson et al., 1974.)
    """
    windows, numbers, order = np.empty(len(lengths), np.int64), itertools.count(), np.argsort(-lengths, kind="stable")
    with_room, rooms = defaultdict[int, list[int]](list), [capacity]  # windows by the room left; a new one has all
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(rooms, length)
        room = rooms[at]
        windows[index] = window = with_room[room].pop() if room < capacity else next(numbers)
        if room < capacity and not with_room[room]:
            del rooms[at]
        if not with_room[room - length]:
            insort(rooms, room - length)
        with_room[room - length].append(window)
    return windows


def _width(longest: Any, sequence_length: int) -> Any:
    """Returns the width of batches with these longest samples."""
    return np.minimum(-(-np.maximum(longest, 1) // WIDTHS) * WIDTHS, sequence_length)


def _within(turns: NDArray[np.int64], positions: Indices) -> NDArray[np.bool_]:
    """Returns whether each position is in one of the turns."""
    return np.asarray(np.searchsorted(turns, positions, side="right") % 2, bool)


def _digest(header: str, *arrays: NDArray[np.integer]) -> str:
    """Returns the digest of a header and of arrays; if they are long, of blocks that are spread evenly."""
    digest: Any = hashlib.blake2b(header.encode(), digest_size=16)
    for array in arrays:
        starts = range(0, len(array), FINGERPRINT_BLOCK)
        if len(starts) > FINGERPRINT_BLOCKS:
            last = len(array) - FINGERPRINT_BLOCK
            starts = range(0, last + 1, last // (FINGERPRINT_BLOCKS - 1))
        for start in starts:
            # As int64, so that the type in which the ids are stored does not matter.
            digest.update(array[start : start + FINGERPRINT_BLOCK].astype(np.int64).tobytes())
    return str(digest.hexdigest())


def fingerprint(*datasets: Any) -> str | None:
    """Returns a dataset's own `fingerprint()`, or None if it has none; of several, one digest of all."""
    own = [str(each.fingerprint()) if callable(getattr(each, "fingerprint", None)) else None for each in datasets]
    if len(own) < 2 or not any(own):
        return own[0] if own else None
    return _digest(repr((own, [len(each) for each in datasets])))  # that of their `MixedDataset`
