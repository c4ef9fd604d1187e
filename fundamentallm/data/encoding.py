"""Encodes a source into files of tokens, on all cores, and continues an interrupted encoding.

tokenizer.json                          the tokenizer
train.bin, validation.bin               token ids, in the smallest unsigned integers that hold the vocabulary
train.rows.bin, validation.rows.bin     for each pair, the index of its answer's first token and of its end
bad_rows.txt                            the rows that were skipped, one a line
meta.json                               type and number of the tokens, and the settings they were made with
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from io import BufferedWriter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from fundamentallm.config.schema import DataConfig
from fundamentallm.data.sources import PIECE, Piece, Position, SourceFiles, read_source, source_error, token_blocks
from fundamentallm.data.tokenizers import lacking_characters, num_bytes, unknown_token
from fundamentallm.errors import ConfigError, Problem

PIECES_AT_ONCE = max(16, 2 * (os.cpu_count() or 1))
"""Pieces that the tokenizer's threads encode together. Bounds memory, at about 150 bytes a token."""
ROWS_AT_ONCE = 8192
"""Most pieces encoded together if they are small."""
SAVE_EVERY = 2**26
"""Characters between two saves of the progress."""
PARTS = ("train", "validation")
PROGRESS = "progress.json"
SETTINGS = ("tokenizer", "train_split", "end_of_text", "prompt_field")
"""Settings that decide what the tokens are and mean."""


class Facts(NamedTuple):
    """The content of a source."""

    sha256: str
    size: int
    """Characters; for pairs and tokens, their number."""
    alphabet: str
    """Its characters, if the tokenizer needs them."""
    bad: list[str]
    """Its rows that cannot be read."""


@dataclass
class Progress:
    """How much of a source is encoded."""

    after: Position = Position()  # noqa: RUF009  # immutable
    done: int = 0
    """Characters; for pairs and tokens, their number."""
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    rows: list[int] = field(default_factory=lambda: [0, 0])
    validation_bytes: int = 0


