"""Text that is tokenized as it is read and packed into windows: `data.streaming`."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from fundamentallm.config.files import find_source
from fundamentallm.config.schema import Config, DataConfig
from fundamentallm.data.corpus import Corpus, load_validation
from fundamentallm.data.datasets import Batch, TokenDataset, Tokenized, TokenSamples
from fundamentallm.data.encoding import encode_rows
from fundamentallm.data.loaders import collate, corpus_samples
from fundamentallm.data.sampler import derive_seed
from fundamentallm.data.sources import BETWEEN, Piece, read_source, reads_special_tokens
from fundamentallm.data.tokenizers import create_tokenizer, num_bytes, num_ids, with_unknown
from fundamentallm.errors import ConfigError, Problem


class TextStream(Tokenized, IterableDataset[Batch]):
    """Yields windows of `data.sequence_length` tokens; every token but the first is a target exactly once.

    What is left of the tokens at the end of a pass begins the next one. A place within a file is found again by reading
    the file up to it, without tokenizing.

    Args:
        config: the section `data`.
        seed: of the shuffle buffer.
        say: prints a line about a bad row; None: nothing is printed.
    """

    def __init__(self, config: DataConfig, seed: int, say: Callable[[str], None] | None = None) -> None:
        self.config, self.seed, self.say = config, seed, say
        self.source = find_source(config, str(config.source))
        self.sequence_length = config.sequence_length
        self.tokenizer = tokenizer = create_tokenizer(config.tokenizer, (), config.end_of_text)
        tokenizer.encode_special_tokens = not reads_special_tokens(config)
        self._complete = with_unknown(tokenizer)
        self.end_of_text = None if config.end_of_text is None else tokenizer.token_to_id(config.end_of_text)
        self.epoch = self._file = self._pieces = self._drawn = 0
        self._rest, self._buffer = np.empty(0, np.int32), list[NDArray[np.int32]]()

    def set_epoch(self, epoch: int) -> None:
        """Sets the number of passes completed."""
        self.epoch = epoch

    def fingerprint(self) -> str:
        """Returns the digest of what decides about the tokens, apart from the settings and what the files hold."""
        files = [(file.name, file.stat().st_size) for file in self.source.files]
        reading = reads_special_tokens(self.config), self.config.unknown_tokens
        about = repr((self.source.kind, files or self.source.name, reading))
        assert self.tokenizer is not None
        return hashlib.blake2b(about.encode() + self.tokenizer.to_str().encode(), digest_size=16).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Returns the place, and the tokens that were read and not yielded."""
        numbers = {"file": self._file, "pieces": self._pieces, "drawn": self._drawn}
        buffer = np.array(self._buffer, np.int32).reshape(-1, self.sequence_length + 1)
        return numbers | {"rest": torch.from_numpy(self._rest.copy()), "buffer": torch.from_numpy(buffer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`. Raises ValueError if it is not one of this stream."""
        numbers, rest, buffer = [state[name] for name in ("file", "pieces", "drawn")], state["rest"], state["buffer"]
        fits = buffer.shape[1:] == (self.sequence_length + 1,) and (self.config.shuffle_buffer or not len(buffer))
        if not fits or rest.ndim != 1 or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{numbers} with a shuffle buffer of {tuple(buffer.shape)} is not a place in this text.")
        self._file, self._pieces, self._drawn = numbers
        self._rest, self._buffer = rest.numpy().astype(np.int32), [*buffer.numpy().astype(np.int32)]

    def __iter__(self) -> Iterator[Batch]:
        """Yields (inputs, targets), each of `sequence_length` tokens, to the end of the pass."""
        for window in self._shuffled() if self.config.shuffle_buffer else self._windows():
            tokens = torch.from_numpy(window.astype(np.int64))
            yield tokens[:-1], tokens[1:]

    def head(self, count: int) -> NDArray[np.int32]:
        """Returns the first tokens of a pass.

        Raises:
            ConfigError: if there are not more of them.
        """
        ids = np.empty(0, np.int32)
        for _, _, more in self._encoded():
            ids = np.concatenate([ids, more])
            if len(ids) > count:
                return ids[:count]
        raise ConfigError(Problem("data.validation_tokens", count, f"less than the {len(ids):,} tokens of data.source"))

    def _shuffled(self) -> Iterator[NDArray[np.int32]]:
        """Yields random windows of a buffer, which is kept from pass to pass."""
        size, has_yielded = self.config.shuffle_buffer or 0, False
        for window in self._windows():
            if len(self._buffer) < size:
                self._buffer.append(window)
                continue
            index = derive_seed(self.seed, self._drawn) % len(self._buffer)
            self._drawn += 1
            drawn, self._buffer[index] = self._buffer[index], window
            has_yielded = True
            yield drawn
        if not has_yielded:
            allowed = f"less than the {len(self._buffer):,} windows of data.source"
            raise ConfigError(Problem("data.shuffle_buffer", size, allowed))

    def _windows(self) -> Iterator[NDArray[np.int32]]:
        """Yields windows of sequence_length + 1 tokens. Each begins with the last token of the one before."""
        length, held_out = self.sequence_length, self.config.validation_tokens or 0
        if self._file or self._pieces:  # not at the beginning of a pass
            held_out = 0
        for file, pieces, ids in itertools.chain([(self._file, self._pieces, self._rest[:0])], self._encoded()):
            self._file, self._pieces = file, pieces
            self._rest = np.concatenate([self._rest, ids[held_out:]])
            held_out = max(held_out - len(ids), 0)
            while len(self._rest) > length:
                window, self._rest = self._rest[: length + 1].copy(), self._rest[length:]
                yield window
        self._file = self._pieces = 0

    def _encoded(self) -> Iterator[tuple[int, int, NDArray[np.int32]]]:
        """Yields the tokens of each row, or piece of a text, and the place after it: file, and pieces in this file."""
        assert self.tokenizer is not None
        end = [] if self.end_of_text is None else [self.end_of_text]
        bad, num_said = list[str](), 0
        pieces = self._read(bad)
        for row, is_used in encode_rows(self.config, self.source, self._complete, pieces, bad):
            if self.say is not None and not self.epoch:  # in the first pass
                for each in bad[num_said:]:
                    self.say(f"warning: a bad row is skipped: {each}")
                num_said = len(bad)
            ids = [np.empty(0, np.int32)]
            for _, piece, encoded in row if is_used else ():
                ids += [encoded.ids.astype(np.int32), np.array(end if piece.ends else [], np.int32)]
            yield *row[-1][0], np.concatenate(ids)

    def _read(self, bad: list[str]) -> Iterator[tuple[tuple[int, int], Piece]]:
        """Yields the pieces of text from the place on, each with its file and its number in the file, from 1."""
        first, done = self._file, self._pieces
        files = [self.source._replace(files=(file,)) for file in self.source.files] or [self.source]
        for file, source in list(enumerate(files))[first:]:
            pieces = enumerate(read_source(self.config, source, bad), start=1)
            if file == first and done:
                title = f"reading up to the place in {source.name}"
                for _ in tqdm(itertools.islice(pieces, done), title, done, delay=1, disable=self.say is None):
                    pass
            for number, piece in pieces:
                if number == 1 and self.config.end_of_text is None and (file or self.epoch):
                    piece = piece._replace(text=BETWEEN + piece.text)
                yield (file, number), piece


def stream_loaders(
    config: Config, show_progress: bool = True
) -> tuple[DataLoader[Batch], DataLoader[Batch] | None, list[str]]:
    """Returns the loaders of a stream and of its validation data (None: there is none), and lines for the user.

    Raises:
        ConfigError: if the text cannot be read, or is too short for what is held out.
    """
    data = config.data
    stream = TextStream(data, config.training.seed)
    assert stream.tokenizer is not None
    validation: TokenSamples | None = None
    if data.validation_source is not None:
        sources = load_validation(data, show_progress, stream.tokenizer)
        corpus = Corpus(stream.tokenizer, [], stream.end_of_text, sources)
        _, validation = corpus_samples(corpus, data.sequence_length)
    elif data.validation_tokens:
        ids = stream.head(data.validation_tokens)
        size = num_bytes(stream.tokenizer, ids[1:], stream.end_of_text)
        validation = TokenDataset(ids, data.sequence_length, stream.tokenizer, size, stream.end_of_text)
    held_out = 0 if validation is None else len(validation)
    about = f"vocabulary {num_ids(stream.tokenizer):,}, {held_out:,} samples for validation"
    lines = [f"{data.source}: a stream in {len(stream.source.files) or 1} files, {about}"]
    if stream.source.left_out:
        lines.append(f"{data.source}: not read: {stream.source.left_out}")
    options: dict[str, Any] = {"batch_size": config.resolved().training.batch_size, "collate_fn": collate}
    return DataLoader(stream, **options), None if validation is None else DataLoader(validation, **options), lines
