"""Encodes a source into files of tokens, on all cores. `meta.json` says of what type and how many they are."""

from __future__ import annotations

import array
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from fundamentallm.config.files import SourceFiles, are_samples
from fundamentallm.config.schema import DataConfig
from fundamentallm.data.chat import applied_template, token_turns
from fundamentallm.data.sources import PIECE, Piece, read_source, skip_row, source_error, token_blocks
from fundamentallm.data.tokenizers import find_unknown, num_bytes, num_ids, with_unknown
from fundamentallm.errors import printable

PIECES_AT_ONCE = max(16, 2 * (os.cpu_count() or 1))
"""Pieces that the tokenizer's threads encode together. Bounds memory, at about 150 bytes a token."""
ROWS_AT_ONCE = 8192
"""Most pieces encoded together if they are small."""
PARTS = ("train", "validation")
Place = TypeVar("Place")


class Encoded(NamedTuple):
    """A text, its tokens, and position and text of what the vocabulary lacks."""

    text: str
    ids: NDArray[np.integer]
    unknown: list[tuple[int, str]]
    offsets: list[tuple[int, int]] | None = None
    """Each token's first character and the one after its last, if they were asked for."""

    def named_unknown(self) -> str:
        """Returns the parts that the vocabulary lacks, for people to read."""
        parts = sorted({part for _, part in self.unknown})
        return ", ".join(map(repr, parts[:10])) + (", ..." if len(parts) > 10 else "")


class Part:
    """The training or the validation tokens of a source on their way to a file, and what is counted of them."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer, end: int | None, by_rows: bool) -> None:
        self.file, self.tokenizer, self.end, self.by_rows = file, tokenizer, end, by_rows
        self.tokens = self.num_bytes = 0
        self.rows, self.turns = array.array("q"), array.array("q")

    def write_ids(self, ids: NDArray[np.integer]) -> None:
        """Write tokens."""
        self.file.write(ids.data)
        self.tokens += len(ids)

    def write(self, piece: Piece, encoded: Encoded) -> None:
        """Write the tokens of a piece. A prompt comes just before its answer."""
        answer, text = self.tokens, encoded.text
        if piece.turns:
            turns = self.tokens + token_turns(encoded.offsets, piece.turns)
            self.turns.extend(turns)
            answer, text = turns[0], "".join(text[start:stop] for start, stop in piece.turns)
        if not piece.is_prompt:
            first = encoded.ids[: self.tokens == 0 and not self.by_rows]  # the first token is not a target
            self.num_bytes += len(text.encode()) - num_bytes(self.tokenizer, first)
        self.write_ids(encoded.ids)
        if piece.ends and self.end is not None and not piece.turns:
            self.write_ids(np.array([self.end], encoded.ids.dtype))
        if self.by_rows and not piece.is_prompt:
            self.rows.extend((answer, self.tokens))


def progress_bar(action: str, source: SourceFiles, is_shown: bool, total: int | None = None) -> tqdm[Any]:
    """Make a progress bar that appears after a second, so not for a small text."""
    title = f"{action} {printable(os.path.basename(source.name), keep='')}"
    return tqdm(desc=title, total=total, unit="", unit_scale=True, delay=1, disable=not is_shown)


def write_source(
    config: DataConfig, source: SourceFiles, tokenizer: Tokenizer, train_size: int, folder: Path, bar: tqdm[Any]
) -> dict[str, Any]:
    """Write the tokens of a source to an empty folder. The first `train_size` characters, rows or tokens are training.

    Returns:
        What the folder's meta.json has to say about them.

    Raises:
        ConfigError: if the vocabulary lacks some of the characters or tokens.
        OSError: if the files cannot be written.
    """
    by_rows, bad, counts = are_samples(config), list[str](), Counter[str]()
    end = None if config.end_of_text is None else tokenizer.token_to_id(config.end_of_text)
    with (folder / "train.bin").open("wb") as train, (folder / "validation.bin").open("wb") as validation:
        parts = [Part(file, tokenizer, end, by_rows) for file in (train, validation)]
        if source.kind == "tokens":
            _copy_tokens(source, tokenizer, train_size, parts, bar)
        else:
            pieces = split_pieces(read_source(config, source, bad), train_size, by_rows)
            special = _special_tokens(tokenizer)
            for row, is_used in encode_rows(config, source, tokenizer, pieces, bad):
                bar.update(1 if by_rows else sum(len(piece.text) for _, piece, _ in row))
                for index, piece, encoded in row if is_used else ():
                    parts[index].write(piece, encoded)
                    counts["special tokens read as text"] += len(special.findall(encoded.text)) if special else 0
                    counts["unknown tokens, for what the vocabulary lacks"] += len(encoded.unknown)
    has_turns = any(part.turns for part in parts)
    for name, part in zip(PARTS, parts, strict=True):
        if by_rows:
            (folder / f"{name}.rows.bin").write_bytes(part.rows)
        if has_turns:
            (folder / f"{name}.turns.bin").write_bytes(part.turns)
    if bad:
        (folder / "bad_rows.txt").write_text("".join(f"{row}\n" for row in bad), encoding="utf-8")
    return {
        "dtype": token_dtype(tokenizer).name,
        "tokens": [part.tokens for part in parts],
        "rows": [len(part.rows) // 2 for part in parts] if by_rows else None,
        "turns": [len(part.turns) for part in parts] if has_turns else None,
        "validation_bytes": parts[1].num_bytes,
        "bad_rows": len(bad),
        "counts": +counts,  # without those that are 0
    }


def _special_tokens(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Returns a pattern of the special tokens if they are read as text; None: there are none, or they are tokens."""
    added = tokenizer.get_added_tokens_decoder().values() if tokenizer.encode_special_tokens else ()
    names = sorted((token.content for token in added if token.special), key=len, reverse=True)  # the longest first
    return re.compile("|".join(map(re.escape, names))) if names else None


