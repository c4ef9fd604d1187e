"""Encodes a source into files of tokens, on all cores.

tokenizer.json                          the tokenizer
train.bin, validation.bin               token ids, in the smallest unsigned integers that hold the vocabulary
train.rows.bin, validation.rows.bin     for each pair, the index of its answer's first token and of its end
bad_rows.txt                            the rows that were skipped, one a line
meta.json                               type and number of the tokens, and the settings they were made with
"""

from __future__ import annotations

import array
import contextlib
import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from fundamentallm.config.schema import DataConfig
from fundamentallm.data.sources import PIECE, Piece, SourceFiles, read_source, source_error, token_blocks
from fundamentallm.data.tokenizers import lacking_characters, num_bytes, unknown_token
from fundamentallm.errors import ConfigError, Problem

PIECES_AT_ONCE = max(16, 2 * (os.cpu_count() or 1))
"""Pieces that the tokenizer's threads encode together. Bounds memory, at about 150 bytes a token."""
ROWS_AT_ONCE = 8192
"""Most pieces encoded together if they are small."""
PARTS = ("train", "validation")
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
class Written:
    """What was written of a source; the lists hold one item for each part."""

    done: int = 0
    """Characters; for pairs and tokens, their number."""
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    rows: list[array.array[int]] = field(default_factory=lambda: [array.array("q"), array.array("q")])
    validation_bytes: int = 0


def progress_bar(action: str, source: SourceFiles, is_shown: bool, total: int | None = None) -> tqdm[Any]:
    """Make a progress bar that appears after a second, so not for a small text."""
    title = f"{action} {os.path.basename(source.name)}"
    return tqdm(desc=title, total=total, unit="", unit_scale=True, delay=1, disable=not is_shown)


def write_source(
    config: DataConfig, source: SourceFiles, facts: Facts, tokenizer: Tokenizer, folder: Path, show_progress: bool
) -> None:
    """Write the files of a prepared source to an empty folder.

    Raises:
        ConfigError: if the vocabulary lacks some of the characters or tokens.
        OSError: if the files cannot be written.
    """
    # Tokenizer.save raises exceptions that are no OSErrors.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    train_size, by_rows = int(facts.size * config.train_split), config.prompt_field is not None
    end = None if config.end_of_text is None else tokenizer.token_to_id(config.end_of_text)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress_bar("tokenizing", source, show_progress, facts.size))
        files = [stack.enter_context((folder / f"{part}.bin").open("wb")) for part in PARTS]
        if source.kind == "tokens":
            written = _copy_tokens(source, train_size, tokenizer, end, files, bar)
        else:
            pieces = split_pieces(read_source(config, source, []), train_size, by_rows)
            written = _encode(pieces, by_rows, tokenizer, end, files, bar)
    if written.done != facts.size:
        raise source_error(source.name, "which was changed while it was read", advice="Start again.")
    if by_rows:
        for part, rows in zip(PARTS, written.rows, strict=True):
            (folder / f"{part}.rows.bin").write_bytes(rows)
    if facts.bad:
        (folder / "bad_rows.txt").write_text("".join(f"{row}\n" for row in facts.bad), encoding="utf-8")
    meta = {
        "dtype": token_dtype(tokenizer).name,
        "tokens": written.tokens,
        "rows": [len(rows) // 2 for rows in written.rows] if by_rows else None,
        "validation_bytes": written.validation_bytes,
        "bad_rows": len(facts.bad),
        "settings": {name: getattr(config, name) for name in SETTINGS},
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def _encode(
    pieces: Iterator[tuple[int, Piece]],
    by_rows: bool,
    tokenizer: Tokenizer,
    end: int | None,
    files: Sequence[BinaryIO],
    bar: tqdm[Any],
) -> Written:
    """Write the tokens of pieces of text, each with its part, and `end` after each document."""
    written, answer, dtype = Written(), 0, token_dtype(tokenizer)
    pieces, ahead = itertools.tee(pieces)
    encoded = encode_pieces(tokenizer, (piece.text for _, piece in ahead), plain=end is not None)
    for (part, piece), (text, ids) in zip(pieces, encoded, strict=True):
        if part == 1 and not piece.is_prompt:
            first = ids[: written.tokens[1] == 0 and not by_rows]  # the first token is not a target
            written.validation_bytes += len(text.encode()) - num_bytes(tokenizer, first)
        files[part].write(ids.data)
        written.tokens[part] += len(ids)
        if piece.is_prompt:
            answer = written.tokens[part]
            continue
        if piece.ends and end is not None:
            files[part].write(dtype.type(end).tobytes())
            written.tokens[part] += 1
        if by_rows:
            written.rows[part].extend((answer, written.tokens[part]))
        advanced = 1 if by_rows else len(text)
        written.done += advanced
        bar.update(advanced)
    return written


def _copy_tokens(
    source: SourceFiles,
    train_size: int,
    tokenizer: Tokenizer,
    end: int | None,
    files: Sequence[BinaryIO],
    bar: tqdm[Any],
) -> Written:
    """Copy ready-made tokens after checking that the vocabulary has them."""
    written, dtype, vocabulary = Written(), token_dtype(tokenizer), tokenizer.get_vocab_size()
    for path, block in token_blocks(source, dtype):
        if not 0 <= block.min() <= block.max() < vocabulary:
            reason = f"whose file {path} has tokens from {block.min()} to {block.max()}"
            raise source_error(source.name, reason, f"0 to {vocabulary - 1}, the vocabulary of data.tokenizer")
        cut = max(0, min(len(block), train_size - written.done))
        train, validation = block[:cut].astype(dtype), block[cut:].astype(dtype)
        # Each block is decoded by itself, so a character on the border may count a few bytes too many.
        written.validation_bytes += num_bytes(tokenizer, validation[written.tokens[1] == 0 :], end)
        for part, ids in enumerate((train, validation)):
            files[part].write(ids.data)
            written.tokens[part] += len(ids)
        written.done += len(block)
        bar.update(len(block))
    return written


def split_pieces(pieces: Iterable[Piece], train_size: int, by_rows: bool = False) -> Iterator[tuple[int, Piece]]:
    """Yield each piece with its part (0: training, 1: validation), and cut the piece that has both.

    `train_size` counts characters, or with `by_rows` pairs, which are not cut.
    """
    position = 0
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

    Special tokens that occur literally in the text are ordinary text if `plain` is true.

    Raises:
        ConfigError: if the vocabulary lacks some of the characters.
    """
    dtype = token_dtype(tokenizer)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy, to leave the caller's truncation and padding alone
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = plain
    encode = functools.partial(tokenizer.encode_batch_fast, add_special_tokens=False)

    def submitted() -> Iterator[tuple[list[str], Any]]:
        for batch in _batches(pieces):
            _check_characters(tokenizer, batch, known, unknown)
            yield batch, executor.submit(encode, batch)
        yield [], None

    known, unknown = set[str](), unknown_token(tokenizer)
    with ThreadPoolExecutor(1) as executor:
        # The library's threads encode a batch while this thread converts the previous one to arrays.
        for (batch, encodings), _ in itertools.pairwise(submitted()):
            for piece, encoding in zip(batch, encodings.result(), strict=True):
                yield piece, np.array(encoding.ids, dtype=dtype)


def _batches(pieces: Iterable[str]) -> Iterator[list[str]]:
    batch, size = list[str](), 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= PIECES_AT_ONCE * PIECE or len(batch) >= ROWS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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
