"""Text files to memory-mapped tokens: read in pieces, split by position, encoded once, kept in a cache."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import mmap
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from fundamentallm.config import BUILT_IN_CORPUS, DataConfig
from fundamentallm.data.tokenizers import create_tokenizer, lacking_characters, num_bytes, read_tokenizer
from fundamentallm.errors import ConfigError, writing

CACHE_FORMAT = 1
PIECE = 65_536
"""Characters read, and given to the tokenizer, at once (up to the end of their line)."""
PIECES_AT_ONCE = max(16, 2 * (os.cpu_count() or 1))
"""Pieces that the tokenizer's threads share; bounds memory, at about 150 bytes a token."""
BETWEEN_FILES = "\n\n"
READ_WHOLE = 2**30
"""Bytes of training tokens above which samples are read one by one: in their random order the system's reading ahead
would fetch some hundred times as much. Smaller corpora it soon holds whole that way."""
SETTLED = 2_000_000_000
"""Nanoseconds since its last change after which a further one surely shows in a file's times."""


class Corpus(NamedTuple):
    """A tokenized text, split by position."""

    tokenizer: Tokenizer
    train: NDArray[np.integer]
    validation: NDArray[np.integer]
    validation_bytes: int
    """UTF-8 bytes of the validation text after its first token: of all that is a target."""


def load_corpus(config: DataConfig, show_progress: bool = True) -> Corpus:
    """The text of `config.source` as tokens, from the cache where it has been encoded before.

    Files that are what they were by size, times and inode are not read again; others are known by their content.

    Raises:
        ConfigError: if the text cannot be read, or has characters that the tokenizer's vocabulary lacks.

    Examples:
        >>> from pathlib import Path
        >>> from fundamentallm import DataConfig, load_corpus
        >>> _ = Path("my.txt").write_text("to be or not to be " * 100)
        >>> corpus = load_corpus(DataConfig(source="my.txt", train_split=0.9), show_progress=False)
        >>> corpus.tokenizer.decode(corpus.train[:18].tolist()), len(corpus.validation)
        ('to be or not to be', 190)
    """
    cache = Path(os.path.expanduser(config.cache_dir)) if config.cache_dir else _user_cache()
    looks = _looks(config)
    note = cache / "known" / looks if looks else None
    if note is not None:
        with contextlib.suppress(OSError):
            if corpus := _cached(cache / note.read_text()):
                return corpus
    digest, characters = hashlib.sha256(), 0
    for piece in _read(config):
        digest.update(piece.encode())
        characters += len(piece)
    if characters == 0:
        raise ConfigError(f"source is {config.source!r}, which is empty; give a file with text in it.")
    given_file = config.tokenizer.endswith(".json")
    tokenizer_key = read_tokenizer(config.tokenizer).to_str() if given_file else config.tokenizer
    key = _hash(CACHE_FORMAT, tokenizers.__version__, tokenizer_key, config.train_split, digest.hexdigest())
    corpus = _cached(cache / key)
    with writing(cache / key):
        if corpus is None:
            _encode(config, characters, cache / key, show_progress)
            corpus = _open(cache / key)
        if note is not None and looks == _looks(config):  # else they were changed while they were read
            note.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False) as file:
                file.write(key)
            os.replace(file.name, note)
    return corpus


def _looks(config: DataConfig) -> str | None:
    """All that shows from outside whether text and tokenizer are what they were; None where it might not show.

    A file that is changed twice within a tick of the file system's clock looks the same (git calls it racy).
    """
    files = config.source_files() or [Path(str(find_spec("pydoc_data.topics").origin))]  # type: ignore[union-attr]
    if config.tokenizer.endswith(".json"):
        files.append(Path(os.path.expanduser(config.tokenizer)))
    facts = []
    for file in files:
        try:
            found = file.stat()
        except OSError:  # reading it says why
            return None
        if time.time_ns() - found.st_ctime_ns < SETTLED:
            return None
        facts.append((str(file.absolute()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino))
    return _hash(CACHE_FORMAT, tokenizers.__version__, config.tokenizer, config.train_split, facts)


def _hash(*parts: object) -> str:
    """32 hexadecimal digits for what JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def vocabulary_size(config: DataConfig) -> int:
    """Tokens that `load_corpus`'s tokenizer knows; of 'bpe:<size>' what is asked for, which a short text may not fill.

    Without encoding anything: only 'char' reads the text, and a tokenizer.json is opened.

    Raises:
        ConfigError: if what has to be read cannot be.
    """
    kind, _, size = config.tokenizer.partition(":")
    if kind == "bpe":
        return int(size)
    return create_tokenizer(config.tokenizer, lambda: _read(config), lambda: ()).get_vocab_size()


def read_pieces(file: TextIO) -> Iterator[str]:
    """The text of `file` in pieces that end with a line."""
    while piece := file.read(PIECE):
        yield piece + file.readline()


def split_pieces(pieces: Iterable[str], train_characters: int) -> Iterator[tuple[str, str]]:
    """Each piece cut into (training part, validation part) where the text passes `train_characters`."""
    position = 0
    for piece in pieces:
        cut = max(0, min(len(piece), train_characters - position))
        position += len(piece)
        yield piece[:cut], piece[cut:]


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[str]) -> Iterator[tuple[str, NDArray[np.integer]]]:
    """Each piece with its token ids, in the smallest unsigned integers that hold the vocabulary.

    Raises:
        ConfigError: if the vocabulary lacks some of the characters.
    """
    dtype = token_dtype(tokenizer)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy that is set to return every token of a text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    remaining, known = iter(pieces), np.zeros(sys.maxunicode + 1, dtype=bool)
    encode = functools.partial(tokenizer.encode_batch_fast, add_special_tokens=False)
    # The library's threads encode a batch while this one, which alone can make Python objects, takes in the last.
    with ThreadPoolExecutor(1) as executor:
        last: list[str] = []
        encoded: Future[Any] | None = None
        while True:
            batch = list(islice(remaining, PIECES_AT_ONCE))
            for piece in batch:
                _check_characters(tokenizer, piece, known)
            waiting, encoded = encoded, executor.submit(encode, batch) if batch else None
            for piece, encoding in zip(last, waiting.result() if waiting else (), strict=True):
                yield piece, np.array(encoding.ids, dtype=dtype)
            if encoded is None:
                return
            last = batch


def _check_characters(tokenizer: Tokenizer, piece: str, known: NDArray[np.bool_]) -> None:
    """Refuse characters that the vocabulary lacks; `known`, by code point, are those it is known to have."""
    codes = np.frombuffer(piece.encode("utf-32-le"), np.uint32)
    new = codes[~known[codes]]
    if len(new) == 0:
        return
    have = set(map(chr, np.unique(codes[known[codes]])))
    if lacking := lacking_characters(tokenizer, piece, have):
        raise ConfigError(
            f"the text has {', '.join(map(repr, lacking[:10]))}{', ...' if len(lacking) > 10 else ''}, "
            "which the tokenizer's vocabulary lacks; give another data.tokenizer."
        )
    known[[ord(character) for character in have]] = True


def token_dtype(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger]:
    """The smallest type that holds the vocabulary's ids."""
    return np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)


