"""Streams: datasets that are read in their own order, without a length; and text that is tokenized as it is read."""

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset
from tqdm import tqdm

from fundamentallm.config.files import find_source
from fundamentallm.config.schema import DataConfig
from fundamentallm.data.datasets import Batch, Tokenized
from fundamentallm.data.encoding import encode_rows
from fundamentallm.data.sampler import derive_seed, global_states, seed_draws
from fundamentallm.data.sources import BETWEEN, Piece, read_source, reads_special_tokens
from fundamentallm.data.tokenizers import create_tokenizer, with_unknown
from fundamentallm.distributed.batches import tensors
from fundamentallm.errors import ConfigError, Problem

ENDLESS = 2**62
"""Number of samples of a stream, as the order of samples counts them: more than any run reads."""
OF_SAMPLES = -1
"""Stands in for the rank in the seeds of samples, which all processes read alike."""
START: dict[str, Any] = {"position": 0, "epoch": 0, "dataset": None}
END = object()


def is_stream(dataset: Any) -> bool:
    """Returns whether a dataset is iterated instead of indexed."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


class Stream:
    """Reads a dataset by position. Positions count all samples of the run; a dataset that ends is iterated again.

    Every process reads the whole stream and computes its rows of each batch. So the batches do not depend on the number
    of processes, and nothing has to be sent. Before each sample, the generators are seeded from (seed, position).
    `set_epoch`, if the dataset has one, is called before each pass. A run resumes by the dataset's `state_dict` and
    `load_state_dict`, which are trusted, or reads up to the place if it has none.

    Attributes:
        epoch: passes completed.
        description: the class, and a digest of the first sample. It is the same on all processes and after a resume.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any], seed: int, is_main: bool = True) -> None:
        self.dataset, self.collate_fn, self.seed, self.is_main = dataset, collate_fn, seed, is_main
        has_state = all(hasattr(dataset, name) for name in ("state_dict", "load_state_dict"))
        self.restores = has_state and not _has_shuffle_buffer(dataset)
        self.description = ""
        self._saved = self._begin = START
        with global_states(0):
            self._open(START)
            self.first = self._window[0]
            if self.restores:  # a pass may begin where the last one was left, so going back needs a state, and `first`
                self._begin = self.state_dict(1)
                self._saved = START

    def __getitem__(self, index: int) -> Any:
        """Returns the first sample."""
        return self.first

    def read(self, start: int, stop: int) -> list[Any]:
        """Returns the samples from position `start` to `stop`. Those before `start` are dropped."""
        if start < self._position - len(self._window):
            self._open(self._saved)
        if self._position < start:
            self._window.clear()
            for _ in tqdm(range(self._position, start), "reading up to the place", delay=1, disable=not self.is_main):
                self._next()
        while self._position < stop:
            self._window.append(self._next())
        del self._window[: len(self._window) - (self._position - start)]
        return self._window[: stop - start]

    def state_dict(self, position: int) -> dict[str, Any]:
        """Returns the place before the sample at `position`."""
        if position == 0:
            return START
        if self._saved["position"] != position:
            if self._position > position:  # it has read ahead
                self._open(self._saved)
            self.read(position, position)
            state = copy.deepcopy(self.dataset.state_dict()) if self.restores else None
            self._saved = {"position": position, "epoch": self.epoch, "dataset": state}
        return self._saved

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores a place. A dataset without a state is read up to it at the next `read`."""
        position, epoch = saved["position"], saved["epoch"]
        if not all(type(number) is int and 0 <= number < ENDLESS for number in (position, epoch)):
            raise ValueError(f"{position} in pass {epoch} is not a place in a stream.")
        self._saved = {"position": position, "epoch": epoch, "dataset": saved["dataset"] if self.restores else None}
        if self._saved["dataset"] is not None:
            self._open(self._saved)
        elif position and self.is_main:
            why = f"{type(self.dataset).__name__} has no state that holds its place"
            tqdm.write(f"{why}: its first {position:,} samples are read again, up to the place of the checkpoint")

    def _open(self, place: dict[str, Any]) -> None:
        """Begins to read at a place. If the dataset's state there is not known, begins at the first sample."""
        if place["dataset"] is None:
            place = self._begin
        self._position, self.epoch, state = place["position"], place["epoch"], place["dataset"]
        self._iterator, self._window = _iterate(self.dataset, self.epoch, state), []
        if self._position == 1:
            self._window = [self.first]
        elif self._position == 0:
            self._window = [self._next()]
            description = f"{type(self.dataset).__name__} {self._digest(self._window[0])}"
            if self.description not in ("", description):
                advice = "Make it begin again at each iter(), or give it state_dict and load_state_dict."
                raise self._problem("begins with another sample when it is iterated again", advice)
            self.description = description

    def _next(self) -> Any:
        """Returns the next sample; after the last one, the first of the next pass."""
        seed_draws(self.seed, OF_SAMPLES, self._position)
        sample = next(self._iterator, END)
        if sample is END:
            self.epoch += 1
            self._iterator = _iterate(self.dataset, self.epoch, None)
            sample = next(self._iterator, END)
        if sample is END:
            advice = "Check its source and filters, or lower training.max_steps if it can be read once only."
            raise self._problem("has no samples when it is iterated again", advice)
        self._position += 1
        return sample

    def _digest(self, sample: Any) -> str:
        seed_draws(self.seed, OF_SAMPLES, 0)  # the collate function may draw
        digest = hashlib.sha256()
        for tensor in tensors(self.collate_fn([sample])):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def _problem(self, found: str, advice: str) -> ConfigError:
        text = f"the stream {type(self.dataset).__name__} {found}"
        return ConfigError(Problem("train_loader", self.dataset, "", advice, text=text))


def _has_shuffle_buffer(part: Any) -> bool:
    """Returns whether `datasets` shuffles in a buffer, whose state leaves out the content: samples would be lost."""
    if type(part).__name__ == "BufferShuffledExamplesIterable":
        return True
    parts = part if isinstance(part, (list, tuple)) else getattr(part, "__dict__", {}).values()
    inner = [each for each in parts if isinstance(each, (list, tuple)) or hasattr(each, "shard_data_sources")]
    return any(map(_has_shuffle_buffer, inner))


def _iterate(dataset: Any, epoch: int, state: Any) -> Iterator[Any]:
    if callable(getattr(dataset, "set_epoch", None)):
        dataset.set_epoch(epoch)
    if state is not None:
        dataset.load_state_dict(copy.deepcopy(state))  # it may keep and change what it is given
    return iter(dataset)


class TextStream(Tokenized, IterableDataset[Batch]):
    """Yields windows of `data.sequence_length` tokens; every token but the first is a target exactly once.

    What is left of the tokens at the end of a pass begins the next one. A place within a file is found again by reading
    the file up to it, without tokenizing. `seed` is that of the shuffle buffer. `say` prints a line about a bad row.
    """

    tokenizer: Tokenizer

    def __init__(self, config: DataConfig, seed: int, say: Callable[[str], None] | None = None) -> None:
        config = config.resolved()
        self.config, self.seed, self.say = config, seed, say
        self.source = find_source(config, str(config.source))
        self.sequence_length = config.sequence_length
        self.tokenizer = create_tokenizer(config.tokenizer, (), config.end_of_text)
        self.tokenizer.encode_special_tokens = not reads_special_tokens(config)
        self._complete = with_unknown(self.tokenizer)
        self.end_of_text = None if config.end_of_text is None else self.tokenizer.token_to_id(config.end_of_text)
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
        """Returns the first tokens of a pass. Raises ConfigError if there are not more of them."""
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
