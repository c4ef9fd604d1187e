"""Encodes a source into files of tokens, on all cores. `meta.json` says of what type and how many they are."""

from __future__ import annotations

import array
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fundamentallm.config.files import SourceFiles, are_samples
from fundamentallm.config.schema import DataConfig
from fundamentallm.data.chat import token_turns
from fundamentallm.data.sources import PIECE, Piece, skip_row, source_error, token_blocks
from fundamentallm.data.tokenizers import MISSING, Complete, find_unknown, num_bytes, num_ids, with_unknown

PIECES_AT_ONCE = max(16, 2 * (os.cpu_count() or 1))
"""Pieces that the tokenizer's threads encode together. Bounds memory, at about 150 bytes a token."""
ROWS_AT_ONCE = 8192
"""Most pieces encoded together if they are small."""
PARTS = ("train", "validation")
Place = TypeVar("Place")
Reader = Callable[[list[str]], Iterator[tuple[int, Piece]]]


class Encoded(NamedTuple):
    """The tokens of a text, and position and text of what the vocabulary lacks."""

    ids: NDArray[np.integer]
    unknown: list[tuple[int, str]]


class Part:
    """The training or the validation tokens of a source on their way to a file, and what is counted of them."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer, end: int | None, by_rows: bool) -> None:
        self.file, self.tokenizer, self.end, self.by_rows = file, tokenizer, end, by_rows
        self.dtype, self.tokens, self.num_bytes = token_dtype(tokenizer), 0, 0
        self.rows, self.turns = array.array("q"), array.array("q")

    def write_ids(self, ids: NDArray[np.integer]) -> None:
        """Write tokens."""
        self.file.write(ids.astype(self.dtype, copy=False).data)
        self.tokens += len(ids)

    def write(self, piece: Piece, encoded: Encoded) -> None:
        """Write the tokens of a piece. A prompt comes just before its answer."""
        answer, text, is_prompt = self.tokens, piece.text, self.by_rows and not piece.ends
        if piece.turns:
            turns = self.tokens + token_turns(self.tokenizer, text, piece.turns)
            self.turns.extend(turns)
            answer, text = turns[0], "".join(text[start:stop] for start, stop in piece.turns)
        if not is_prompt:
            first = encoded.ids[: self.tokens == 0 and not self.by_rows]  # the first token is not a target
            self.num_bytes += len(text.encode()) - num_bytes(self.tokenizer, first)
        self.write_ids(encoded.ids)
        if piece.ends and self.end is not None and not piece.turns:
            self.write_ids(np.array([self.end]))
        if self.by_rows and not is_prompt:
            self.rows.extend((answer, self.tokens))


def write_source(
    config: DataConfig, source: SourceFiles, tokenizer: Tokenizer, train_size: int, folder: Path, read: Reader
) -> dict[str, Any]:
    """Write the tokens of a source to an empty folder.

    `read` returns its pieces with their parts, and lists what it cannot read. Of files of tokens, the first
    `train_size` are for training.

    Returns:
        What the folder's meta.json has to say about them.

    Raises:
        ConfigError: if the vocabulary lacks some of the characters or tokens.
        OSError: if the files cannot be written.
    """
    by_rows, bad, counts = are_samples(config), list[str](), Counter[str]()
    added = tokenizer.get_added_tokens_decoder().values() if tokenizer.encode_special_tokens else ()
    names = sorted((token.content for token in added if token.special), key=len, reverse=True)  # the longest first
    special = re.compile("|".join(map(re.escape, names)) or r"\Z.")  # which never matches
    end = None if config.end_of_text is None else tokenizer.token_to_id(config.end_of_text)
    with (folder / "train.bin").open("wb") as train, (folder / "validation.bin").open("wb") as validation:
        parts = [Part(file, tokenizer, end, by_rows) for file in (train, validation)]
        if source.kind == "tokens":
            _copy_tokens(source, tokenizer, train_size, parts)
        pieces = read(bad) if source.kind != "tokens" else ()
        for row, is_used in encode_rows(config, source, with_unknown(tokenizer), pieces, bad):
            for index, piece, encoded in row if is_used else ():
                parts[index].write(piece, encoded)
                counts["special tokens read as text"] += len(special.findall(piece.text))
                counts["unknown tokens, for what the vocabulary lacks"] += len(encoded.unknown)
    for name, part in zip(PARTS, parts, strict=True):
        (folder / f"{name}.rows.bin").write_bytes(part.rows)
        (folder / f"{name}.turns.bin").write_bytes(part.turns)
    if bad:
        (folder / "bad_rows.txt").write_text("".join(f"{row}\n" for row in bad), encoding="utf-8")
    return {
        "dtype": token_dtype(tokenizer).name,
        "tokens": [part.tokens for part in parts],
        "rows": [len(part.rows) // 2 for part in parts] if by_rows else None,
        "turns": [len(part.turns) for part in parts] if any(part.turns for part in parts) else None,
        "validation_bytes": parts[1].num_bytes,
        "bad_rows": len(bad),
        "counts": +counts,  # without those that are 0
    }


def encode_rows(
    config: DataConfig, source: SourceFiles, complete: Complete, pieces: Iterable[tuple[Place, Piece]], bad: list[str]
) -> Iterator[tuple[list[tuple[Place, Piece, Encoded]], bool]]:
    """Yield each row, or piece of a text, with its tokens, and whether it is used: in full or not at all.

    A row with something that the vocabulary lacks is not used, and appended to `bad`, unless the config allows it.

    Raises:
        ConfigError: if a text has something that the vocabulary lacks, or too many rows are bad.
    """
    tokenizer, unknown = complete
    can_allow = unknown is not None and tokenizer.id_to_token(unknown) != MISSING
    pieces, ahead = itertools.tee(pieces)
    row, why = list[tuple[Place, Piece, Encoded]](), ""
    for (place, piece), encoded in zip(pieces, encode_pieces(complete, (text.text for _, text in ahead)), strict=True):
        row.append((place, piece, encoded))
        if encoded.unknown and not why and not (config.unknown_tokens and can_allow):
            line = piece.line + piece.text.count("\n", 0, encoded.unknown[0][0])
            where = f"{piece.where}, line {line:,}" if piece.line else piece.where or "empty line between documents"
            lacking = sorted({part for _, part in encoded.unknown})
            why = f"{where} has {', '.join(map(repr, lacking[:10]))}, which the vocabulary lacks"
        is_of_row = source.kind in ("rows", "dataset") and bool(piece.where)
        if is_of_row and not piece.ends:
            continue
        if why and is_of_row:
            skip_row(config, source, bad, why)
        elif why:
            allow = ", set data.unknown_tokens: true," if can_allow else ""
            advice = f"Remove it{allow} or start a new run with another data.tokenizer."
            raise source_error(source.name, f"whose {why}", advice=advice)
        yield row, not why
        row, why = [], ""


def _copy_tokens(source: SourceFiles, tokenizer: Tokenizer, train_size: int, parts: list[Part]) -> None:
    """Copy ready-made tokens after checking that the vocabulary has them."""
    vocabulary, (train, validation) = num_ids(tokenizer), parts
    for path, block in token_blocks(source, train.dtype):
        if not 0 <= block.min() <= block.max() < vocabulary:
            reason = f"whose file {path} has tokens from {block.min()} to {block.max()}"
            raise source_error(source.name, reason, f"0 to {vocabulary - 1}, the vocabulary of data.tokenizer")
        cut = train_size - train.tokens
        train.write_ids(block[:cut])
        held_out = block[cut:]
        # Each block is decoded by itself, so a character on the border may count a few bytes too many.
        validation.num_bytes += num_bytes(tokenizer, held_out[validation.tokens == 0 :], train.end)
        validation.write_ids(held_out)


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
            begun, line = piece.text[:cut], piece.line and piece.line + piece.text.count("\n", 0, cut)
            yield 0, piece._replace(text=begun, ends=False)
            yield 1, piece._replace(text=piece.text[cut:], line=line)
        elif length:
            yield int(cut == 0), piece


def encode_pieces(complete: Complete, pieces: Iterable[str]) -> Iterator[Encoded]:
    """Yield each piece with its tokens. What the vocabulary lacks is the caller's to refuse.

    Special tokens in the text are those tokens, or ordinary text if the tokenizer's `encode_special_tokens` is set.
    """
    tokenizer, unknown = complete
    dtype = token_dtype(tokenizer)
    for batch in _batches(pieces):
        for piece, encoding in zip(batch, tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True):
            ids = np.array(encoding.ids, np.int64)
            lacking = find_unknown(tokenizer, unknown, piece) if (ids == unknown).any() else []
            yield Encoded(ids.astype(dtype), lacking)


def _batches(pieces: Iterable[str]) -> Iterator[list[str]]:
    batch, size = list[str](), 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= PIECES_AT_ONCE * PIECE or len(batch) == ROWS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def token_dtype(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger]:
    """Returns the smallest type that holds the vocabulary's ids."""
    return np.dtype(np.uint16 if num_ids(tokenizer) <= 2**16 else np.uint32)
