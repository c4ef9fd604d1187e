"""DataLoaders: loads the samples of each optimizer step, in the order of `StepSampler`, and puts them on the device."""

from __future__ import annotations

import io
import itertools
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from fundamentallm.config.registry import set_name_problems, set_names
from fundamentallm.config.schema import Config
from fundamentallm.data.corpus import Corpus, Source, Tokens, load_validation
from fundamentallm.data.datasets import Batch, MixedDataset, PackedDataset, PairDataset, TokenDataset
from fundamentallm.data.encoding import encode_pieces
from fundamentallm.data.sampler import ListedOrder, StepSampler, permute, seed_draws
from fundamentallm.data.sources import read_pieces
from fundamentallm.data.streams import ENDLESS, Stream, TextStream, is_stream
from fundamentallm.data.tokenizers import num_bytes, num_ids, with_unknown
from fundamentallm.distributed.batches import LABELS, StepBatch, to_device
from fundamentallm.errors import ConfigError, Problem, raise_all

ValidationLoaders = DataLoader[Any] | Mapping[str, DataLoader[Any]]
"""The loader of the validation data, or of several sets by name."""
LIBRARIES = ("torch", "torchdata", "accelerate")
GATHERED_AT_ONCE = 2**12
"""Tokens that small batches are gathered together up to: 64 kilobytes."""


def named_loaders(val_loader: ValidationLoaders | None) -> dict[str, DataLoader[Any]]:
    """Returns the loaders of validation sets by name, which is "" if there is one without a name.

    Raises ConfigError if a mapping is empty, or a name is not one.
    """
    if isinstance(val_loader, Mapping):
        raise_all(set_name_problems("val_loader", val_loader))
        return dict(val_loader)
    return {} if val_loader is None else {"": val_loader}


def step_sampler(name: str, loader: DataLoader[Any], seed: int, most: int | None = None, **layout: Any) -> StepSampler:
    """Make the sampler that replaces a DataLoader's own, with its batch size, shuffling and drop_last.

    `name` is "train_loader", or that of a loader for validation, which may read `most` samples only. `layout` is what
    `StepSampler` takes about processes, micro-batches and later batch sizes. Raises ConfigError if the loader's order
    cannot be reproduced on resume, or a training batch is larger than the data.
    """
    _check_loader(name, loader)
    (sampler, batch_size, drop_last), data = unwrapped(loader), loader.dataset
    size = batch_size or 1  # a batch of the sampler's
    if is_stream(data):
        stream = Stream(data, collate_function(loader), seed, is_main=layout.get("process_index", 0) == 0)
        return StepSampler(ENDLESS, size, None, stream=stream, data=stream, **layout)
    num_samples = len(data)  # type: ignore[arg-type]
    shuffles = is_shuffling(sampler, num_samples)
    order = ListedOrder(sampler, seed, num_samples) if shuffles is None else None
    if most is not None:
        order, size = _subset(order, num_samples, most, size)
    about = {"drop_last": drop_last, "order": order, "data": data, "draw_seed": seed, **layout}
    num_samples = num_samples if order is None else order.length
    result = StepSampler(num_samples, size, seed if shuffles else None, **about)
    if batch_size is None and result.schedule:
        allowed = "[], since the batch sampler decides"
        raise ConfigError(Problem("training.batch_size_schedule", result.schedule, allowed))
    settings = ["training.batch_size", *["training.batch_size_schedule"] * len(result.schedule)]
    kind = "windows" if getattr(data, "is_packed", False) else "samples"
    allowed = f"at most {num_samples}, the {kind} of the training data"
    sizes = zip(settings, result.sizes, strict=True)
    problems = [Problem(setting, size, allowed) for setting, size in sizes if size > num_samples]
    if problems and name == "train_loader":
        raise ConfigError(problems)
    if num_samples < (size if drop_last else 1):
        raise ConfigError(Problem("", loader, advice=f"{name} has {num_samples} samples, too few for one batch."))
    return result


