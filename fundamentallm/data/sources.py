"""What a source holds, in pieces: text files, rows of JSON lines, Parquet and `datasets`, and files of tokens."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from fundamentallm.config.files import DATASETS, kind_of, source_files
from fundamentallm.config.schema import BUILT_IN_CORPUS, DataConfig
from fundamentallm.errors import ConfigError

PIECE = 65_536
"""Characters of a text file that are read, and given to the tokenizer, at once (up to the end of their line)."""
BETWEEN = "\n\n"
"""What stands between documents where no token does."""
ROWS_AT_ONCE, TOKENS_AT_ONCE = 1024, 2**22
FEW_TOKENS = 128
"""In which every second one is 0 in no text, but where integers of twice the width are read."""
DATASETS_OPTIONS = ("name", "split", "data_files", "data_dir", "revision")
NAMED = 5
"""Bad rows that an error names."""
SETTLED = 2_000_000_000
"""Nanoseconds since its last change after which a further one surely shows in a file's times."""


class Place(NamedTuple):
    """Where reading can go on: in which file of a source, and how far into it (bytes, or rows of a table)."""

    file: int = 0
    offset: int = 0


class Piece(NamedTuple):
    """A stretch of text that the tokenizer gets at once."""

    text: str
    is_prompt: bool = False
    """Of a pair, whose answer comes next."""
    ends: bool = False
    """Whether a document, or a pair, ends with it."""
    after: Place | None = None
    """Where the next piece begins; None where reading cannot begin."""


