"""Sources as memory-mapped tokens: split by position, encoded once, kept in a cache."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import mmap
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from fundamentallm.config.files import DATASETS, SourceFiles, are_samples, find_source, find_sources, is_prepared
from fundamentallm.config.schema import END_OF_TEXT, DataConfig
from fundamentallm.config.validation import expand_user
from fundamentallm.data.chat import applied_template
from fundamentallm.data.encoding import PARTS, split_pieces, token_dtype, write_source
from fundamentallm.data.sources import read_source, reads_special_tokens, source_error, source_states, token_blocks
from fundamentallm.data.tokenizers import create_tokenizer, num_ids, read_tokenizer
from fundamentallm.errors import ConfigError, Problem, printable, writing

CACHE_FORMAT = 4
TOKENIZER = "tokenizer.json"
CHECKSUMS = "checksums.json"
"""File of a prepared source with the CRC-32 of each block of the others."""
CHECKED_BYTES = 2**30
"""A prepared source up to this size is compared with its checksums at each opening, a larger one by `prepare` only."""
SETTINGS = ("tokenizer", "end_of_text", "prompt_field", "messages_field", "unknown_tokens")
"""Settings that decide what the tokens are and mean."""


class Tokens(NamedTuple):
    """The training or validation part of a source."""

    ids: NDArray[np.integer]
    rows: NDArray[np.int64] | None  # for pairs, (pairs, 2): each answer's first token, and the one after its last
    num_bytes: int | None  # UTF-8 bytes of the text of all targets; None: unknown
    turns: NDArray[np.int64] | None = None  # for chats, the same of each assistant turn, one after the other


class Source(NamedTuple):
    """A tokenized source, split by position."""

    name: str
    weight: float
    train: Tokens
    validation: Tokens
    bad_rows: int  # number of rows that were skipped
    counts: dict[str, int]  # what else to report, by its name
    folder: Path
    left_out: str = ""  # files of the source that are not read


class Corpus(NamedTuple):
    """Tokenized sources."""

    tokenizer: Tokenizer
    sources: list[Source]
    end_of_text: int | None  # the token after each document
    validation: Sequence[Source] = ()  # sources whose validation parts take the place of those of `sources`
    packing: bool = False  # whether pairs are packed


def load_corpus(config: DataConfig, show_progress: bool = True, tokenizer: Tokenizer | None = None) -> Corpus:
    """Load the sources of `config` as tokens, from the cache if their files are unchanged since they were encoded.

    A given `tokenizer`, which the run began with, replaces one that would be learned from the text as it is now.

    Raises:
        ConfigError: if a source cannot be read, or has characters that the tokenizer's vocabulary lacks.
        FundamentaLLMError: if the cache cannot be written.

    Examples:
        >>> from pathlib import Path
        >>> from fundamentallm import DataConfig, load_corpus
        >>> _ = Path("my.txt").write_text("to be or not to be " * 100)
        >>> corpus = load_corpus(DataConfig(source="my.txt", train_split=0.9), show_progress=False)
        >>> source = corpus.sources[0]
        >>> corpus.tokenizer.decode(source.train.ids[:18].tolist()), len(source.validation.ids)
        ('to be or not to be', 190)
    """
    if config.streaming:
        raise ConfigError(Problem("data.streaming", True, "false, since the whole text is needed"))
    if config.validation_source is None:
        return _Cache(config, find_sources(config), config.train_split, show_progress).corpus(tokenizer)
    corpus = _Cache(config, find_sources(config), 1.0, show_progress).corpus(tokenizer)
    return corpus._replace(validation=load_validation(config, show_progress, corpus.tokenizer))


def load_validation(config: DataConfig, show_progress: bool, tokenizer: Tokenizer | None) -> list[Source]:
    """Load all of `config.validation_source` for validation, by its names. Raises what `load_corpus` raises."""
    config, named = replace(config, streaming=False, shuffle_buffer=None), config.validation_sources()
    found = [find_source(config, source, "data.validation_source") for source in named.values()]
    sources = _Cache(config, found, 0.0, show_progress).corpus(tokenizer).sources
    return [source._replace(name=name or source.name) for name, source in zip(named, sources, strict=True)]


def describe(corpus: Corpus) -> list[str]:
    """Returns a line for each source, and one for the rows that were skipped in it."""
    lines, total = [], sum(source.weight for source in corpus.sources)
    for source in (*corpus.sources, *corpus.validation):
        sizes = f"{len(source.train.ids):,} training and {len(source.validation.ids):,} validation tokens"
        if source.train.rows is not None and source.validation.rows is not None:
            kind = "pairs" if source.train.turns is None else "chats"
            sizes += f", {len(source.train.rows):,} and {len(source.validation.rows):,} {kind}"
        weight = f", weight {source.weight / total:.3g}" if len(corpus.sources) > 1 else ""
        lines.append(f"{source.name}: {sizes}{weight}, vocabulary {num_ids(corpus.tokenizer):,}")
        lines += [f"{source.name}: {count:,} {what}" for what, count in source.counts.items()]
        if source.left_out:
            lines.append(f"{source.name}: not read: {source.left_out}")
        if source.bad_rows:
            lines.append(f"{source.name}: {source.bad_rows:,} bad rows skipped: {source.folder / 'bad_rows.txt'}")
    return lines


def vocabulary_size(config: DataConfig) -> int:
    """Returns the vocabulary size of `load_corpus`'s tokenizer without encoding anything.

    For 'bpe:<size>' it is the size asked for, which a short text may not fill. Only 'char' reads the text.

    Raises:
        ConfigError: if the text or the tokenizer.json cannot be read.
    """
    for name in filter(is_prepared, config.sources()):
        return num_ids(read_tokenizer(Path(expand_user(name)) / TOKENIZER))
    config = config.resolved()
    kind, _, size = config.tokenizer.partition(":")
    if kind == "bpe":
        return int(size)
    sources = find_sources(config) if kind == "char" else []
    texts = (piece.text for source in sources for piece in read_source(config, source, []))
    return num_ids(create_tokenizer(config.tokenizer, texts, config.end_of_text))


def opened_note(name: str) -> Path:
    """Returns the file by whose existence a run of this user's has opened a source or a base model's folder."""
    where = name if name.startswith(DATASETS) else os.path.abspath(expand_user(name))
    return _user_cache() / "known" / _hash("opened", where)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or expand_user("~/.cache")) / "fundamentallm"


def touch_note(note: Path) -> None:
    """Makes a note in the user's cache."""
    with contextlib.suppress(OSError):  # a read-only cache still serves its tokens
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def _hash(*parts: object) -> str:
    """Returns 32 hexadecimal digits for values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class _Cache:
    """Makes the tokenizer, unless it is given, and the tokens of sources, or finds what was made of the same files."""

    def __init__(self, config: DataConfig, sources: list[SourceFiles], train_split: float, show_progress: bool) -> None:
        self.config, self.sources, self.train_split, self.show_progress = config, sources, train_split, show_progress
        self.folder = Path(expand_user(config.cache_dir)) if config.cache_dir else _user_cache()
        self.template = applied_template(config)
        self.settings = {name: getattr(config, name) for name in SETTINGS} | {
            "train_split": train_split,
            "special_tokens": "tokens" if reads_special_tokens(config) else "text",
            "chat_template": bool(self.template),
        }
        self.states = {source: source_states(source) for source in sources if source.kind != "prepared"}
        self.given: Tokenizer | None = None
        self.measured = functools.cache(self._measure)

    def corpus(self, given: Tokenizer | None) -> Corpus:
        """Load the sources, with the tokenizer that is given."""
        made = (read_tokenizer(source.files[0] / TOKENIZER) for source in self.sources if source.kind == "prepared")
        known = given or next(made, None)
        self.config = self.config.resolved(known is None or known.token_to_id(END_OF_TEXT) is not None)
        self.settings["end_of_text"] = self.config.end_of_text
        self.given, sources = given, list[Source]()
        for source in self.sources:
            folder = self._prepared(source) if source.kind == "prepared" else self._tokens(source)
            sources.append(_open(folder, source, self.config.sources().get(source.name, 1.0)))
            touch_note(opened_note(source.name))  # so that checkpoints of this run may open it
        if len({(source.folder / TOKENIZER).read_text(encoding="utf-8") for source in sources}) > 1:
            reason = "which were prepared with different tokenizers"
            raise ConfigError(Problem("data.source", list(self.config.sources()), "", "Prepare them together.", reason))
        tokenizer, end_of_text = read_tokenizer(sources[0].folder / TOKENIZER), self.config.end_of_text
        tokenizer.encode_special_tokens = not reads_special_tokens(self.config)
        end = None if end_of_text is None else tokenizer.token_to_id(end_of_text)
        return Corpus(tokenizer, sources, end, packing=self.config.packing)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the sources."""
        spec, end_of_text, tokenizer = self.config.tokenizer, self.config.end_of_text, self.given

        def learn(folder: Path) -> None:
            text = itertools.chain.from_iterable(map(self._text, self.states))
            (folder / TOKENIZER).write_text(create_tokenizer(spec, text, end_of_text).to_str(), encoding="utf-8")

        if tokenizer is None and (spec == "char" or spec.startswith("bpe:")):
            tokenizer = read_tokenizer(self._made(spec, list(self.states), learn) / TOKENIZER)
        tokenizer = tokenizer or create_tokenizer(spec, (), end_of_text)
        tokenizer.encode_special_tokens = not reads_special_tokens(self.config)
        return tokenizer

    def _text(self, source: SourceFiles) -> Iterator[str]:
        """Yields the text that the tokenizer is learned from."""
        for part, piece in self._read(source, "learning a tokenizer from", []):
            if part == 0 or self.config.tokenizer == "char":
                yield piece.text

    def _read(self, source: SourceFiles, action: str, bad: list[str]) -> Iterator[tuple[int, Any]]:
        """Yields pieces with their part (see `split_pieces`), and shows a progress bar after a second."""
        size, total = self.measured(source)
        title = f"{action} {printable(os.path.basename(source.name), keep='')}"
        pieces = read_source(self.config, source, bad)
        bar = tqdm(pieces, title, total, unit="", unit_scale=True, delay=1, disable=not self.show_progress)
        return split_pieces(bar, size, are_samples(self.config))

    def _measure(self, source: SourceFiles) -> tuple[int, int]:
        """Returns the number of characters, samples or tokens for training, and the number of all pieces."""
        size = pieces = 0
        if source.kind == "tokens":
            size = sum(len(block) for _, block in token_blocks(source, token_dtype(self.tokenizer)))
        else:
            for piece in read_source(self.config, source, []):
                pieces += 1
                size += piece.ends if are_samples(self.config) else len(piece.text)
        if size == 0:
            raise source_error(source.name, "which is empty", "a source with text in it")
        return int(size * self.train_split), pieces

    def _tokens(self, source: SourceFiles) -> Path:
        """Returns the folder with the tokens of a source."""

        def encode(folder: Path) -> None:
            # Tokenizer.save raises exceptions that are no OSErrors.
            (folder / TOKENIZER).write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")
            read = functools.partial(self._read, source, "tokenizing")
            meta = write_source(self.config, source, self.tokenizer, self.measured(source)[0], folder, read)
            (folder / "meta.json").write_text(json.dumps(meta | {"settings": self.settings}))

        return self._made(self.tokenizer.to_str(), [source], encode)

    def _prepared(self, source: SourceFiles) -> Path:
        """Returns the folder of a prepared source. Refuses damage, and settings that differ from its own."""
        (folder,) = source.files
        made_with = {"chat_template": False} | json.loads((folder / "meta.json").read_text())["settings"]
        different = {name: value for name, value in self.settings.items() if made_with.get(name, value) != value}
        path = str(different.get("tokenizer", ""))
        if path.endswith(".json") and read_tokenizer(path).to_str() == read_tokenizer(folder / TOKENIZER).to_str():
            del different["tokenizer"]
        if different:
            allowed = {name: f"{made_with[name]!r}, as in the source {source.name}" for name in different}
            raise ConfigError([Problem(f"data.{name}", value, allowed[name]) for name, value in different.items()])
        # Early versions wrote no checksums.
        if (folder / CHECKSUMS).exists() and not is_intact(folder):
            raise source_error(source.name, "which is damaged", advice="Prepare it again.")
        return folder

    def _made(self, tokenizer: str, sources: list[SourceFiles], write: Callable[[Path], None]) -> Path:
        """Returns a folder of the cache. If it is missing or damaged, `write` makes it, completely or not at all."""
        reading = self.config.text_field, self.config.max_bad_rows, self.template
        settings = self.settings | {"tokenizer": tokenizer}  # by its content
        states = [self.states[source] for source in sources]
        folder = self.folder / _hash(CACHE_FORMAT, tokenizers.__version__, settings, reading, states)
        if is_intact(folder):
            return folder
        new, locks = self.folder / f".staging-{folder.name}", self.folder / "known"
        with writing(self.folder, "Choose another data.cache_dir."), contextlib.ExitStack() as stack:
            locks.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((locks / f"{folder.name}.lock").open("w"))
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if is_intact(folder):  # another process has made it
                return folder
            shutil.rmtree(new, ignore_errors=True)  # of a killed process
            stack.callback(shutil.rmtree, new, ignore_errors=True)
            new.mkdir()
            write(new)
            if [source_states(source) for source in sources] != states:
                names = ", ".join(source.name for source in sources)
                raise source_error(names, "which was changed while it was read", advice="Start again.")
            (new / CHECKSUMS).write_text(json.dumps(_checksums(sorted(new.iterdir()))))
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
            new.rename(folder)
        return folder


