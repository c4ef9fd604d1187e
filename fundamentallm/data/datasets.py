"""Tokens as samples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from fundamentallm.config.schema import IGNORE_INDEX
from fundamentallm.data.tokenizers import num_bytes as count_bytes
from fundamentallm.errors import ConfigError

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, each (B, T) int64; targets are the inputs' next tokens."""

FINGERPRINT_BLOCK, FINGERPRINT_BLOCKS = 2**16, 2**8
"""Tokens in a block, and most blocks, that a fingerprint covers."""
WIDTHS = 64
"""Pairs are filled up to a multiple of so many inputs: few shapes to compile for, and to keep memory of."""


class TokenSamples(Dataset[Batch]):
    """Samples of tokens, made in whole batches.

    Attributes:
        sequence_length: most inputs of a sample.
        tokenizer: how the tokens were made, stored with checkpoints; None where unknown.
        num_bytes: UTF-8 bytes of the text of all targets, for bits per byte; None where unknown.
        end_of_text: the token after each document; None where there is none.
    """

    sequence_length: int
    tokenizer: Tokenizer | None
    num_bytes: int | None
    end_of_text: int | None

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        inputs, targets = self.__getitems__([index % len(self)])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch; torch's loader calls this instead of looping over samples."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """What the samples are, in 32 hexadecimal digits: equal for equal samples."""
        raise NotImplementedError

    def locate(self, index: int) -> tuple[str, NDArray[np.integer]]:
        """Where a sample's inputs are, for people to read, and their tokens."""
        raise NotImplementedError

    def opening(self) -> NDArray[np.integer]:
        """Tokens that a model can be shown to go on from."""
        raise NotImplementedError