def prepare_source(
    config: DataConfig,
    source: SourceFiles,
    facts: Facts,
    tokenizer: Tokenizer,
    folder: Path,
    is_ready: Callable[[Path], bool],
    show_progress: bool,
) -> None:
    """Write a source's tokens to `folder`, completely or not at all. Continues an earlier attempt.

    `is_ready` returns whether a folder exists and is complete.

    Raises:
        ConfigError: if the vocabulary lacks some of the characters or tokens.
        OSError: if the files cannot be written.
    """
    staging = folder.with_name(f".staging-{folder.name}")
    with _locked(staging):
        if is_ready(folder):  # another process made it
            shutil.rmtree(staging)
            return
        title = f"tokenizing {os.path.basename(source.name)}"
        try:
            with tqdm(total=facts.size, desc=title, unit="", unit_scale=True, disable=not show_progress) as bar:
                _write_files(config, source, facts, tokenizer, staging, bar)
        except ConfigError:  # the same error would come again
            shutil.rmtree(staging, ignore_errors=True)
            raise
        try:
            staging.rename(folder)
        except OSError:
            if is_ready(folder):
                shutil.rmtree(staging)
            else:  # the folder is damaged
                shutil.rmtree(folder)
                staging.rename(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create a folder if necessary and hold its lock. Waits for another process that holds it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                lock = stack.enter_context((folder / ".lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                is_same = os.path.samestat(os.fstat(lock.fileno()), (folder / ".lock").stat())
            except FileNotFoundError:
                continue
            if is_same:  # otherwise the holder has renamed or deleted the folder
                yield
                return


def _write_files(
    config: DataConfig, source: SourceFiles, facts: Facts, tokenizer: Tokenizer, staging: Path, bar: tqdm[Any]
) -> None:
    """Write all files of a prepared source to the staging folder."""
    # Tokenizer.save raises exceptions that are no OSErrors.
    (staging / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    write = _copy_tokens if source.kind == "tokens" else _encode
    progress = write(config, source, int(facts.size * config.train_split), tokenizer, staging, bar)
    if progress.done != facts.size:
        raise source_error(source.name, "which was changed while it was read", advice="Start again.")
    if facts.bad:
        (staging / "bad_rows.txt").write_text("".join(f"{row}\n" for row in facts.bad), encoding="utf-8")
    meta = {
        "dtype": token_dtype(tokenizer).name,
        "tokens": progress.tokens,
        "rows": progress.rows if config.prompt_field is not None else None,
        "validation_bytes": progress.validation_bytes,
        "bad_rows": len(facts.bad),
        "settings": {name: getattr(config, name) for name in SETTINGS},
    }
    (staging / "meta.json").write_text(json.dumps(meta))
    (staging / PROGRESS).unlink(missing_ok=True)


def _encode(
    config: DataConfig, source: SourceFiles, train_size: int, tokenizer: Tokenizer, staging: Path, bar: tqdm[Any]
) -> Progress:
    """Encode the rest of a source."""
    progress, by_rows = _read_progress(staging), config.prompt_field is not None
    end = None if config.end_of_text is None else tokenizer.token_to_id(config.end_of_text)
    dtype, waiting = token_dtype(tokenizer), deque[tuple[int, Piece]]()
    bar.update(progress.done)

    def texts() -> Iterator[str]:
        pieces = read_source(config, source, [], progress.after)
        for part, piece in split_pieces(pieces, train_size, progress.done, by_rows):
            waiting.append((part, piece))
            yield piece.text

    with contextlib.ExitStack() as stack:
        files = _open_files(stack, staging, ".bin", [count * dtype.itemsize for count in progress.tokens])
        row_files = _open_files(stack, staging, ".rows.bin", [count * 16 for count in progress.rows if by_rows])
        unsaved, answer = 0, 0
        for text, ids in encode_pieces(tokenizer, texts(), plain=end is not None):
            part, piece = waiting.popleft()
            if part == 1 and not piece.is_prompt:
                first = ids[: progress.tokens[1] == 0 and not by_rows]  # the first token is not a target
                progress.validation_bytes += len(text.encode()) - num_bytes(tokenizer, first)
            files[part].write(ids.data)
            progress.tokens[part] += len(ids)
            unsaved += len(text)
            if piece.is_prompt:
                answer = progress.tokens[part]
                continue
            if piece.ends and end is not None:
                files[part].write(dtype.type(end).tobytes())
                progress.tokens[part] += 1
            if by_rows:
                row_files[part].write(np.array([answer, progress.tokens[part]]).data)
                progress.rows[part] += 1
            advanced = 1 if by_rows else len(text)
            progress.done += advanced
            bar.update(advanced)
            if piece.after is not None:
                progress.after = piece.after
                if unsaved >= SAVE_EVERY:
                    unsaved = 0
                    _save_progress(progress, [*files, *row_files], staging)
    return progress


def _copy_tokens(
    config: DataConfig, source: SourceFiles, train_size: int, tokenizer: Tokenizer, staging: Path, bar: tqdm[Any]
) -> Progress:
    """Copy ready-made tokens after checking that the vocabulary has them."""
    progress, dtype, vocabulary = Progress(), token_dtype(tokenizer), tokenizer.get_vocab_size()
    end = None if config.end_of_text is None else tokenizer.token_to_id(config.end_of_text)
    with contextlib.ExitStack() as stack:
        files = _open_files(stack, staging, ".bin", [0, 0])
        for path, block in token_blocks(source, dtype):
            if not 0 <= block.min() <= block.max() < vocabulary:
                reason = f"whose file {path} has tokens from {block.min()} to {block.max()}"
                raise source_error(source.name, reason, f"0 to {vocabulary - 1}, the vocabulary of data.tokenizer")
            cut = max(0, min(len(block), train_size - progress.done))
            for part, ids in enumerate((block[:cut], block[cut:])):
                ids = ids.astype(dtype)
                if part == 1:
                    # Each block is decoded by itself, so a character on the border may count a few bytes too many.
                    progress.validation_bytes += num_bytes(tokenizer, ids[progress.tokens[1] == 0 :], end)
                files[part].write(ids.data)
                progress.tokens[part] += len(ids)
            progress.done += len(block)
            bar.update(len(block))
    return progress


def _read_progress(staging: Path) -> Progress:
    """Returns the saved progress of an earlier attempt, or that of a start."""
    try:
        values = json.loads((staging / PROGRESS).read_text())
        return Progress(**{**values, "after": Position(*values["after"])})
    except (OSError, ValueError, TypeError, KeyError):
        return Progress()


def _save_progress(progress: Progress, files: Iterable[BufferedWriter], staging: Path) -> None:
    """Save the progress after the files have reached the disk."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    new = staging / f"{PROGRESS}.new"
    new.write_text(json.dumps(asdict(progress)))
    new.replace(staging / PROGRESS)


def _open_files(stack: contextlib.ExitStack, staging: Path, suffix: str, sizes: Iterable[int]) -> list[BufferedWriter]:
    """Open a file of each part for appending, cut to the size it had at the saved progress."""
    files = []
    for part, size in zip(PARTS, sizes, strict=False):
        file = stack.enter_context((staging / f"{part}{suffix}").open("ab"))
        file.truncate(size)
        files.append(file)
    return files


def split_pieces(
    pieces: Iterable[Piece], train_size: int, position: int = 0, by_rows: bool = False
) -> Iterator[tuple[int, Piece]]:
    """Yield each piece with its part (0: training, 1: validation), and cut the piece that has both.

    Args:
        pieces: the pieces after `position`.
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
    """Yield each piece with its token ids, in the smallest unsigned integers that hold the vocabulary.

    Args:
        tokenizer: the tokenizer.
        pieces: the text.
        plain: whether special tokens that occur literally in the text are ordinary text.

    Raises:
        ConfigError: if the vocabulary lacks some of the characters.
    """
    dtype = token_dtype(tokenizer)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy, to leave the caller's truncation and padding alone
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = plain
    unknown = unknown_token(tokenizer)
    remaining, known = iter(pieces), set[str]()
    encode = functools.partial(tokenizer.encode_batch_fast, add_special_tokens=False)
    # The library's threads encode a batch while this thread converts the previous one to arrays.
    with ThreadPoolExecutor(1) as executor:
        last: list[str] = []
        encoded: Future[Any] | None = None
        while True:
            batch = _next_batch(remaining)
            _check_characters(tokenizer, batch, known, unknown)
            waiting, encoded = encoded, executor.submit(encode, batch) if batch else None
            for piece, encoding in zip(last, waiting.result() if waiting else (), strict=True):
                yield piece, np.array(encoding.ids, dtype=dtype)
            if encoded is None:
                return
            last = batch


def _next_batch(pieces: Iterator[str]) -> list[str]:
    batch: list[str] = []
    size = 0
    while size < PIECES_AT_ONCE * PIECE and len(batch) < ROWS_AT_ONCE and (piece := next(pieces, None)) is not None:
        batch.append(piece)
        size += len(piece)
    return batch


def _check_characters(tokenizer: Tokenizer, batch: list[str], known: set[str], unknown: int | None) -> None:
    """Refuse characters that the vocabulary lacks, and add the others to `known`."""
    for piece in batch:
        if lacking := lacking_characters(tokenizer, piece, known, unknown):
            shown = ", ".join(map(repr, lacking[:10])) + (", ..." if len(lacking) > 10 else "")
            advice = f"The text has {shown}, which the vocabulary lacks: remove them, or change data.tokenizer."
            raise ConfigError(Problem("", lacking, advice=advice))


def token_dtype(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger]:
    """Returns the smallest type that holds the vocabulary's ids."""
    return np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)
