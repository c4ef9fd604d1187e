"""Encodes a source into files of tokens, on all cores. `meta.json` says of what type and how many they are."""

from __future__ import annotations

import array
import contextlib
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from fundamentallm.config.files import SourceFiles, are_samples
from fundamentallm.config.schema import DataConfig
from fundamentallm.data.chat import applied_template, token_turns
from fundamentallm.data.sources import (
    PIECE,
    Piece,
    check_bad_rows,
    read_source,
    reads_special_tokens,
    source_error,
    token_blocks,
)
from fundamentallm.data.tokenizers import find_unknown, num_bytes, num_ids, with_unknown
from fundamentallm.errors import ConfigError, printable

PIECES_AT_ONCE = max(16, 2 * (os.cpu_count() or 1))
"""Pieces that the tokenizer's threads encode together. Bounds memory, at about 150 bytes a token."""
ROWS_AT_ONCE = 8192
"""Most pieces encoded together if they are small."""
PARTS = ("train", "validation")
SETTINGS = ("tokenizer", "train_split", "end_of_text", "prompt_field", "messages_field", "unknown_tokens")
"""Settings that decide what the tokens are and mean."""
AS_TEXT, UNKNOWN_TOKENS = "special tokens read as text", "unknown tokens, for what the vocabulary lacks"
Place = TypeVar("Place")
NAMED = 10
"""Parts of a text that an error lists."""


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
class Writer:
    """Writes the tokens of a source, and counts them; the lists hold one item for each part."""

    tokenizer: Tokenizer
    end: int | None
    """The token after each document."""
    by_rows: bool
    files: Sequence[BinaryIO]
    bar: tqdm[Any]
    bad: list[str]
    """Rows that are skipped."""
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    rows: list[array.array[int]] = field(default_factory=lambda: [array.array("q"), array.array("q")])
    turns: list[array.array[int]] = field(default_factory=lambda: [array.array("q"), array.array("q")])
    validation_bytes: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """What to report, by its name: `AS_TEXT` and `UNKNOWN_TOKENS`."""
    _answer: int = 0  # index of the first token of the current pair's answer

    def write_ids(self, part: int, ids: NDArray[np.integer]) -> None:
        """Write tokens to the file of their part."""
        self.files[part].write(ids.data)
        self.tokens[part] += len(ids)

    def write(self, part: int, piece: Piece, encoded: Encoded) -> None:
        """Write a piece's tokens to the file of its part."""
        ids, text = encoded.ids, encoded.text
        if piece.turns:
            turns = self.tokens[part] + token_turns(encoded.offsets, piece.turns)
            self.turns[part].extend(turns)
            self._answer, text = turns[0], "".join(text[start:stop] for start, stop in piece.turns)
        if part == 1 and not piece.is_prompt:
            first = ids[: self.tokens[1] == 0 and not self.by_rows]  # the first token is not a target
            self.validation_bytes += len(text.encode()) - num_bytes(self.tokenizer, first)
        self.write_ids(part, ids)
        if piece.ends and self.end is not None and not piece.turns:
            self.write_ids(part, np.array([self.end], ids.dtype))
        if piece.is_prompt:
            self._answer = self.tokens[part]
        elif self.by_rows:
            self.rows[part].extend((self._answer, self.tokens[part]))


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
        return ", ".join(map(repr, parts[:NAMED])) + (", ..." if len(parts) > NAMED else "")


def progress_bar(action: str, source: SourceFiles, is_shown: bool, total: int | None = None) -> tqdm[Any]:
    """Make a progress bar that appears after a second, so not for a small text."""
    title = f"{action} {printable(os.path.basename(source.name), keep='')}"
    return tqdm(desc=title, total=total, unit="", unit_scale=True, delay=1, disable=not is_shown)


def digested(config: DataConfig, pieces: Iterable[Piece], digest: Any) -> Iterator[Piece]:
    """Yield pieces, and add to `digest` their text and where documents end."""
    for piece in pieces:
        digest.update(piece.text.encode())
        if piece.turns:
            digest.update(b"\xff" + repr(piece.turns).encode())
        elif config.end_of_text is not None and (piece.ends or piece.is_prompt):
            digest.update(b"\xff" if piece.ends else b"\xfe")  # bytes that occur in no UTF-8 text
        yield piece


def read_again(config: DataConfig, source: SourceFiles, facts: Facts) -> Iterator[Piece]:
    """Yield the pieces of a source. Raises ConfigError at their end if they are not those that `facts` are of."""
    digest = hashlib.sha256()
    yield from digested(config, read_source(config, source, []), digest)
    if digest.hexdigest() != facts.sha256:
        raise _changed(source)


def _changed(source: SourceFiles) -> ConfigError:
    return source_error(source.name, "which was changed while it was read", advice="Start again.")