def _subset(order: ListedOrder | None, num_samples: int, most: int, size: int) -> tuple[ListedOrder | None, int]:
    """Returns the order of `most` random samples, the same ones in every run, and the batch size; that of all if fewer.

    They keep the order of the data, so that a file is read from its beginning to its end.
    """
    entries: Sequence[Any] = range(num_samples) if order is None else order.of_epoch(0)
    longest = size
    if order is not None and order.is_batched:
        longest, entries = max(map(len, entries)), list(itertools.chain(*entries))
    if most >= len(entries):
        return order, size
    places = np.sort(permute(np.arange(most), len(entries), 0))
    return ListedOrder([entries[place] for place in places], 0, num_samples), longest


def _check_loader(name: str, loader: DataLoader[Any]) -> None:
    """Refuses what would silently be read in another way than its user expects."""
    if not isinstance(loader, DataLoader):  # notebooks are not type-checked
        raise ConfigError(Problem("", loader, advice=f"{name} is a {type(loader).__name__}; give a torch DataLoader."))
    library, sampler = type(loader).__iter__.__module__.partition(".")[0], unwrapped(loader)[0]
    streams = is_stream(loader.dataset)
    is_prepared = library == "accelerate" or type(loader.dataset).__module__.startswith("accelerate.")
    is_share = getattr(sampler, "num_replicas", 1) > 1 and is_shuffling(sampler, 0) is None
    refused = {
        "has an __iter__ of its own, which a run would not call; do it in collate_fn": library not in LIBRARIES,
        "has a stream; give a list of it, by itertools.islice(stream, 500)": streams and name != "train_loader",
        "has num_workers, each of which would repeat the stream; give 0": streams and loader.num_workers,
        "was prepared by accelerate; give the loader of the stream as it was before": streams and is_prepared,
        "has batch_size=None; give a batch_size, or a batch_sampler": sampler is None,
        "has a sampler that gives each process a share; give one that lists the whole order": is_share,
        "was made by skip_first_batches; give the whole loader": getattr(sampler, "skip_batches", 0),
    }
    for text, applies in refused.items():
        if applies:
            raise ConfigError(Problem("", loader, advice=f"{name}, a {type(loader).__name__}, {text}."))


def unwrapped(loader: Any) -> tuple[Any, int | None, bool]:
    """Returns what decides about a loader's order: a sampler with its batch size and drop_last, or a batch sampler.

    What accelerate has put around a batch sampler is taken off. The batch size of a batch sampler is None.
    """
    batch_sampler: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batch_sampler, "batch_sampler") and not getattr(batch_sampler, "skip_batches", 0):
        batch_sampler = batch_sampler.batch_sampler
    if _kind(batch_sampler) == "BatchSampler":
        return batch_sampler.sampler, batch_sampler.batch_size, batch_sampler.drop_last
    return batch_sampler, None, False


def is_shuffling(sampler: Any, num_samples: int) -> bool | None:
    """Returns whether a sampler is what shuffle=True makes, or shuffle=False; None if it is another one."""
    kind = _kind(sampler)
    if kind in ("DistributedSampler", "StatefulDistributedSampler"):
        return bool(sampler.shuffle)
    if kind in ("RandomSampler", "SeedableRandomSampler"):
        return True if not sampler.replacement and sampler.num_samples == num_samples else None
    return False if kind == "SequentialSampler" and len(sampler) == num_samples else None


def _kind(sampler: Any) -> str:
    """Returns the name of a sampler's class if it is of a known library, otherwise ""."""
    return type(sampler).__name__ if type(sampler).__module__.partition(".")[0] in LIBRARIES else ""