class TokenDataset(TokenSamples):
    """Consecutive windows over a token array, in which every token but the first is a target exactly once.

    The last window is moved back to end at the last token; what it repeats is masked with `IGNORE_INDEX`.

    Args:
        tokens: 1-D integers, memory-mapped or not; read only where a sample lies.
        sequence_length: inputs of a sample.
        tokenizer: how the tokens were made; stored with checkpoints.
        num_bytes: UTF-8 bytes of the text of all targets, for bits per byte; None where unknown.
        end_of_text: the token after each document; None where there is none.

    Raises:
        ConfigError: if there are too few tokens for one sample, or a sample has none.

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

    def __init__(
        self,
        tokens: NDArray[np.integer],
        sequence_length: int,
        tokenizer: Tokenizer | None = None,
        num_bytes: int | None = None,
        end_of_text: int | None = None,
    ) -> None:
        if sequence_length < 1:
            raise ConfigError(f"sequence_length is {sequence_length}; allowed: at least 1.")
        if len(tokens) < sequence_length + 1:
            raise ConfigError(
                f"a part of the text has {len(tokens)} tokens; allowed: at least sequence_length + 1 = "
                f"{sequence_length + 1}. Give more text, a smaller data.sequence_length, or another data.train_split."
            )
        self.tokens, self.sequence_length = tokens, sequence_length
        self.tokenizer, self.num_bytes, self.end_of_text = tokenizer, num_bytes, end_of_text
        self._windows = sliding_window_view(np.asarray(tokens), sequence_length + 1)

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process that is not forked gets: not the windows, which would be written out one by one."""
        return {name: value for name, value in vars(self).items() if name != "_windows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._windows = sliding_window_view(np.asarray(self.tokens), self.sequence_length + 1)

    def fingerprint(self) -> str:
        """What the samples are, in 32 hexadecimal digits: equal for equal tokens and windows.

        Over every token up to 16.7 million, else over their number and that many, in blocks spread evenly: a text
        of any size takes milliseconds.
        """
        digest = hashlib.blake2b(f"{len(self.tokens)} {self.sequence_length} ".encode(), digest_size=16)
        return _digested(digest, self.tokens)

    def starts(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """Where in the tokens each sample's inputs begin."""
        wanted = np.asarray(indices, dtype=np.int64) * self.sequence_length
        return np.minimum(wanted, len(self._windows) - 1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self):,} samples of {self.sequence_length} tokens)"

    def locate(self, index: int) -> tuple[str, NDArray[np.integer]]:
        """The first and the last token of a sample's inputs."""
        start = int(self.starts([index])[0])
        stop = start + self.sequence_length
        return f"{start:,}-{stop - 1:,}", self.tokens[start:stop]

    def opening(self) -> NDArray[np.integer]:
        """The first few tokens."""
        return self.tokens[: min(32, self.sequence_length)]

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.sequence_length)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch in one gather."""
        length, starts = self.sequence_length, self.starts(indices)
        windows = self._windows[starts]
        pair = np.empty((2, len(starts), length), np.int64)
        pair[0], pair[1] = windows[:, :-1], windows[:, 1:]
        if len(self) - 1 in indices:  # which may have been moved back, and so repeats others
            repeated = np.asarray(indices, dtype=np.int64) * length - starts
            pair[1][np.arange(length) < repeated[:, None]] = IGNORE_INDEX
        inputs, targets = torch.from_numpy(pair).unbind()
        return inputs, targets


class PairDataset(TokenSamples):
    """Prompts with their answers: a sample each, of which the answer and the end-of-text token after it are targets.

    Samples are filled up on the right, to the longest of their batch and a multiple of `WIDTHS`, by inputs that no
    target looks at. What is longer than `sequence_length` inputs is cut off.

    Args:
        tokens: of all pairs, one after the other.
        rows: (pairs, 2): the token at which each answer begins, and the one after its end.
        sequence_length: most inputs of a sample.
        tokenizer: how the tokens were made.
        num_bytes: UTF-8 bytes of all answers; None where unknown.
        end_of_text: the last token of each pair.

    Attributes:
        num_cut: pairs of which something is cut off.
        num_lost: those of them that have no target left.

    Raises:
        ConfigError: if there are none, or none has an answer left.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        rows: NDArray[np.int64],
        sequence_length: int,
        tokenizer: Tokenizer | None = None,
        num_bytes: int | None = None,
        end_of_text: int | None = None,
    ) -> None:
        if len(rows) == 0:
            raise ConfigError("a part of the pairs is empty; give more of them, or another data.train_split.")
        self.tokens, self.rows, self.sequence_length = tokens, rows, sequence_length
        self.tokenizer, self.end_of_text = tokenizer, end_of_text
        starts, answers, ends = self._places(np.arange(len(rows)))
        stops = np.minimum(ends, starts + sequence_length + 1)
        self.num_lost = int((stops <= answers).sum())
        if self.num_lost == len(rows):
            raise ConfigError(
                f"no prompt leaves room for an answer in data.sequence_length = {sequence_length}; raise it."
            )
        cut = np.flatnonzero(stops < ends)
        self.num_cut = len(cut)
        self.num_bytes = num_bytes
        if num_bytes is not None and tokenizer is not None and len(cut):
            lost = np.concatenate([tokens[max(stops[i], answers[i]) : ends[i]] for i in cut])
            # At once, since each call looks at all of the vocabulary.
            self.num_bytes = num_bytes - count_bytes(tokenizer, lost, end_of_text)

    def _places(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Where each pair begins, its answer begins, and it ends."""
        starts = np.where(indices > 0, self.rows[indices - 1, 1], 0)
        return starts, self.rows[indices, 0], self.rows[indices, 1]

    def fingerprint(self) -> str:
        """What the samples are; as `TokenDataset.fingerprint`, over the tokens and where the pairs are."""
        digest = hashlib.blake2b(f"pairs {len(self.rows)} {self.sequence_length} ".encode(), digest_size=16)
        _digested(digest, self.rows.reshape(-1))
        return _digested(digest, self.tokens)

    def locate(self, index: int) -> tuple[str, NDArray[np.integer]]:
        """The first and the last token of a pair, as far as it is trained on."""
        starts, _, ends = self._places(np.array([index]))
        start, stop = int(starts[0]), int(min(ends[0], starts[0] + self.sequence_length))
        return f"{start:,}-{stop - 1:,}", self.tokens[start:stop]

    def opening(self) -> NDArray[np.integer]:
        """The first prompt."""
        return self.tokens[: self.rows[0, 0]][-self.sequence_length :]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch in one gather."""
        starts, answers, ends = self._places(np.asarray(indices, dtype=np.int64))
        stops = np.minimum(ends, starts + self.sequence_length + 1)
        longest = max(int((stops - starts).max()) - 1, 1)
        width = min(-(-longest // WIDTHS) * WIDTHS, self.sequence_length)
        places = starts[:, None] + np.arange(width + 1)
        windows = self.tokens[np.minimum(places, len(self.tokens) - 1)]
        pair = np.empty((2, len(starts), width), np.int64)
        # Any token does to fill up: attention is causal.
        pair[0], pair[1] = windows[:, :-1], windows[:, 1:]
        of_answer = (places >= answers[:, None]) & (places < stops[:, None])
        pair[1][~of_answer[:, 1:]] = IGNORE_INDEX
        inputs, targets = torch.from_numpy(pair)
        return inputs, targets


class MixedDataset(TokenSamples):
    """Several datasets as one, each as often as its weight says.

    An epoch is the shortest in which each sample of each dataset comes at least once; those of a dataset that its
    weight asks more of come several times, some of them once more than others. Which sample an index means depends on
    nothing else, so that order and resuming are the sampler's.

    Args:
        datasets: by name; all with the same sequence length and tokenizer.
        weights: parts of the samples that are to come from each; None: each sample once.

    Attributes:
        num_cut: pairs of which something is cut off.
        num_lost: those of them that have no target left.

    Raises:
        ConfigError: if the weights make an epoch too long to count.
    """

    def __init__(self, datasets: Mapping[str, TokenSamples], weights: Sequence[float] | None = None) -> None:
        self.names, self.datasets = list(datasets), list(datasets.values())
        first = self.datasets[0]
        self.sequence_length, self.tokenizer = first.sequence_length, first.tokenizer
        self.end_of_text = first.end_of_text
        sizes = [dataset.num_bytes for dataset in self.datasets]
        self.num_bytes = sum(size or 0 for size in sizes) if None not in sizes else None
        self.sizes = np.array([len(dataset) for dataset in self.datasets])
        self.num_cut = sum(getattr(dataset, "num_cut", 0) for dataset in self.datasets)
        self.num_lost = sum(getattr(dataset, "num_lost", 0) for dataset in self.datasets)
        self.counts = self.sizes
        if weights is not None:
            per_weight, rare = max(
                (len(dataset) / weight, name)
                for dataset, weight, name in zip(self.datasets, weights, self.names, strict=True)
            )
            if per_weight * sum(weights) * int(self.sizes.max()) >= 2.0**62:  # `_which` multiplies them
                raise ConfigError(
                    f"source has {rare!r} with so small a weight that an epoch, in which each of its samples comes, "
                    f"has {per_weight * sum(weights):.3g} samples; give it more, or leave it out."
                )
            wanted = np.array([round(per_weight * weight) for weight in weights])
            self.counts = np.maximum(self.sizes, wanted)
        self._ends = self.counts.cumsum()

    def _which(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each index, the dataset and the sample in it; a dataset's repetitions are spread over it evenly."""
        of = np.searchsorted(self._ends, indices, side="right")
        place = indices - (self._ends - self.counts)[of]
        return of, place * self.sizes[of] // self.counts[of]

    def fingerprint(self) -> str:
        """What the samples are: those of each dataset, and how often they come."""
        of_each = [dataset.fingerprint() for dataset in self.datasets]
        return hashlib.blake2b(repr((of_each, self.counts.tolist())).encode(), digest_size=16).hexdigest()

    def locate(self, index: int) -> tuple[str, NDArray[np.integer]]:
        """The dataset, and where in it."""
        of, sample = (int(found[0]) for found in self._which(np.array([index])))
        where, ids = self.datasets[of].locate(sample)
        return f"{self.names[of]} {where}", ids

    def opening(self) -> NDArray[np.integer]:
        """That of the first dataset."""
        return self.datasets[0].opening()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch, in one gather from each dataset, as wide as the widest."""
        of, samples = self._which(np.asarray(indices, dtype=np.int64))
        rows = [np.flatnonzero(of == number) for number in range(len(self.datasets))]
        parts = [(where, self.datasets[n].__getitems__(samples[where])) for n, where in enumerate(rows) if len(where)]  # type: ignore[arg-type]
        width = max(part[0].shape[1] for _, part in parts)
        inputs = torch.zeros(len(of), width, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORE_INDEX)
        for where, (x, y) in parts:
            inputs[where, : x.shape[1]], targets[where, : x.shape[1]] = x, y
        return inputs, targets


def _digested(digest: Any, tokens: NDArray[np.integer]) -> str:
    last = max(len(tokens) - FINGERPRINT_BLOCK, 0)
    starts = range(0, len(tokens), FINGERPRINT_BLOCK)
    if len(starts) > FINGERPRINT_BLOCKS:
        starts = range(0, last + 1, last // (FINGERPRINT_BLOCKS - 1))
    for start in starts:
        # As int64, so that one text has one fingerprint however its ids are stored.
        digest.update(tokens[start : start + FINGERPRINT_BLOCK].astype(np.int64).tobytes())
    return str(digest.hexdigest())


def fingerprint(dataset: object) -> str | None:
    """What a dataset's own `fingerprint()` says its samples are, or None where it has none."""
    own = getattr(dataset, "fingerprint", None)
    return str(own()) if callable(own) else None
