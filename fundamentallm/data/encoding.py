"""A source as files of tokens: encoded once, on all cores, and taken up again where it was broken off.

tokenizer.json                          what made the tokens
train.bin, validation.bin               token ids, in the smallest unsigned integers that hold the vocabulary
train.rows.bin, validation.rows.bin     of pairs: for each, the token its answer begins at and the one after its end
bad_rows.txt                            what was left out, a line each
meta.json                               type and number of the tokens, and the settings they were made with
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from fundamentallm.config.files import kind_of
from fundamentallm.config.schema import DataConfig
from fundamentallm.data.sources import PIECE, Piece, Place, read_source, token_blocks
from fundamentallm.data.tokenizers import lacking_characters, num_bytes, unknown_token
from fundamentallm.errors import ConfigError

PIECES_AT_ONCE = max(16, 2 * (os.cpu_count() or 1))
"""Pieces that the tokenizer's threads share; bounds memory, at about 150 bytes a token."""
ROWS_AT_ONCE = 8192
"""Most of them, where they are small."""
NOTED_EVERY = 2**26
"""Characters between two notes of how far the encoding is, from which it goes on after a kill."""
PARTS = ("train", "validation")
NOTE = "progress.json"
SETTINGS = ("tokenizer", "train_split", "end_of_text", "prompt_field")
"""Those that decide what the tokens are, and what they are for."""


@dataclass
class Note:
    """How far a source is encoded."""

    after: Place = Place()  # noqa: RUF009  # it cannot be changed
    done: int = 0
    """Characters, or pairs."""
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    rows: list[int] = field(default_factory=lambda: [0, 0])
    validation_bytes: int = 0


