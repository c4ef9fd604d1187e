"""Streams: datasets that are read in their own order, without a length, such as torch's `IterableDataset`."""

import copy
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset
from tqdm import tqdm

from fundamentallm.data.sampler import global_states, seed_draws
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
