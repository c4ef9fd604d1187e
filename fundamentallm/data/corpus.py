"""Text files to memory-mapped tokens: read in pieces, split by position, encoded once, kept in a cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO

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
PIECES_AT_ONCE = 16
"""Pieces that the tokenizer's threads share; bounds memory, at about 150 bytes a token."""
BETWEEN_FILES = "\n\n"


class Corpus(NamedTuple):
    """A tokenized text, split by position."""

    tokenizer: Tokenizer
    train: NDArray[np.integer]
    validation: NDArray[np.integer]
    validation_bytes: int
    """UTF-8 bytes of the validation text after its first token: of all that is a target."""


def load_corpus(config: DataConfig, show_progress: bool = True) -> Corpus:
    """The text of `config.source` as tokens, from the cache where it has been encoded before.

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
    digest, characters = hashlib.sha256(), 0
    for piece in _read(config):
        digest.update(piece.encode())
        characters += len(piece)
    if characters == 0:
        raise ConfigError(f"source is {config.source!r}, which is empty; give a file with text in it.")
    given_file = config.tokenizer.endswith(".json")
    tokenizer_key = read_tokenizer(config.tokenizer).to_str() if given_file else config.tokenizer
    parts = (CACHE_FORMAT, tokenizers.__version__, tokenizer_key, config.train_split, digest.hexdigest())
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    folder = (Path(os.path.expanduser(config.cache_dir)) if config.cache_dir else _user_cache()) / key
    if corpus := _cached(folder):
        return corpus
    with writing(folder):
        _encode(config, characters, folder, show_progress)
    return _open(folder)


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
    remaining, known = iter(pieces), set[str]()
    while batch := list(islice(remaining, PIECES_AT_ONCE)):
        for piece in batch:
            if not known.issuperset(piece) and (lacking := lacking_characters(tokenizer, piece, known)):
                raise ConfigError(
                    f"the text has {', '.join(map(repr, lacking[:10]))}{', ...' if len(lacking) > 10 else ''}, "
                    "which the tokenizer's vocabulary lacks; give another data.tokenizer."
                )
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            yield piece, np.array(encoding.ids, dtype=dtype)


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
    return Corpus(read_tokenizer(folder / "tokenizer.json"), arrays[0], arrays[1], meta["validation_bytes"])