class BadRow(NamedTuple):
    """What cannot be read."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where} {self.why}"


Row = dict[str, Any] | BadRow
"""Fields by name; or why there are none."""


def read_source(config: DataConfig, source: str, bad: list[str], start: Place = Place()) -> Iterator[Piece]:  # noqa: B008
    """The text of a source from a place on, in pieces; what cannot be read goes to `bad`.

    Where `config.end_of_text` is null, the documents are one text, with an empty line between them.

    Raises:
        ConfigError: if a file cannot be opened, or more than `config.max_bad_rows` rows are bad.
    """
    is_first = start == Place()
    begins = start.offset == 0 or kind_of(config, source) == "rows"  # rather than going on within a text
    for piece in _pieces(config, source, start):
        if isinstance(piece, BadRow):
            bad.append(str(piece))
            if len(bad) > config.max_bad_rows:
                named = "; ".join(bad[-NAMED:])
                raise ConfigError(
                    f"source is {source!r}, which has rows that cannot be read ({len(bad)} so far): {named}. Allowed: "
                    f"data.max_bad_rows = {config.max_bad_rows}; mend them, or have more of them left out."
                )
            continue
        if config.end_of_text is None and begins and not is_first:
            yield Piece(BETWEEN)
        is_first, begins = False, piece.ends
        yield piece


def _pieces(config: DataConfig, source: str, start: Place) -> Iterator[Piece | BadRow]:
    if source == BUILT_IN_CORPUS:
        from pydoc_data.topics import topics

        if config.end_of_text is None:  # its separators have always been part of it, the last one too
            yield from (Piece(text + BETWEEN) for text in topics.values())
        else:
            yield from (Piece(text, ends=True) for text in topics.values())
    elif source.startswith(DATASETS):
        yield from _documents(config, 0, _dataset_rows(config, source, start.offset), source)
    else:
        for number, path in enumerate(source_files(config, source)):
            if number < start.file:
                continue
            offset = start.offset if number == start.file else 0
            try:
                if path.suffix.lower() == ".jsonl":
                    yield from _documents(config, number, _json_rows(path, offset), str(path))
                elif path.suffix.lower() == ".parquet":
                    yield from _documents(config, number, _table_rows(config, path, offset), str(path))
                else:
                    yield from _text_pieces(config, number, path, offset)
            except OSError as error:
                raise ConfigError(f"source has {str(path)!r}, which cannot be read: {error}.") from error


def read_pieces(file: TextIO) -> Iterator[str]:
    """The text of `file` in pieces that end with a line."""
    while piece := file.read(PIECE):
        yield piece + file.readline()


def _text_pieces(config: DataConfig, number: int, path: Path, offset: int) -> Iterator[Piece | BadRow]:
    """A text file is one document, line ends as they are in it."""
    if config.max_bad_rows and offset == 0:  # whether it is bad shows before any of it is taken
        try:
            with path.open(encoding="utf-8", newline="") as file:
                for _ in read_pieces(file):
                    pass
        except UnicodeDecodeError as error:
            yield BadRow(str(path), f"is not UTF-8 text: {error}")
            return
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="") as file:
        size = os.fstat(raw.fileno()).st_size
        if size == 0 and config.end_of_text is None:
            yield Piece("", ends=True, after=Place(number + 1))  # it has its separator
        raw.seek(offset)
        try:
            for text in read_pieces(file):
                offset += len(text.encode())
                is_last = offset >= size
                yield Piece(text, ends=is_last, after=Place(number + 1) if is_last else Place(number, offset))
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"source has {str(path)!r}, which is not UTF-8 text: {error}. Leave it out, or allow that by "
                "data.max_bad_rows."
            ) from error


def token_blocks(
    config: DataConfig, source: str, dtype: np.dtype[np.unsignedinteger]
) -> Iterator[tuple[Path, NDArray[np.integer]]]:
    """The tokens of a source's files in blocks: those of a .npy as they are, those of a .bin of type `dtype`.

    Raises:
        ConfigError: if a file holds something else.
    """
    for path in source_files(config, source):
        try:
            if path.suffix.lower() == ".npy":
                tokens = np.load(path, mmap_mode="r")
            else:
                if rest := path.stat().st_size % dtype.itemsize:
                    raise ValueError(f"its size leaves {rest} bytes after tokens of type {dtype}")
                tokens = np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
                first = tokens[:FEW_TOKENS]
                if len(first) == FEW_TOKENS and first[::2].any() and not first[1::2].any():
                    raise ValueError(f"every second token of type {dtype} is 0; save wider integers as .npy")
        except (OSError, ValueError) as error:
            raise ConfigError(f"source has {str(path)!r}, which cannot be read as tokens: {error}.") from error
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ConfigError(
                f"source has {str(path)!r}, an array of shape {tokens.shape} and type {tokens.dtype}; allowed: 1-D "
                "integers."
            )
        for begin in range(0, len(tokens), TOKENS_AT_ONCE):
            yield path, np.asarray(tokens[begin : begin + TOKENS_AT_ONCE])


def _documents(
    config: DataConfig, number: int, rows: Iterable[tuple[str, int, Row]], name: str
) -> Iterator[Piece | BadRow]:
    """Rows as documents: (where, where the next one begins, the row)."""
    fields = [config.text_field] if config.prompt_field is None else [config.prompt_field, config.text_field]
    for where, offset, row in rows:
        after = Place(number, offset)
        where = f"{name}, {where}"
        if isinstance(row, BadRow):
            yield BadRow(where, row.why)
        elif why := _why_bad(row, fields):
            yield BadRow(where, why)
        elif len(fields) == 2:
            yield Piece(row[fields[0]], is_prompt=True)
            yield Piece(row[fields[1]], ends=True, after=after)
        elif row[fields[0]]:  # else there is no document
            yield Piece(row[fields[0]], ends=True, after=after)


def _why_bad(row: dict[str, Any], fields: list[str]) -> str | None:
    for name in fields:
        if name not in row:
            return f"has no field {name!r}, but {', '.join(map(repr, row)) or 'none'}"
        text = row[name]
        if not isinstance(text, str):
            return f"has {str(text)[:40]!r} for {name!r}, which is no text"
        if not text and len(fields) == 2:
            return f"has an empty {name!r}"
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"has half a character (a lone surrogate) in {name!r}"
    return None


def _json_rows(path: Path, offset: int) -> Iterator[tuple[str, int, Row]]:
    with path.open("rb") as file:
        file.seek(offset)
        for number, line in enumerate(file, start=1):
            where = f"line {number:,}"  # of what is read now; bad ones are told when all of it is
            offset += len(line)
            if not line.strip():
                continue
            row: Row
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    row = BadRow(where, f"is a {type(row).__name__}, no object")
            except (ValueError, RecursionError) as error:  # also what is not UTF-8
                row = BadRow(where, f"is no JSON: {error}")
            yield where, offset, row


def _table_rows(config: DataConfig, path: Path, first: int) -> Iterator[tuple[str, int, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise _needs_extra(str(path), error) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _columns(config, str(path), file.schema_arrow.names)
            row = 0
            for group in range(file.num_row_groups):
                end = row + file.metadata.row_group(group).num_rows
                if end > first:
                    for batch in file.iter_batches(ROWS_AT_ONCE, [group], columns):
                        for values in batch.to_pylist():
                            row += 1
                            if row > first:
                                yield f"row {row - 1:,}", row, values
                row = end
    except pyarrow.ArrowException as error:
        raise ConfigError(f"source has {str(path)!r}, which cannot be read as Parquet: {error}.") from error


def _dataset_rows(config: DataConfig, source: str, first: int) -> Iterator[tuple[str, int, Row]]:
    dataset = open_dataset(source)
    dataset = dataset.select_columns(_columns(config, source, dataset.column_names)).skip(first)
    for batch in dataset.iter(ROWS_AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            first += 1
            yield f"row {first - 1:,}", first, dict(zip(batch, values, strict=True))


def _columns(config: DataConfig, name: str, there: list[str]) -> list[str]:
    wanted = {"text_field": config.text_field, "prompt_field": config.prompt_field}
    if problems := [
        f"{setting} is {column!r}, and {name} has the columns {', '.join(map(repr, there))}; give one of them."
        for setting, column in wanted.items()
        if column is not None and column not in there
    ]:
        raise ConfigError(problems)
    return [column for column in wanted.values() if column is not None]


def open_dataset(source: str) -> Any:
    """The dataset of 'datasets:NAME[,OPTION=VALUE...]': what `load_dataset` finds, or a folder of `save_to_disk`.

    Raises:
        ConfigError: if it cannot be opened, or the library is not there.
    """
    path, *words = source.removeprefix(DATASETS).split(",")
    options = dict(word.partition("=")[::2] for word in words)
    if unknown := [name for name in options if name not in DATASETS_OPTIONS]:
        raise ConfigError(
            f"source is {source!r}, with {', '.join(unknown)}; allowed: {DATASETS}NAME, and after commas "
            f"{', '.join(name + '=...' for name in DATASETS_OPTIONS)}."
        )
    try:
        import datasets
    except ImportError as error:
        raise _needs_extra(source, error) from error
    split = options.pop("split", "train")
    try:
        if any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(path)
            return found[split] if isinstance(found, dict) else found
        return datasets.load_dataset(path, split=split, **options)
    except Exception as error:  # of any of the formats and file systems it knows
        raise ConfigError(f"source is {source!r}, which datasets cannot open: {error}.") from error


def _needs_extra(name: str, error: ImportError) -> ConfigError:
    return ConfigError(f"source has {name!r}, for which {error.name} is needed: pip install 'fundamentallm[data]'.")


def looks(config: DataConfig, source: str) -> list[Any] | None:
    """All that shows from outside whether a source is what it was; None where it might not show.

    A file that is changed twice within a tick of the file system's clock looks the same (git calls it racy).
    """
    if source.startswith(DATASETS):
        return [source, getattr(open_dataset(source), "_fingerprint", None)]
    built_in = source == BUILT_IN_CORPUS
    files = [Path(str(find_spec("pydoc_data.topics").origin))] if built_in else source_files(config, source)  # type: ignore[union-attr]
    facts: list[Any] = []
    for file in files:
        try:
            found = file.stat()
        except OSError:  # reading it says why
            return None
        if time.time_ns() - found.st_ctime_ns < SETTLED:
            return None
        facts.append([str(file.absolute()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino])
    return facts
