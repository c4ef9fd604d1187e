"""Which samples an optimizer step trains on: a pure function of (seed, epoch, place), on any number of processes."""

from __future__ import annotations

import hashlib
import io
import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, default_collate

from fundamentallm.config import IGNORE_INDEX, Config
from fundamentallm.data.corpus import Corpus, Source, Tokens
from fundamentallm.data.datasets import Batch, MixedDataset, PairDataset, TokenDataset, TokenSamples
from fundamentallm.data.encoding import encode_pieces
from fundamentallm.data.sources import read_pieces
from fundamentallm.data.tokenizers import num_bytes
from fundamentallm.errors import ConfigError

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
        is_even: fill all micro-batches up to as many samples, of which no target counts.
        schedule: later batch sizes: pairs of the number of steps done and the size from there on, in order.

    Attributes:
        start: where the batches begin; a run whose batch size was changed goes on from where it was.
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
        self.compute_at_once(micro_batch_size or max(self.sizes))
        first = _Stretch(Start(), batch_size, num_samples, drop_last)
        self.steps_per_epoch = first.steps_over(num_samples)
        self.samples_per_epoch = min(self.steps_per_epoch * batch_size, num_samples)
        self.start = Start()
        self._block: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    @property
    def largest_share(self) -> int:
        """Most samples that a process has in a step."""
        return -(-min(max(self.sizes), self.num_samples) // self.num_processes)

    def compute_at_once(self, micro_batch_size: int) -> None:
        """Cut shares into micro-batches of at most so many samples."""
        self.micro_batch_size, self._least = micro_batch_size, 1  # samples in a micro-batch, at most and at least
        if self._is_even:
            largest = self.largest_share
            self._least = self.micro_batch_size = -(-largest // -(-largest // micro_batch_size))

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
        return next((each for each in reversed(self._stretches) if each.start.step <= step), self._stretches[0])

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
        """Passes over the data done before `step`, in samples."""
        epoch, place = self.place(step)
        return (epoch * self.samples_per_epoch + place) / self.samples_per_epoch

    def batch(self, step: int) -> list[int]:
        """Dataset indices of the whole batch of `step`, over all processes."""
        epoch, start, stop = self._places(step)
        return self._indices(epoch, start, stop)

    def rows(self, step: int) -> int:
        """Samples in this process's share of `step`'s batch; 0 where there are fewer samples than processes."""
        _, start, stop = self._share(step)
        return stop - start

    def micro_batches(self, step: int) -> int:
        """How many parts each process computes its share of `step`'s batch in; the same on all of them."""
        _, start, stop = self._places(step)
        largest_share = -(-(stop - start) // self.num_processes)
        return -(-largest_share // self.micro_batch_size)

    def share(self, step: int) -> list[int]:
        """Dataset indices of this process's share, filled up to one for each micro-batch (with `is_even`, to all).

        The filling is the batch's first sample, and whoever computes it masks its targets. Thus every process
        always has something to compute, and none leaves the others waiting.
        """
        epoch, first, _ = self._places(step)
        share = self._indices(*self._share(step))
        lacking = self.micro_batches(step) * self._least - len(share)
        return share + self._indices(epoch, first, first + 1) * lacking

    def _places(self, step: int) -> tuple[int, int, int]:
        epoch, start = self.place(step)
        return epoch, start, min(start + self._stretch(step).batch_size, self.num_samples)

    def _share(self, step: int) -> tuple[int, int, int]:
        epoch, start, stop = self._places(step)
        parts = (start + (stop - start) * (self.process_index + i) // self.num_processes for i in (0, 1))
        return epoch, *parts  # type: ignore[return-value]

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


def step_sampler(
    name: str,
    loader: DataLoader[Any],
    seed: int,
    process_index: int,
    num_processes: int,
    micro_batch_size: int | None = None,
    is_even: bool = False,
    schedule: Sequence[Sequence[int]] = (),
) -> StepSampler:
    """How to run through a user's DataLoader: its batch size, its shuffling (made pure), its drop_last.

    Whatever the loader does not say is as in `StepSampler`.

    Raises:
        ConfigError: if the loader's order is not known beforehand, so that no run could resume in it.
    """
    problem = None
    if not isinstance(loader, DataLoader):  # which types promise, and notebooks do not
        problem = f"is a {type(loader).__name__}; allowed: a torch DataLoader."  # type: ignore[unreachable]
    elif isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        problem = "has an IterableDataset; allowed: a map-style dataset, with __len__ and __getitem__."
    elif loader.batch_size is None:
        problem = "has its own batch_sampler or batch_size=None; allowed: a batch_size."
    elif not isinstance(loader.sampler, (RandomSampler, SequentialSampler)):
        problem = f"has a {type(loader.sampler).__name__}; allowed: shuffle=True or shuffle=False."
    elif isinstance(loader.sampler, RandomSampler) and (
        loader.sampler.replacement or loader.sampler.num_samples != len(loader.dataset)
    ):
        problem = "has a RandomSampler with replacement or num_samples; allowed: shuffle=True."
    elif len(loader) == 0:
        problem = f"has {len(loader.dataset)} samples, which make no batch; give it more."
    elif loader.drop_last and (too_large := [size for _, size in schedule if size > len(loader.dataset)]):
        problem = (
            f"has {len(loader.dataset)} samples and drop_last=True, which make no batch of {too_large[0]}, as "
            "training.batch_size_schedule asks for; give it more, or set smaller ones."
        )
    if problem:
        raise ConfigError(f"{name} {problem}")
    return StepSampler(
        num_samples=len(loader.dataset),  # type: ignore[arg-type]
        batch_size=loader.batch_size or 0,
        seed=seed if isinstance(loader.sampler, RandomSampler) else None,
        process_index=process_index,
        num_processes=num_processes,
        micro_batch_size=micro_batch_size,
        drop_last=loader.drop_last,
        is_even=is_even,
        schedule=schedule,
    )


class _Shielded:
    """Begins a worker process that signals to the whole process group do not end: the run decides when it stops.

    A second SIGTERM does end it, since that is how torch ends one that hangs. (A class, so that it can be sent to
    workers that are spawned rather than forked.)
    """

    def __init__(self, begin: Callable[[int], None] | None) -> None:
        self.begin = begin

    def __call__(self, worker_id: int) -> None:
        for name in ("SIGINT", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
        if self.begin is not None:
            self.begin(worker_id)


def step_loader(
    loader: DataLoader[Any], sampler: StepSampler, start: int, stop: int, pin_memory: bool
) -> DataLoader[Any]:
    """A DataLoader like `loader` that yields this process's shares of steps `start` to `stop`.

    One loader for all epochs, so that worker processes outlive them and nothing restarts in between.
    """
    return DataLoader(
        loader.dataset,
        batch_sampler=(sampler.share(step) for step in range(start, stop)),
        collate_fn=collate if loader.collate_fn is default_collate else loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory or pin_memory,
        timeout=loader.timeout,
        worker_init_fn=_Shielded(loader.worker_init_fn),
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        # Its own generator, or iter() would draw from the global one.
        generator=torch.Generator().manual_seed(sampler.seed or 0),
    )


def device_batches(
    loader: DataLoader[Any], sampler: StepSampler, start: int, stop: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """For steps `start` to `stop`: this process's share on its device, and in how many micro-batches to compute it.

    Raises:
        ConfigError: if the loader does not give (inputs, targets).
    """
    batches = step_loader(loader, sampler, start, stop, pin_memory=device.type == "cuda")
    for step, batch in zip(range(start, stop), batches, strict=True):
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not pair or not all(isinstance(tensor, torch.Tensor) for tensor in batch):
            raise ConfigError(f"the loader gives {type(batch).__name__}; allowed: (inputs, targets), two tensors.")
        inputs, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
        rows = sampler.rows(step)
        if rows < len(targets):  # the share was filled up
            targets = targets.clone()
            targets[rows:] = IGNORE_INDEX
        yield inputs, targets, sampler.micro_batches(step)


def as_is(batch: Any) -> Any:
    """Collate for a dataset whose `__getitems__` makes whole batches."""
    return batch


def collate(batch: Any) -> Any:
    """torch's own, which puts a list of samples together, but for a tuple: a whole batch already (`TokenDataset`)."""
    return batch if isinstance(batch, tuple) else default_collate(batch)


def create_dataloaders(
    text_or_tokens: str | Corpus | NDArray[np.integer] | torch.Tensor | Sequence[int],
    tokenizer: Tokenizer | None,
    config: Config,
) -> tuple[DataLoader[Batch], DataLoader[Batch] | None]:
    """Loaders of the training part and of the validation part (None where `train_split` is 1).

    Args:
        text_or_tokens: a text, split by characters and encoded; a tokenized corpus; or token ids, split as they are.
        tokenizer: encodes the text; with token ids it serves bits per byte and is stored with checkpoints.
        config: `data.train_split`, `data.sequence_length`, `data.num_workers`, and `training.batch_size`:
            sequences per optimizer step over all devices.

    Raises:
        ConfigError: if a part is too short for one sample, or an id is outside the tokenizer's vocabulary.

    Examples:
        >>> from fundamentallm import Config, DataConfig, create_dataloaders, create_tokenizer
        >>> text = "to be or not to be " * 100
        >>> tokenizer = create_tokenizer("char", lambda: [text], lambda: [text])
        >>> config = Config(data=DataConfig(sequence_length=19))
        >>> train_loader, val_loader = create_dataloaders(text, tokenizer, config)
        >>> train_loader.dataset, val_loader.dataset
        (TokenDataset(90 samples of 19 tokens), TokenDataset(10 samples of 19 tokens))
    """
    length, has_validation = config.data.sequence_length, config.data.train_split < 1
    train: TokenSamples
    validation: TokenSamples | None
    if isinstance(text_or_tokens, Corpus):
        corpus = text_or_tokens._replace(tokenizer=tokenizer or text_or_tokens.tokenizer)
        train, validation = corpus_samples(corpus, length, has_validation)
    else:
        if isinstance(text_or_tokens, str):
            parts = _encode_text(text_or_tokens, tokenizer, config.data.train_split)
        else:
            parts = _split_tokens(text_or_tokens, tokenizer, config.data.train_split)
        train = TokenDataset(parts[0], length, tokenizer)
        validation = TokenDataset(parts[1], length, tokenizer, parts[2]) if has_validation else None
    options: dict[str, Any] = {"num_workers": config.data.num_workers, "collate_fn": as_is}
    options["batch_size"] = config.resolved().training.batch_size
    train_loader = DataLoader(train, shuffle=True, **options)
    return train_loader, None if validation is None else DataLoader(validation, **options)


def corpus_samples(
    corpus: Corpus, sequence_length: int, has_validation: bool = True
) -> tuple[TokenSamples, TokenSamples | None]:
    """Training samples, of several sources as their weights say, and validation samples, each once.

    Raises:
        ConfigError: if a part of a source is too short for one sample.
    """

    def samples(source: Source, tokens: Tokens) -> TokenSamples:
        about = sequence_length, corpus.tokenizer, tokens.num_bytes, corpus.end_of_text
        try:
            if tokens.rows is not None:
                return PairDataset(tokens.ids, tokens.rows, *about)
            return TokenDataset(tokens.ids, *about)
        except ConfigError as error:
            if len(corpus.sources) == 1:
                raise
            raise ConfigError([f"{source.name}: {problem}" for problem in error.problems]) from error

    train = {source.name: samples(source, source.train) for source in corpus.sources}
    validation = {source.name: samples(source, source.validation) for source in corpus.sources if has_validation}
    if len(train) == 1:
        return next(iter(train.values())), next(iter(validation.values()), None)
    mixed = MixedDataset(train, [source.weight for source in corpus.sources])
    return mixed, MixedDataset(validation) if validation else None


Parts = tuple[NDArray[np.integer], NDArray[np.integer], int | None]
"""Training tokens, validation tokens, and UTF-8 bytes of the validation targets (None: unknown)."""


def _encode_text(text: str, tokenizer: Tokenizer | None, train_split: float) -> Parts:
    if tokenizer is None:
        raise ConfigError("the data is a text and the tokenizer is None; give a tokenizer, or token ids.")
    cut = int(len(text) * train_split)
    train, validation = (
        np.concatenate([np.empty(0, np.uint16), *(ids for _, ids in encode_pieces(tokenizer, pieces))])
        for pieces in map(read_pieces, (io.StringIO(text[:cut], newline=""), io.StringIO(text[cut:], newline="")))
    )
    return train, validation, len(text[cut:].encode()) - num_bytes(tokenizer, validation[:1])


def _split_tokens(tokens: Any, tokenizer: Tokenizer | None, train_split: float) -> Parts:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ConfigError(f"the tokens have shape {tokens.shape} and type {tokens.dtype}; allowed: 1-D integers.")
    if tokenizer is not None and tokens.size and not 0 <= tokens.min() <= tokens.max() < tokenizer.get_vocab_size():
        raise ConfigError(
            f"the tokens range from {tokens.min()} to {tokens.max()}; allowed: 0 to {tokenizer.get_vocab_size() - 1}, "
            "the tokenizer's vocabulary."
        )
    train, validation = np.split(tokens, [int(len(tokens) * train_split)])
    if tokenizer is None:
        return train, validation, None
    return train, validation, num_bytes(tokenizer, validation[1:])
