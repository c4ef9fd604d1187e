"""DataLoaders: what a step trains on, loaded in the order of `order.StepSampler` and put on the device."""

from __future__ import annotations

import io
import itertools
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, default_collate

from fundamentallm.config.schema import IGNORE_INDEX, Config
from fundamentallm.data.corpus import Corpus, Source, Tokens
from fundamentallm.data.datasets import Batch, MixedDataset, PairDataset, TokenDataset, TokenSamples
from fundamentallm.data.encoding import encode_pieces
from fundamentallm.data.sampler import StepSampler
from fundamentallm.data.sources import read_pieces
from fundamentallm.data.tokenizers import num_bytes
from fundamentallm.errors import ConfigError

GATHERED_AT_ONCE = 2**12
"""Of small batches, so many tokens are gathered together: 64 kilobytes."""


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


def load(
    loader: DataLoader[Any], batches: Iterable[list[int]], pin_memory: bool = False, seed: int = 0
) -> Iterable[Any]:
    """What `loader` makes of `batches` of indices: one pass for all epochs, so that its workers outlive them."""
    dataset, fetch_all = loader.dataset, getattr(loader.dataset, "__getitems__", None)
    put_together = collate if loader.collate_fn is default_collate else loader.collate_fn
    pin_memory = pin_memory or loader.pin_memory
    if loader.num_workers == 0 and not pin_memory:
        # What torch's loader would do, without its machinery, which took half of a small batch's time.
        if type(dataset) is TokenDataset and put_together in (as_is, collate):
            return _gather_ahead(dataset, iter(batches))
        return (put_together(fetch_all(batch) if fetch_all else [dataset[i] for i in batch]) for batch in batches)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=put_together,
        num_workers=loader.num_workers,
        pin_memory=pin_memory,
        timeout=loader.timeout,
        worker_init_fn=_Shielded(loader.worker_init_fn),
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        # Its own generator, or iter() would draw from the global one.
        generator=torch.Generator().manual_seed(seed),
    )


def _gather_ahead(dataset: TokenDataset, batches: Iterator[list[int]]) -> Iterator[Batch]:
    """The batches, small ones several in one gather, most of whose time is the same for one as for many."""
    for first in batches:
        more = GATHERED_AT_ONCE // (len(first) * dataset.sequence_length) - 1
        several = [first, *itertools.islice(batches, max(more, 0))]
        sizes = list(map(len, several))
        inputs, targets = dataset.__getitems__(list(itertools.chain.from_iterable(several)))
        yield from zip(torch.split(inputs, sizes), torch.split(targets, sizes), strict=True)


class StepBatch(NamedTuple):
    """What a process computes in an optimizer step, on its device."""

    inputs: Tensor
    targets: Tensor
    micro_batches: int
    """How many parts to compute it in."""
    rows: int
    """Samples of its own; those after them fill up, and none of their targets counts."""


def device_batches(
    loader: DataLoader[Any], sampler: StepSampler, start: int, stop: int, device: torch.device
) -> Iterator[StepBatch]:
    """For steps `start` to `stop`, this process's share of the batch.

    Raises:
        ConfigError: if the loader does not give (inputs, targets).
    """
    shares, ahead = itertools.tee(map(sampler.share, range(start, stop)))  # workers are told of theirs in advance
    batches = load(loader, (share.indices for share in ahead), device.type == "cuda", sampler.seed or 0)
    for share, batch in zip(shares, batches, strict=True):
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not pair or not all(isinstance(tensor, Tensor) for tensor in batch):
            raise ConfigError(f"the loader gives {type(batch).__name__}; allowed: (inputs, targets), two tensors.")
        inputs, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
        if share.rows < len(targets):  # the share was filled up
            targets = targets.clone()
            targets[share.rows :] = IGNORE_INDEX
        yield StepBatch(inputs, targets, share.micro_batches, share.rows)


def as_is(batch: Any) -> Any:
    """Collate for a dataset whose `__getitems__` makes whole batches."""
    return batch


def collate(batch: Any) -> Any:
    """torch's own, which puts a list of samples together, but for a tuple: a whole batch already (`TokenDataset`)."""
    return batch if isinstance(batch, tuple) else default_collate(batch)


def create_dataloaders(
    text_or_tokens: str | Corpus | NDArray[np.integer] | Tensor | Sequence[int],
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