def write_source(
    config: DataConfig, source: SourceFiles, facts: Facts, tokenizer: Tokenizer, folder: Path, show_progress: bool
) -> None:
    """Write the files of a prepared source to an empty folder.

    Raises:
        ConfigError: if the vocabulary lacks some of the characters or tokens, or the source is not that of `facts`.
        OSError: if the files cannot be written.
    """
    # Tokenizer.save raises exceptions that are no OSErrors.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    train_size, by_rows = int(facts.size * config.train_split), are_samples(config)
    end = None if config.end_of_text is None else tokenizer.token_to_id(config.end_of_text)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress_bar("tokenizing", source, show_progress, facts.size))
        files = [stack.enter_context((folder / f"{part}.bin").open("wb")) for part in PARTS]
        written = Writer(tokenizer, end, by_rows, files, bar, [*facts.bad])
        if source.kind != "tokens":
            _encode(config, source, split_pieces(read_again(config, source, facts), train_size, by_rows), written)
        elif _copy_tokens(source, train_size, written) != facts.sha256:
            raise _changed(source)
    if by_rows:
        for part, rows in zip(PARTS, written.rows, strict=True):
            (folder / f"{part}.rows.bin").write_bytes(rows)
    if has_turns := any(written.turns):
        for part, turns in zip(PARTS, written.turns, strict=True):
            (folder / f"{part}.turns.bin").write_bytes(turns)
    if written.bad:
        (folder / "bad_rows.txt").write_text("".join(f"{row}\n" for row in written.bad), encoding="utf-8")
    meta = {
        "dtype": token_dtype(tokenizer).name,
        "tokens": written.tokens,
        "rows": [len(rows) // 2 for rows in written.rows] if by_rows else None,
        "turns": list(map(len, written.turns)) if has_turns else None,
        "validation_bytes": written.validation_bytes,
        "bad_rows": len(written.bad),
        "counts": +written.counts,  # without those that are 0
        "settings": settings_of_tokens(config),
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def settings_of_tokens(config: DataConfig) -> dict[str, Any]:
    """Returns the settings that decide what the tokens are and mean."""
    special_tokens = "tokens" if reads_special_tokens(config) else "text"
    derived = {"special_tokens": special_tokens, "chat_template": bool(applied_template(config))}
    return {name: getattr(config, name) for name in SETTINGS} | derived


def _encode(config: DataConfig, source: SourceFiles, pieces: Iterator[tuple[int, Piece]], writer: Writer) -> None:
    """Write the tokens of pieces of text, each with its part."""
    tokenizer = writer.tokenizer
    added = tokenizer.get_added_tokens_decoder().values() if tokenizer.encode_special_tokens else ()
    names = sorted(
        (token.content for token in added if token.special), key=len, reverse=True
    )  # none hides a longer one
    special = re.compile("|".join(map(re.escape, names)))
    for row, is_used in encode_rows(config, source, tokenizer, pieces, writer.bad):
        writer.bar.update(1 if writer.by_rows else sum(len(piece.text) for _, piece, _ in row))
        for part, piece, encoded in row if is_used else ():
            writer.write(part, piece, encoded)
            writer.counts[AS_TEXT] += len(special.findall(encoded.text)) if names else 0
            writer.counts[UNKNOWN_TOKENS] += len(encoded.unknown)


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
            bad.append(why)
            check_bad_rows(config, source.name, bad)
        yield held, not why
        held, why = [], ""


def _why_unknown(piece: Piece, encoded: Encoded) -> str:
    """Returns the place in the source, and what the vocabulary lacks there."""
    line = piece.line + encoded.text.count("\n", 0, encoded.unknown[0][0])
    where = f"{piece.where}, line {line:,}" if piece.line else piece.where or "empty line between documents"
    return f"{where} has {encoded.named_unknown()}, which the vocabulary lacks"


def _copy_tokens(source: SourceFiles, train_size: int, writer: Writer) -> str:
    """Copy ready-made tokens after checking that the vocabulary has them. Returns their SHA-256."""
    digest = hashlib.sha256()
    dtype, vocabulary = token_dtype(writer.tokenizer), num_ids(writer.tokenizer)
    for path, block in token_blocks(source, dtype):
        digest.update(np.ascontiguousarray(block, np.int64).data)
        if not 0 <= block.min() <= block.max() < vocabulary:
            reason = f"whose file {path} has tokens from {block.min()} to {block.max()}"
            raise source_error(source.name, reason, f"0 to {vocabulary - 1}, the vocabulary of data.tokenizer")
        cut = max(0, min(len(block), train_size - sum(writer.tokens)))
        train, validation = block[:cut].astype(dtype), block[cut:].astype(dtype)
        # Each block is decoded by itself, so a character on the border may count a few bytes too many.
        writer.validation_bytes += num_bytes(writer.tokenizer, validation[writer.tokens[1] == 0 :], writer.end)
        for part, ids in enumerate((train, validation)):
            writer.write_ids(part, ids)
        writer.bar.update(len(block))
    return digest.hexdigest()


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
