"""Streams: datasets that are read in their own order, without a length, such as torch's `IterableDataset`."""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset
from tqdm import tqdm

from fundamentallm.data.listed_order import global_states
from fundamentallm.data.sampler import seed_draws
from fundamentallm.distributed.batches import tensors
from fundamentallm.errors import ConfigError, Problem

ENDLESS = 2**62
"""Number of samples of a stream, as the order of samples counts them: more than any run reads."""
HEAD, COMPARED = 3, 9
"""Positions between which samples are compared to find out whether a dataset's state restores its place."""
OF_SAMPLES = -1
"""Stands in for the rank in the seeds of samples, which all processes read alike."""
START: dict[str, Any] = {"position": 0, "epoch": 0, "index": 0, "dataset": None}
END = object()


def is_stream(dataset: Any) -> bool:
    """Returns whether a dataset is iterated instead of indexed."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


class Stream:
    """Reads a dataset by position. Positions count all samples of the run; a dataset that ends is iterated again.

    Every process reads the whole stream and computes its rows of each batch. So the batches do not depend on the number
    of processes, and nothing has to be sent. Before each sample, the generators are seeded from (seed, position).

    Args:
        dataset: iterable. `set_epoch`, if it has one, is called before each pass. A run resumes by `state_dict` and
            `load_state_dict` if they restore the place exactly, which is tried out on copies. Otherwise it reads up to
            the place.
        collate_fn: of the loader.
        seed: of the run.
        is_main: whether this process prints.

    Attributes:
        epoch: passes completed.
        description: the class, and a digest of the first sample. It is the same on all processes and after a resume.

    Raises:
        ConfigError: if there are no samples.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any], seed: int, is_main: bool = True) -> None:
        self.dataset, self.collate_fn, self.seed, self.is_main = dataset, collate_fn, seed, is_main
        self._saved = self._begin = START
        self._first, self._window = 0, list[Any]()  # samples that may be asked for, from position _first on
        self.description = ""
        with global_states(0):
            self.restores = self._restores_exactly()
            self._open(START)
            self.first = self._window[0]
            if self.restores:  # the first sample is kept, so everything can be read again from here
                self._begin = self.state_dict(1)

    def __getitem__(self, index: int) -> Any:
        """Returns the first sample."""
        return self.first

    def read(self, start: int, stop: int) -> list[Any]:
        """Returns the samples from position `start` to `stop`. Those before `start` are dropped."""
        if start < self._first:
            self._open(self._saved)
        assert start >= self._first
        known = self._first + len(self._window)
        del self._window[: start - self._first]
        if known < start:
            skipped = tqdm(range(known, start), "reading up to the place", delay=1, disable=not self.is_main)
            for self._first in skipped:
                self._next()
        self._first = start
        while self._first + len(self._window) < stop:
            self._window.append(self._next())
        return self._window[: stop - start]

    def state_dict(self, position: int) -> dict[str, Any]:
        """Returns the place before the sample at `position`."""
        if position == 0:
            return START
        if self._saved["position"] != position:
            self.read(position, position)
            if self._window:  # it has read ahead
                self._open(self._saved)
                self.read(position, position)
            state = copy.deepcopy(self.dataset.state_dict()) if self.restores else None
            self._saved = {"position": position, "epoch": self.epoch, "index": self._index, "dataset": state}
        return self._saved

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores a place. A dataset without a state is read up to it at the next `read`."""
        numbers = [saved[name] for name in ("position", "epoch", "index")]
        if not all(type(number) is int and 0 <= number < ENDLESS for number in numbers):
            raise ValueError(f"{numbers} is not a place in a stream.")
        if not self.restores:
            saved = {**saved, "dataset": None}
        elif saved["position"] == 0:
            saved = self._begin
        self._saved = saved
        if saved["dataset"] is not None:
            self._open(saved)
        elif self.is_main and saved["position"]:
            has_state = hasattr(self.dataset, "state_dict")
            why = "has a state_dict that does not restore the next samples" if has_state else "has no state_dict"
            first = f"its first {saved['position']:,} samples are read again"
            tqdm.write(f"{type(self.dataset).__name__} {why}: {first}, up to the place of the checkpoint")

    def _open(self, place: dict[str, Any]) -> None:
        """Begins to read at a place if its dataset's state is known, otherwise at the start."""
        state = place["dataset"]
        begin = START if state is None else place
        self._first, self.epoch, self._index = begin["position"], begin["epoch"], begin["index"]
        self._iterator, self._window = _iterate(self.dataset, self.epoch, state), []
        if self._first == 1 and state is not None:
            self._first, self._window = 0, [self.first]
        elif state is None:
            self._window.append(self._next())
            description = f"{type(self.dataset).__name__} {self._digest(self._window)}"
            if self.description not in ("", description):
                advice = "Make it begin again at each iter(), or give it state_dict and load_state_dict."
                raise _problem(self.dataset, "begins with another sample when it is iterated again", advice)
            self.description = description

    def _next(self) -> Any:
        """Returns the next sample; after the last one, the first of the next pass."""
        self._seed(self._first + len(self._window))
        while (sample := next(self._iterator, END)) is END:
            if self._index == 0:
                advice = "Check its source and filters, or lower training.max_steps if it can be read once only."
                raise _problem(self.dataset, f"has no samples in pass {self.epoch + 1} over it", advice)
            self.epoch, self._index = self.epoch + 1, 0
            self._iterator = _iterate(self.dataset, self.epoch, None)
        self._index += 1
        return sample

    def _seed(self, position: int) -> None:
        seed_draws(self.seed, OF_SAMPLES, position)

    def _restores_exactly(self) -> bool:
        """Returns whether the dataset goes on with the same samples after its state was given to a copy."""
        has_state = all(hasattr(self.dataset, name) for name in ("state_dict", "load_state_dict"))
        if not has_state or _has_shuffle_buffer(self.dataset):
            return False
        if getattr(self.dataset, "restores_exactly", False):
            return True

        def take(iterator: Iterator[Any], start: int, stop: int) -> list[Any]:
            taken = list[Any]()
            for position in range(start, stop):
                self._seed(position)
                taken += itertools.islice(iterator, 1)
            return taken

        logging.disable(logging.WARNING)  # what the library says about a state that is only tried
        try:
            one, other = copy.deepcopy(self.dataset), copy.deepcopy(self.dataset)
            take(iterator := _iterate(one, 0, None), 0, HEAD)
            state = copy.deepcopy(one.state_dict())
            samples, again = (take(each, HEAD, COMPARED) for each in (iterator, _iterate(other, 0, state)))
            for each, taken in ((one, samples), (other, again)):  # the next pass may not begin at the state
                taken += take(_iterate(each, 1, None), COMPARED, COMPARED + 1)
            return len(samples) == len(again) and (not samples or self._digest(samples) == self._digest(again))
        except Exception:  # it cannot be copied; what else is wrong, reading it will raise
            return False
        finally:
            logging.disable(logging.NOTSET)

    def _digest(self, samples: list[Any]) -> str:
        self._seed(0)  # the collate function may draw
        digest = hashlib.sha256()
        for tensor in tensors(self.collate_fn(list(samples))):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


def _has_shuffle_buffer(dataset: Any) -> bool:
    """Returns whether `datasets` shuffles in a buffer, whose state leaves out the content: samples would be lost.

    No comparison of a few samples shows it: they may all come from what the buffer yields before it is filled again.
    """
    pending = [dataset]
    while pending:
        each = pending.pop()
        if type(each).__name__ == "BufferShuffledExamplesIterable":
            return True
        values = each if isinstance(each, (list, tuple)) else getattr(each, "__dict__", {}).values()
        pending += [part for part in values if isinstance(part, (list, tuple)) or hasattr(part, "shard_data_sources")]
    return False


def _iterate(dataset: Any, epoch: int, state: Any) -> Iterator[Any]:
    if callable(getattr(dataset, "set_epoch", None)):
        dataset.set_epoch(epoch)
    if state is not None:
        dataset.load_state_dict(state)
    return iter(dataset)


def _problem(dataset: Any, found: str, advice: str) -> ConfigError:
    return ConfigError(
        Problem("train_loader", dataset, "", advice, text=f"the stream {type(dataset).__name__} {found}")
    )