def is_intact(folder: Path, is_large_checked: bool = False) -> bool:
    """Returns whether the files of a folder exist and, up to `CHECKED_BYTES` unless told, have their checksums."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        saved = json.loads((folder / CHECKSUMS).read_text())
        files = [folder / name for name in saved]
        is_large = sum(path.stat().st_size for path in files) > CHECKED_BYTES
        return (is_large and not is_large_checked) or saved == _checksums(files)
    return False


def _checksums(files: Iterable[Path]) -> dict[str, list[int]]:
    """Returns the CRC-32 of each block of files by their name."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.name] = [zlib.crc32(block) for block in iter(lambda: file.read(2**24), b"")]
    return found


def _open(folder: Path, source: SourceFiles, weight: float) -> Source:
    """Open a prepared source."""
    meta, parts = json.loads((folder / "meta.json").read_text()), list[Tokens]()
    for index, part in enumerate(PARTS):
        ids, rows, turns = _map_file(folder / f"{part}.bin", meta["dtype"], meta["tokens"][index]), None, None
        if meta["rows"] is not None:
            rows = _map_file(folder / f"{part}.rows.bin", "int64", 2 * meta["rows"][index]).reshape(-1, 2)
        if meta.get("turns") is not None:
            turns = _map_file(folder / f"{part}.turns.bin", "int64", meta["turns"][index])
        parts.append(Tokens(ids, rows, meta["validation_bytes"] if part == "validation" else None, turns))
    (train, validation), counts = parts, meta.get("counts", {})
    return Source(source.name, weight, train, validation, meta["bad_rows"], counts, folder, source.left_out)


def _map_file(path: Path, dtype: str, count: int) -> NDArray[Any]:
    if path.stat().st_size != count * np.dtype(dtype).itemsize:  # without checksums, nothing else has noticed
        raise source_error(str(path), "which is damaged", advice="Prepare it again.")
    if not count:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    mapped = np.memmap(path, dtype=dtype, mode="r", shape=(count,))
    # With read-ahead, samples in random order would read some hundred times their size.
    mapped.base.madvise(mmap.MADV_RANDOM)  # type: ignore[union-attr]
    return mapped
