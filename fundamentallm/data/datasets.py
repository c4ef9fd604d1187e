"""Tokens as samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from fundamentallm.config import IGNORE_INDEX
from fundamentallm.errors import ConfigError

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, each (B, T) int64; targets are the inputs' next tokens."""

FINGERPRINT_BLOCK, FINGERPRINT_BLOCKS = 2**16, 2**8
"""Tokens in a block, and most blocks, that a fingerprint covers."""


class TokenDataset(Dataset[Batch]):
    """Consecutive windows over a token array, in which every token but the first is a target exactly once.

    The last window is moved back to end at the last token; what it repeats is masked with `IGNORE_INDEX`.

    Args:
        tokens: 1-D integers, memory-mapped or not; read only where a sample lies.
        sequence_length: inputs of a sample.
        tokenizer: how the tokens were made; stored with checkpoints.
        num_bytes: UTF-8 bytes of the text of all targets, for bits per byte; None where unknown.

    Raises:
        ConfigError: if there are too few tokens for one sample.

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
    ) -> None:
        if len(tokens) < sequence_length + 1:
            raise ConfigError(
                f"a part of the text has {len(tokens)} tokens; allowed: at least sequence_length + 1 = "
                f"{sequence_length + 1}. Give more text, a smaller data.sequence_length, or another data.train_split."
            )
        self.tokens, self.sequence_length = tokens, sequence_length
        self.tokenizer, self.num_bytes = tokenizer, num_bytes
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
        last = max(len(self.tokens) - FINGERPRINT_BLOCK, 0)
        starts = range(0, len(self.tokens), FINGERPRINT_BLOCK)
        if len(starts) > FINGERPRINT_BLOCKS:
            starts = range(0, last + 1, last // (FINGERPRINT_BLOCKS - 1))
        for start in starts:
            # As int64, so that one text has one fingerprint however its ids are stored.
            digest.update(self.tokens[start : start + FINGERPRINT_BLOCK].astype(np.int64).tobytes())
        return digest.hexdigest()

    def starts(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """Where in the tokens each sample's inputs begin."""
        wanted = np.asarray(indices, dtype=np.int64) * self.sequence_length
        return np.minimum(wanted, len(self._windows) - 1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self):,} samples of {self.sequence_length} tokens)"

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.sequence_length)

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        inputs, targets = self.__getitems__([index % len(self)])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch in one gather; torch's loader calls this instead of looping over samples."""
        wanted = np.asarray(indices, dtype=np.int64) * self.sequence_length
        starts = np.minimum(wanted, len(self._windows) - 1)
        windows = self._windows[starts]
        pair = np.empty((2, len(starts), self.sequence_length), np.int64)
        pair[0], pair[1] = windows[:, :-1], windows[:, 1:]
        repeated = wanted - starts
        if repeated.any():
            pair[1][np.arange(self.sequence_length) < repeated[:, None]] = IGNORE_INDEX
        inputs, targets = torch.from_numpy(pair)
        return inputs, targets


def fingerprint(dataset: object) -> str | None:
    """What a dataset's own `fingerprint()` says its samples are, or None where it has none."""
    own = getattr(dataset, "fingerprint", None)
    return str(own()) if callable(own) else None