def _read(config: DataConfig) -> Iterator[str]:
    """The text in pieces that end with a line, line ends as they are in the file."""
    if config.source == BUILT_IN_CORPUS:
        from pydoc_data.topics import topics

        yield from (text + BETWEEN_FILES for text in topics.values())
        return
    for number, path in enumerate(config.source_files()):
        if number:
            yield BETWEEN_FILES
        try:
            with path.open(encoding="utf-8", newline="") as file:
                yield from read_pieces(file)
        except UnicodeDecodeError as error:
            raise ConfigError(f"source has {str(path)!r}, which is not UTF-8 text: {error}.") from error
        except OSError as error:
            raise ConfigError(f"source has {str(path)!r}, which cannot be read: {error}.") from error


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fundamentallm"


def _encode(config: DataConfig, characters: int, folder: Path, show_progress: bool) -> None:
    """Write tokenizer, tokens and their counts to `folder`, whole or not at all."""
    train_characters = int(characters * config.train_split)
    tokenizer = create_tokenizer(
        config.tokenizer,
        text=lambda: _read(config),
        training_text=lambda: (train for train, _ in split_pieces(_read(config), train_characters)),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder.parent))
    try:
        # Not by its own `save`, whose errors are no OSErrors.
        (staging / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        files, counts, validation_bytes = ("train.bin", "validation.bin"), [0, 0], 0
        with tqdm(total=characters, desc="tokenizing", unit="char", unit_scale=True, disable=not show_progress) as bar:
            for part, name in enumerate(files):
                with (staging / name).open("wb") as file:
                    pieces = (split[part] for split in split_pieces(_read(config), train_characters) if split[part])
                    for piece, ids in encode_pieces(tokenizer, pieces):
                        if part == 1:
                            first = ids[:1] if counts[1] == 0 else ids[:0]
                            validation_bytes += len(piece.encode()) - num_bytes(tokenizer, first)
                        counts[part] += len(ids)
                        ids.tofile(file)
                        bar.update(len(piece))
        meta = {"dtype": token_dtype(tokenizer).name, "tokens": counts, "validation_bytes": validation_bytes}
        (staging / "meta.json").write_text(json.dumps(meta))
        try:
            staging.rename(folder)
        except OSError:
            if _cached(folder):  # another process, on another machine perhaps, was faster, and reads it by now
                shutil.rmtree(staging)
            else:  # a damaged entry of ours
                shutil.rmtree(folder)
                staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _cached(folder: Path) -> Corpus | None:
    """The cache entry at `folder`; None where there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ConfigError):
        return _open(folder)
    return None


def _open(folder: Path) -> Corpus:
    """The cache entry at `folder`. Raises FileNotFoundError if it is not there or not whole."""
    meta = json.loads((folder / "meta.json").read_text())
    dtype = np.dtype(meta["dtype"])
    arrays = []
    for name, count in zip(("train.bin", "validation.bin"), meta["tokens"], strict=True):
        if (folder / name).stat().st_size != count * dtype.itemsize:
            raise FileNotFoundError(folder / name)
        # An empty file cannot be mapped.
        arrays.append(np.memmap(folder / name, dtype=dtype, mode="r") if count else np.empty(0, dtype))
    if arrays[0].nbytes > READ_WHOLE and hasattr(mmap, "MADV_RANDOM"):
        arrays[0].base.madvise(mmap.MADV_RANDOM)  # type: ignore[union-attr]
    return Corpus(read_tokenizer(folder / "tokenizer.json"), arrays[0], arrays[1], meta["validation_bytes"])