def encode_rows(
    config: DataConfig,
    source: SourceFiles,
    tokenizer: Tokenizer,
    pieces: Iterable[tuple[Place, Piece]],
    bad: list[str],
    copied: tuple[Tokenizer, int | None] | None = None,
) -> Iterator[tuple[list[tuple[Place, Piece, Encoded]], bool]]:
    """Yield each row, or piece of a text, with its tokens, and whether it is used: in full or not at all.

    A row with something that the vocabulary lacks is not used, and appended to `bad`, unless the config allows it.

    Raises:
        ConfigError: if a text has something that the vocabulary lacks, or too many rows are bad.
    """
    copied = copied or with_unknown(tokenizer)
    has_unknown = copied[1] is not None and copied[1] < num_ids(tokenizer)
    has_rows = source.kind in ("rows", "dataset")
    pieces, ahead = itertools.tee(pieces)
    texts, held, why = (piece.text for _, piece in ahead), list[tuple[Place, Piece, Encoded]](), ""
    encoded_pieces = encode_pieces(tokenizer, texts, copied, bool(applied_template(config)))
    for (place, piece), encoded in zip(pieces, encoded_pieces, strict=True):
        is_of_row = has_rows and bool(piece.where)
        if encoded.unknown and not (config.unknown_tokens and has_unknown):
            why = why or _why_unknown(piece, encoded)
            if not is_of_row:
                allow = ", set data.unknown_tokens: true," if has_unknown else ""
                advice = f"Remove it{allow} or start a new run with another data.tokenizer."
                raise source_error(source.name, f"whose {why}", advice=advice)
        held.append((place, piece, encoded))
        if is_of_row and not piece.ends:
            continue
        if why:
            skip_row(config, source, bad, why)
        yield held, not why
        held, why = [], ""


def _why_unknown(piece: Piece, encoded: Encoded) -> str:
    """Returns the place in the source, and what the vocabulary lacks there."""
    line = piece.line + encoded.text.count("\n", 0, encoded.unknown[0][0])
    where = f"{piece.where}, line {line:,}" if piece.line else piece.where or "empty line between documents"
    return f"{where} has {encoded.named_unknown()}, which the vocabulary lacks"


def _copy_tokens(source: SourceFiles, tokenizer: Tokenizer, train_size: int, parts: list[Part], bar: tqdm[Any]) -> None:
    """Copy ready-made tokens after checking that the vocabulary has them."""
    dtype, vocabulary, (train, validation) = token_dtype(tokenizer), num_ids(tokenizer), parts
    for path, block in token_blocks(source, dtype):
        if not 0 <= block.min() <= block.max() < vocabulary:
            reason = f"whose file {path} has tokens from {block.min()} to {block.max()}"
            raise source_error(source.name, reason, f"0 to {vocabulary - 1}, the vocabulary of data.tokenizer")
        cut = train_size - train.tokens
        train.write_ids(block[:cut].astype(dtype))
        held_out = block[cut:].astype(dtype)
        # Each block is decoded by itself, so a character on the border may count a few bytes too many.
        validation.num_bytes += num_bytes(tokenizer, held_out[validation.tokens == 0 :], train.end)
        validation.write_ids(held_out)
        bar.update(len(block))


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


def encode_pieces(
    tokenizer: Tokenizer,
    pieces: Iterable[str],
    copied: tuple[Tokenizer, int | None] | None = None,
    with_offsets: bool = False,
) -> Iterator[Encoded]:
    """Yield each piece with its tokens. What the vocabulary lacks is the caller's to refuse.

    Special tokens in the text are those tokens, or ordinary text if the tokenizer's `encode_special_tokens` is set.
    """
    dtype = token_dtype(tokenizer)
    # A caller that encodes again and again gives `copied`: the library keeps some megabytes of each copy that was used.
    tokenizer, unknown = copied or with_unknown(tokenizer)
    encode = tokenizer.encode_batch if with_offsets else tokenizer.encode_batch_fast
    for batch in _batches(pieces):
        for piece, encoding in zip(batch, encode(batch, add_special_tokens=False), strict=True):
            ids = np.array(encoding.ids, np.int64)
            lacking = find_unknown(tokenizer, unknown, piece) if (ids == unknown).any() else []
            yield Encoded(piece, ids.astype(dtype), lacking, encoding.offsets if with_offsets else None)


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


def token_dtype(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger]:
    """Returns the smallest type that holds the vocabulary's ids."""
    return np.dtype(np.uint16 if num_ids(tokenizer) <= 2**16 else np.uint32)