class Worker:
    """Starts worker processes, and collates in them. Having collated one batch, it seeds its worker for the next.

    torch gives batches to workers in turn, so each worker knows the step of its next batch.
    """

    def __init__(self, loader: DataLoader[Any], sampler: StepSampler, first_step: int) -> None:
        self.init, self.collate_fn = loader.worker_init_fn, collate_function(loader)
        self.num_workers, self.step = loader.num_workers, first_step
        self.seed, self.rank = sampler.draw_seed, sampler.process_index

    def start(self, worker_id: int) -> None:
        """Starts a worker, which signals to the whole process group do not end: the run decides when."""
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        # A second SIGTERM ends it, since that is how torch ends a worker that hangs.
        signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
        if self.init is not None:
            self.init(worker_id)
        self.step += worker_id
        seed_draws(self.seed, self.rank, self.step)

    def __call__(self, samples: Any) -> Any:
        """Returns the collated samples."""
        batch = self.collate_fn(samples)
        self.step += self.num_workers
        seed_draws(self.seed, self.rank, self.step)
        return batch


def _load(
    loader: DataLoader[Any], sampler: StepSampler, batches: Iterator[list[int]], first_step: int, pins: bool
) -> Iterable[Any]:
    """Loads `batches` of indices as `loader` would. One pass serves all epochs, so that its workers outlive them.

    What the dataset and the collate function draw at random follows from the seed, the rank and the step.
    """
    dataset, collate_fn, has_workers = loader.dataset, collate_function(loader), loader.num_workers > 0
    if not (has_workers or pins):
        if type(dataset) is TokenDataset and collate_fn is collate:
            return _gather_ahead(dataset, batches)
        # The same as torch's loader does, without its overhead, which took half of a small batch's time.
        fetch_all = getattr(dataset, "__getitems__", None) or (lambda batch: [dataset[index] for index in batch])
        return (collate_fn(fetch_all(batch)) for batch in _seeded(batches, sampler, first_step))
    worker = Worker(loader, sampler, first_step)
    return DataLoader(
        dataset,
        batch_sampler=batches if has_workers else _seeded(batches, sampler, first_step),
        collate_fn=worker if has_workers else collate_fn,
        num_workers=loader.num_workers,
        pin_memory=pins,
        timeout=loader.timeout,
        worker_init_fn=worker.start,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        # Without a generator of its own, iter() would draw from the global one.
        generator=torch.Generator().manual_seed(sampler.draw_seed),
    )


def _seeded(batches: Iterator[list[int]], sampler: StepSampler, first_step: int) -> Iterator[list[int]]:
    """Yields the batches. The process that asks for one is seeded for it."""
    for step, batch in enumerate(batches, first_step):
        seed_draws(sampler.draw_seed, sampler.process_index, step)
        yield batch


def _gather_ahead(dataset: TokenDataset, batches: Iterator[list[int]]) -> Iterator[Batch]:
    """Yields the batches. Several small ones are gathered at once, which takes about as long as one."""
    for first in batches:
        more = GATHERED_AT_ONCE // (len(first) * dataset.sequence_length) - 1
        several = [first, *itertools.islice(batches, max(more, 0))]
        sizes = list(map(len, several))
        parts = [torch.split(part, sizes) for part in dataset.__getitems__(list(itertools.chain(*several)))]
        yield from zip(*parts, strict=True)


def _read_stream(sampler: StepSampler, batches: Iterator[list[int]], first_step: int) -> Iterator[Any]:
    """Yields this process's part of each batch of a stream. It is read when it is asked for, not before."""
    stream = sampler.stream
    for step, indices in enumerate(batches, first_step):
        whole = sampler.batch(step)
        samples = stream.read(whole[0], whole[-1] + 1)
        seed_draws(stream.seed, sampler.process_index, step)
        yield stream.collate_fn([samples[index - whole[0]] for index in indices])