def prepare_source(
    config: DataConfig,
    source: str,
    size: int,
    bad: list[str],
    tokenizer: Tokenizer,
    folder: Path,
    is_ready: Callable[[], bool],
    show_progress: bool,
) -> None:
    """Write a source's tokens to `folder`, whole or not at all; what is there of an earlier attempt is used.

    Args:
        config: how to read and to split it.
        source: which.
        size: its characters; of pairs and of tokens, their number.
        bad: its rows that cannot be read.
        tokenizer: for it.
        folder: is there afterwards.
        is_ready: whether it is there already, and not damaged.
        show_progress: by a bar.

    Raises:
        ConfigError: if the vocabulary lacks some of the characters, or the tokens are of another.
        OSError: if the files cannot be written.
    """
    staging = folder.with_name(f".staging-{folder.name}")
    with _locked(staging):
        if is_ready():  # another process was faster
            shutil.rmtree(staging)
            return
        try:
            # Not by its own `save`, whose errors are no OSErrors.
            (staging / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            train_size = int(size * config.train_split)
            with tqdm(
                total=size,
                desc=f"tokenizing {os.path.basename(source)}",
                unit="",
                unit_scale=True,
                disable=not show_progress,
            ) as bar:
                if kind_of(config, source) == "tokens":
                    note = _copy(config, source, train_size, tokenizer, staging, bar)
                else:
                    note = _encode(config, source, train_size, tokenizer, staging, bar)
            if note.done != size:
                raise ConfigError(f"source is {source!r}, which was changed while it was read; start again.")
            if bad:
                (staging / "bad_rows.txt").write_text("".join(f"{row}\n" for row in bad), encoding="utf-8")
            meta = {
                "dtype": token_dtype(tokenizer).name,
                "tokens": note.tokens,
                "rows": note.rows if config.prompt_field is not None else None,
                "validation_bytes": note.validation_bytes,
                "bad_rows": len(bad),
                "settings": {name: getattr(config, name) for name in SETTINGS},
            }
            (staging / "meta.json").write_text(json.dumps(meta))
            (staging / NOTE).unlink(missing_ok=True)
        except ConfigError:  # which would come again
            shutil.rmtree(staging, ignore_errors=True)
            raise
        try:
            staging.rename(folder)
        except OSError:
            if is_ready():
                shutil.rmtree(staging)
            else:  # a damaged entry of ours
                shutil.rmtree(folder)
                staging.rename(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Have a folder, made if need be, for this process alone; waits for another that has it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                lock = stack.enter_context((folder / ".lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                is_mine = os.path.samestat(os.fstat(lock.fileno()), (folder / ".lock").stat())
            except FileNotFoundError:
                continue
            if is_mine:  # else the folder was given its name, or deleted, meanwhile
                yield
                return


def _encode(
    config: DataConfig, source: str, train_size: int, tokenizer: Tokenizer, staging: Path, bar: tqdm[Any]
) -> Note:
    """Encode what is not yet."""
    note, by_rows = _noted(staging), config.prompt_field is not None
    end = None if config.end_of_text is None else tokenizer.token_to_id(config.end_of_text)
    dtype, waiting = token_dtype(tokenizer), deque[tuple[int, Piece]]()
    bar.update(note.done)

    def texts() -> Iterator[str]:
        pieces = read_source(config, source, [], note.after)
        for part, piece in split_pieces(pieces, train_size, note.done, by_rows):
            waiting.append((part, piece))
            yield piece.text

    with contextlib.ExitStack() as stack:
        files, row_files = (
            [stack.enter_context(_opened(staging / name, size)) for name, size in zip(names, sizes, strict=True)]
            for names, sizes in (
                ([f"{part}.bin" for part in PARTS], [count * dtype.itemsize for count in note.tokens]),
                ([f"{part}.rows.bin" for part in PARTS if by_rows], [count * 16 for count in note.rows if by_rows]),
            )
        )
        unnoted, answer = 0, 0
        for text, ids in encode_pieces(tokenizer, texts(), plain=end is not None):
            part, piece = waiting.popleft()
            if part == 1 and not piece.is_prompt:
                first = ids[: note.tokens[1] == 0 and not by_rows]  # which is no target
                note.validation_bytes += len(text.encode()) - num_bytes(tokenizer, first)
            files[part].write(ids.data)
            note.tokens[part] += len(ids)
            unnoted += len(text)
            if piece.is_prompt:
                answer = note.tokens[part]
                continue
            if piece.ends and end is not None:
                files[part].write(dtype.type(end).tobytes())
                note.tokens[part] += 1
            if by_rows:
                row_files[part].write(np.array([answer, note.tokens[part]]).data)
                note.rows[part] += 1
            advanced = 1 if by_rows else len(text)
            note.done += advanced
            bar.update(advanced)
            if piece.after is not None:
                note.after = piece.after
                if unnoted >= NOTED_EVERY:
                    unnoted = 0
                    _write_note(note, [*files, *row_files], staging)
    return note


def _copy(
    config: DataConfig, source: str, train_size: int, tokenizer: Tokenizer, staging: Path, bar: tqdm[Any]
) -> Note:
    """Copy ready-made tokens, each of which the vocabulary has."""
    note, dtype, vocabulary = Note(), token_dtype(tokenizer), tokenizer.get_vocab_size()
    end = None if config.end_of_text is None else tokenizer.token_to_id(config.end_of_text)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_opened(staging / f"{name}.bin", 0)) for name in PARTS]
        for path, block in token_blocks(config, source, dtype):
            if not 0 <= block.min() <= block.max() < vocabulary:
                raise ConfigError(
                    f"source has {str(path)!r}, with tokens from {block.min()} to {block.max()}; allowed: 0 to "
                    f"{vocabulary - 1}, the vocabulary of data.tokenizer."
                )
            cut = max(0, min(len(block), train_size - note.done))
            for part, ids in enumerate((block[:cut], block[cut:])):
                ids = ids.astype(dtype)
                if part == 1:
                    # Decoded in blocks: a character across two of them counts as what it is where bytes are decoded.
                    note.validation_bytes += num_bytes(tokenizer, ids[note.tokens[1] == 0 :], end)
                files[part].write(ids.data)
                note.tokens[part] += len(ids)
            note.done += len(block)
            bar.update(len(block))
    return note


def _noted(staging: Path) -> Note:
    """How far an earlier attempt came; its beginning where there was none."""
    try:
        values = json.loads((staging / NOTE).read_text())
        return Note(**{**values, "after": Place(*values["after"])})
    except (OSError, ValueError, TypeError, KeyError):
        return Note()


def _write_note(note: Note, files: Iterable[BufferedWriter], staging: Path) -> None:
    """Note how far the files are, once they are on the disk."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    new = staging / f"{NOTE}.new"
    new.write_text(json.dumps(asdict(note)))
    new.replace(staging / NOTE)


def _opened(path: Path, size: int) -> BufferedWriter:
    """A file to write to from byte `size` on."""
    file = path.open("ab")
    file.truncate(size)
    return file


def split_pieces(
    pieces: Iterable[Piece], train_size: int, position: int = 0, by_rows: bool = False
) -> Iterator[tuple[int, Piece]]:
    """Each piece with its part (0: training, 1: validation), cut where the text passes `train_size` characters.

    Args:
        pieces: from `position` on.
        train_size: characters of the training part; with `by_rows`, its pairs, which are not cut.
        position: characters, or pairs, before the first piece.
        by_rows: whether the pieces are pairs.
    """
    for piece in pieces:
        if by_rows:
            yield int(position >= train_size), piece
            position += piece.ends
            continue
        cut, length = max(0, min(len(piece.text), train_size - position)), len(piece.text)
        position += length
        if 0 < cut < length:
            yield 0, Piece(piece.text[:cut])
            yield 1, piece._replace(text=piece.text[cut:])
        elif length:
            yield int(cut == 0), piece


def encode_pieces(
    tokenizer: Tokenizer, pieces: Iterable[str], plain: bool = False
) -> Iterator[tuple[str, NDArray[np.integer]]]:
    """Each piece with its token ids, in the smallest unsigned integers that hold the vocabulary.

    Args:
        tokenizer: the tokenizer.
        pieces: the text.
        plain: whether special tokens that are written out in the text are text like any other.

    Raises:
        ConfigError: if the vocabulary lacks some of the characters.
    """
    dtype = token_dtype(tokenizer)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy that is set to return every token of a text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = plain
    unknown = unknown_token(tokenizer)
    remaining, known = iter(pieces), np.zeros(sys.maxunicode + 1, dtype=bool)
    encode = functools.partial(tokenizer.encode_batch_fast, add_special_tokens=False)
    # The library's threads encode a batch while this one, which alone can make Python objects, takes in the last.
    with ThreadPoolExecutor(1) as executor:
        last: list[str] = []
        encoded: Future[Any] | None = None
        while True:
            batch = _batch(remaining)
            _check_characters(tokenizer, batch, known, unknown)
            waiting, encoded = encoded, executor.submit(encode, batch) if batch else None
            for piece, encoding in zip(last, waiting.result() if waiting else (), strict=True):
                yield piece, np.array(encoding.ids, dtype=dtype)
            if encoded is None:
                return
            last = batch


def _batch(pieces: Iterator[str]) -> list[str]:
    batch: list[str] = []
    size = 0
    while size < PIECES_AT_ONCE * PIECE and len(batch) < ROWS_AT_ONCE and (piece := next(pieces, None)) is not None:
        batch.append(piece)
        size += len(piece)
    return batch


def _check_characters(tokenizer: Tokenizer, batch: list[str], known: NDArray[np.bool_], unknown: int | None) -> None:
    """Refuse characters that the vocabulary lacks; `known`, by code point, are those it is known to have."""
    codes = np.frombuffer("".join(batch).encode("utf-32-le"), np.uint32)
    if known[codes].all():
        return
    for piece in batch:
        codes = np.frombuffer(piece.encode("utf-32-le"), np.uint32)
        if known[codes].all():
            continue
        have = set(map(chr, np.unique(codes[known[codes]])))
        if lacking := lacking_characters(tokenizer, piece, have, unknown):
            raise ConfigError(
                f"the text has {', '.join(map(repr, lacking[:10]))}{', ...' if len(lacking) > 10 else ''}, "
                "which the tokenizer's vocabulary lacks; leave them out, or give another tokenizer."
            )
        known[[ord(character) for character in have]] = True


def token_dtype(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger]:
    """The smallest type that holds the vocabulary's ids."""
    return np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)