def device_batches(
    loader: DataLoader[Any], sampler: StepSampler, start: int, stop: int, device: torch.device
) -> Iterator[StepBatch]:
    """Yield this process's part of the batch of each step from `start` to `stop`."""
    rank_batches, ahead = itertools.tee(map(sampler.rank_batch, range(start, stop)))  # workers prefetch
    indices = (rank_batch.indices for rank_batch in ahead)
    if sampler.stream is not None:
        batches: Iterable[Any] = _read_stream(sampler, indices, start)
    else:
        batches = _load(loader, sampler, indices, start, loader.pin_memory or device.type == "cuda")
    for rank_batch, batch in zip(rank_batches, batches, strict=True):
        yield StepBatch(to_device(batch, device), len(rank_batch.indices), rank_batch.rows, rank_batch.micro_batches)


def collate_function(loader: DataLoader[Any]) -> Callable[[Any], Any]:
    """Returns a loader's collate function; in place of torch's, ours."""
    return collate if loader.collate_fn is default_collate else loader.collate_fn


def collate(batch: Any) -> Any:
    """Collate a list of samples as torch does, and leave a tuple as it is: `TokenDataset` makes whole batches."""
    return batch if isinstance(batch, tuple) else default_collate(batch)


def shift_labels(samples: list[Any]) -> Any:
    """Collates samples for a model that predicts the next token, and moves the targets on by one.

    Args:
        samples: token ids, pairs of ids and labels, or mappings of `input_ids` and perhaps `labels`; all of one length.

    Returns:
        (inputs, targets), each one token shorter, or a mapping of the same keys and `labels`.

    Examples:
        >>> import torch
        >>> from fundamentallm import shift_labels
        >>> shift_labels([torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])])
        (tensor([[1, 2],
                [4, 5]]), tensor([[2, 3],
                [5, 6]]))
    """
    batch = default_collate(samples)
    if isinstance(batch, Mapping):
        labels = batch.get(LABELS, batch["input_ids"])
        shorter = {name: value[:, :-1] if value.shape == labels.shape else value for name, value in batch.items()}
        return {**shorter, LABELS: labels[:, 1:]}
    inputs, labels = (batch, batch) if isinstance(batch, Tensor) else batch
    return inputs[:, :-1], labels[:, 1:]


def create_dataloaders(
    text_or_tokens: str | Corpus | NDArray[np.integer] | Tensor | Sequence[int],
    tokenizer: Tokenizer | None,
    config: Config,
) -> tuple[DataLoader[Batch], Any]:
    """Create the loaders of the training part and of the validation part (None if `train_split` is 1).

    Of a mixture, or with a mapping as `data.validation_source`, the second is a dict of loaders by name.

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
        >>> tokenizer = create_tokenizer("char", text)
        >>> config = Config(data=DataConfig(sequence_length=19))
        >>> train_loader, val_loader = create_dataloaders(text, tokenizer, config)
        >>> train_loader.dataset, val_loader.dataset
        (TokenDataset(90 samples of 19 tokens), TokenDataset(10 samples of 19 tokens))
    """
    length, train_split = config.data.sequence_length, config.data.train_split
    if isinstance(text_or_tokens, Corpus):
        corpus = text_or_tokens._replace(tokenizer=tokenizer or text_or_tokens.tokenizer, packing=config.data.packing)
        train, validation = corpus_samples(corpus, length, train_split < 1)
        assert train is not None
    else:
        cut = int(len(text_or_tokens) * train_split)
        if isinstance(text_or_tokens, str):
            train_ids, ids = (_encode_text(part, tokenizer) for part in (text_or_tokens[:cut], text_or_tokens[cut:]))
        else:
            train_ids, ids = np.split(_check_tokens(text_or_tokens, tokenizer), [cut])
        train = TokenDataset(train_ids, length, tokenizer)
        size = None if tokenizer is None else num_bytes(tokenizer, ids[1:])
        validation = TokenDataset(ids, length, tokenizer, size) if train_split < 1 else None
    batch_size = config.resolved().training.batch_size
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": config.data.num_workers, "collate_fn": collate}
    return DataLoader(train, shuffle=True, **options), _validation_loaders(validation, config, options)


def stream_loaders(
    config: Config, show_progress: bool = True
) -> tuple[DataLoader[Batch], ValidationLoaders | None, list[str]]:
    """Returns the loaders of a stream and of its validation data (None: there is none), and lines for the user.

    Raises ConfigError if the text cannot be read, or is too short for what is held out.
    """
    data = config.data
    stream = TextStream(data, config.training.seed)
    validation: TokenDataset | None = None
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
    return DataLoader(stream, **options), _validation_loaders(validation, config, options), lines


def _validation_loaders(validation: TokenDataset | None, config: Config, options: Any) -> ValidationLoaders | None:
    """Returns the loader of a dataset, or those of its sets by name: of a mixture, or of a mapping in the config."""
    named, sets = config.data.validation_source, dict[str, TokenDataset]()
    if isinstance(validation, MixedDataset) and len(validation.datasets) > 1:
        sets = dict(zip(set_names(validation.names), validation.datasets, strict=True))
    elif isinstance(named, dict) and validation is not None:
        sets = dict.fromkeys(named, validation)
    if sets:
        return {name: DataLoader(dataset, **options) for name, dataset in sets.items()}
    return None if validation is None else DataLoader(validation, **options)


def corpus_samples(
    corpus: Corpus, sequence_length: int, has_validation: bool = True
) -> tuple[TokenDataset | None, TokenDataset | None]:
    """Returns training samples, mixed by the sources' weights, and validation samples, each once.

    If `corpus.validation` has sources, they are the validation samples, and there may be none for training.
    Raises ConfigError if a part of a source is too short for one sample.
    """

    def samples(source: Source, tokens: Tokens) -> TokenDataset:
        try:
            if tokens.rows is not None:
                kind = PackedDataset if corpus.packing else PairDataset
                return kind(tokens, sequence_length, corpus.tokenizer, corpus.end_of_text)
            return TokenDataset(tokens.ids, sequence_length, corpus.tokenizer, tokens.num_bytes, corpus.end_of_text)
        except ConfigError as error:
            raise ConfigError([*error.problems, Problem("", advice=f"The source is {source.name}.")]) from error

    train = {source.name: samples(source, source.train) for source in corpus.sources}
    held_out = corpus.validation or (corpus.sources if has_validation else ())
    validation = {source.name: samples(source, source.validation) for source in held_out}
    if max(len(train), len(validation)) <= 1:
        return next(iter(train.values()), None), next(iter(validation.values()), None)
    weights = [source.weight for source in corpus.sources]
    trained = MixedDataset(train, weights) if len(train) > 1 else next(iter(train.values()), None)
    return trained, MixedDataset(validation) if validation else None


def _encode_text(text: str, tokenizer: Tokenizer | None) -> NDArray[np.integer]:
    if tokenizer is None:
        raise ConfigError(Problem("tokenizer", None, "a tokenizer, if the data is a text"))
    pieces = list(encode_pieces(with_unknown(tokenizer), read_pieces(io.StringIO(text, newline=""))))
    if lacking := sorted({unknown for piece in pieces for _, unknown in piece.unknown}):
        raise ConfigError(Problem("unknown to the tokenizer", lacking, "text that its vocabulary has"))
    return np.concatenate([np.empty(0, np.uint16), *(piece.ids for piece in pieces)])


def _check_tokens(data: Any, tokenizer: Tokenizer | None) -> NDArray[np.integer]:
    tokens: NDArray[Any] = np.asarray(data)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        reason = f"of shape {tokens.shape} and type {tokens.dtype}"
        raise ConfigError(Problem("tokens", tokens, "1-D integers", reason=reason))
    if tokenizer is not None and tokens.size and not 0 <= tokens.min() <= tokens.max() < num_ids(tokenizer):
        allowed = f"0 to {num_ids(tokenizer) - 1}, the tokenizer's vocabulary"
        raise ConfigError(Problem("tokens", (int(tokens.min()), int(tokens.max())), allowed))
    return tokens
