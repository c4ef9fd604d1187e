"""What a source holds, in pieces: text files, rows of JSON lines, Parquet and `datasets`, and files of tokens."""

from __future__ import annotations

import collections
import io
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from fundamentallm.config.files import DATASETS, are_samples, row_fields
from fundamentallm.config.files import SourceFiles as SourceFiles
from fundamentallm.config.schema import DataConfig
from fundamentallm.data.chat import ROLES, BadChat, ChatTemplate, applied_template
from fundamentallm.errors import ConfigError, Problem

PIECE = 65_536
"""Characters of a text file that are read and tokenized at once, up to the end of their line."""
BETWEEN = "\n\n"
"""Separates documents if no token does."""
ROWS_OF_TEXT = 5
"""Lines of a text file that are checked for JSON."""
ROWS_AT_ONCE, TOKENS_AT_ONCE = 1024, 2**22
LONG = 2**20
"""Characters of a row's text above which it is tokenized in pieces."""
FEW_TOKENS = 128
"""Tokens checked for the wrong width: every second one is 0 if wider integers are read as narrow ones."""
DATASETS_OPTIONS = ("name", "split", "data_files", "data_dir", "revision")
UNPICKLES = ("pandas",)
"""Builders of `datasets` that unpickle files, and so run whatever code these contain."""
NAMED = 5
"""Bad rows that an error lists."""
SETTLED = 2_000_000_000
"""Nanoseconds after which another change of a file certainly shows in its times."""


class Piece(NamedTuple):
    """A segment of text that is tokenized at once."""

    text: str
    is_prompt: bool = False
    """Whether it is the prompt of a pair, whose answer comes next."""
    ends: bool = False
    """Whether a document, or a pair, ends with it."""
    where: str = ""
    """The file, or the row, that it is from."""
    line: int = 0
    """Number of its first line in the file, from 1; 0 for rows."""
    turns: tuple[tuple[int, int], ...] = ()
    """The assistant turns of a chat (see `Chat`)."""


class BadRow(str):
    """Names a row, or a text file, that cannot be read, and says why."""

    __slots__ = ()


Row = dict[str, Any] | str
"""Fields by name, or why there are none."""


def source_error(source: str, reason: str, allowed: str = "", advice: str = "") -> ConfigError:
    """Make an error about one source."""
    return ConfigError(Problem("data.source", source, allowed, advice, reason))


def reads_special_tokens(config: DataConfig) -> bool:
    """Returns whether special tokens in the text are read as tokens."""
    return config.special_tokens == "tokens" or (config.special_tokens is None and config.tokenizer.endswith(".json"))


def read_source(config: DataConfig, source: SourceFiles, bad: list[str]) -> Iterator[Piece]:
    """Yield the text of a source in pieces, and append what cannot be read to `bad`.

    If `config.end_of_text` is null, the documents form one text, with an empty line between them.

    Raises:
        ConfigError: if a file cannot be opened, or more than `config.max_bad_rows` rows are bad.
    """
    has_ended, end = False, config.end_of_text if reads_special_tokens(config) else None
    for piece in _pieces(config, source):
        if isinstance(piece, BadRow):
            bad.append(piece)
            check_bad_rows(config, source.name, bad)
            continue
        if config.end_of_text is None and has_ended and not are_samples(config):
            yield Piece(BETWEEN)
        has_ended = piece.ends
        # The end-of-text token comes after each document, and once if the document ends with it already.
        if end is not None and has_ended and not piece.turns:
            piece = piece._replace(text=piece.text.removesuffix(end))
        yield piece


def check_bad_rows(config: DataConfig, source: str, bad: list[str]) -> None:
    """Raise ConfigError if a source has more than `config.max_bad_rows` bad rows."""
    if len(bad) > config.max_bad_rows:
        reason = f"which has at least {len(bad)} unreadable rows: {'; '.join(bad[-NAMED:])}"
        allowed = f"data.max_bad_rows = {config.max_bad_rows} of them"
        raise source_error(source, reason, allowed, "Correct them, or raise data.max_bad_rows.")


def _pieces(config: DataConfig, source: SourceFiles) -> Iterator[Piece | BadRow]:
    if source.kind == "built-in":
        from pydoc_data.topics import topics

        # Without a token, each topic keeps the separator after it, the last one too: its tokens must not change.
        end, has_token = ("", True) if config.end_of_text is not None else (BETWEEN, False)
        yield from (Piece(text + end, ends=has_token) for text in topics.values())
        return
    template = ChatTemplate(config.tokenizer) if applied_template(config) else None
    if source.kind == "dataset":
        yield from _documents(config, _dataset_rows(config, source.name), source.name, template)
        return
    for path in source.files:
        try:
            if source.kind == "text":
                yield from _text_pieces(config, path)
            else:
                read = _table_rows if path.suffix.lower() == ".parquet" else _json_rows
                yield from _documents(config, read(config, path), str(path), template)
        except OSError as error:
            raise source_error(source.name, f"whose file {path} cannot be read: {error}") from error
        except UnicodeError as error:
            reason, advice = f"whose file {path} is not UTF-8 text: {error}", "Or skip it: raise data.max_bad_rows."
            raise source_error(source.name, reason, "UTF-8 text", advice) from error


def read_pieces(file: TextIO) -> Iterator[str]:
    """Yield the text of `file` in pieces that end with a line or, in a line longer than a piece, before white space."""
    rest = ""
    while text := rest + file.read(PIECE):
        text, rest = text + file.readline(PIECE), ""
        if len(text) >= 2 * PIECE and not text.endswith(("\n", "\r")):
            word = "" if text[-1].isspace() else text.rsplit(None, 1)[-1]
            if len(word) < PIECE:
                text, rest = text[: -1 - len(word)], text[-1 - len(word) :]
        if "\0" in text:  # which are valid UTF-8
            raise UnicodeError("it has null characters, as UTF-16 and UTF-32 have; convert it, or remove them")
        yield text


def _is_rows(text: str) -> bool:
    """Returns whether a text begins like a file of JSON lines: its first lines, at least two, are JSON objects."""
    lines = list(itertools.islice((line for line in text.splitlines() if line.strip()), ROWS_OF_TEXT))
    try:
        return len(lines) > 1 and all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def open_text(path: Path) -> TextIO:
    """Open a text file with its line ends as they are, and without a byte order mark."""
    return path.open(encoding="utf-8-sig", newline="")


def _text_pieces(config: DataConfig, path: Path) -> Iterator[Piece | BadRow]:
    """Yield a text file as one document, with the line ends as they are."""
    with open_text(path) as file:
        if config.max_bad_rows:  # a bad file is skipped as a whole, so check it before using any of it
            try:
                collections.deque(read_pieces(file), maxlen=0)
            except UnicodeError as error:
                yield BadRow(f"{path} is not UTF-8 text: {error}")
                return
            file.seek(0)
        last, line = None, 1
        for text in read_pieces(file):
            if last is None and _is_rows(text):
                reason = f"whose file {path} holds JSON objects, one on each line"
                advice = f"Rename it to .jsonl. To train on the JSON itself: {DATASETS}text,data_files=FILE."
                raise source_error(str(path), reason, "text", advice)
            if last is not None:
                yield Piece(last, where=str(path), line=line)
                line += last.count("\n")
            last = text
        if last is not None or config.end_of_text is None:  # an empty document has its separator too
            yield Piece(last or "", ends=True, where=str(path), line=line)


def token_blocks(
    source: SourceFiles, dtype: np.dtype[np.unsignedinteger]
) -> Iterator[tuple[Path, NDArray[np.integer]]]:
    """Yield the tokens of a source's files in blocks. A .bin holds tokens of type `dtype`, a .npy says its own.

    Raises:
        ConfigError: if a file holds something else.
    """
    for path in source.files:
        try:
            if path.suffix.lower() == ".npy":
                tokens = np.load(path, mmap_mode="r")
            else:
                if rest := path.stat().st_size % dtype.itemsize:
                    raise ValueError(f"{rest} bytes are left over after tokens of type {dtype}")
                tokens = np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
                first = tokens[:FEW_TOKENS]
                if len(first) == FEW_TOKENS and first[::2].any() and not first[1::2].any():
                    raise ValueError(f"every second token of type {dtype} is 0; save wider integers as .npy")
            if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
                raise ValueError(f"it is an array of shape {tokens.shape} and type {tokens.dtype}")
        except (OSError, ValueError) as error:
            reason = f"whose file {path} cannot be read as tokens: {error}"
            raise source_error(source.name, reason, "1-D integers") from error
        for begin in range(0, len(tokens), TOKENS_AT_ONCE):
            yield path, np.asarray(tokens[begin : begin + TOKENS_AT_ONCE])


def _documents(
    config: DataConfig, rows: Iterable[tuple[str, Row]], name: str, template: ChatTemplate | None
) -> Iterator[Piece | BadRow]:
    """Turn rows, each with its position for people to read, into documents."""
    fields = list(row_fields(config).values())
    for position, row in rows:
        where = f"{name}, {position}"
        if isinstance(row, str):
            yield BadRow(f"{where} {row}")
        elif why := _why_bad(config, row, fields):
            yield BadRow(f"{where} {why}")
        elif template is not None:
            pair = [{"role": role, "content": row[field]} for role, field in zip(ROLES, fields, strict=False)]
            try:
                text, turns = template.chat(pair if config.messages_field is None else row[config.messages_field])
                yield Piece(text, ends=True, where=where, turns=turns)
            except BadChat as error:
                yield BadRow(f"{where} {error}")
        elif len(fields) == 2:
            yield Piece(row[fields[0]], is_prompt=True, where=where)
            yield Piece(row[fields[1]], ends=True, where=where)
        else:  # an empty text is no document
            *pieces, last = [row[fields[0]]]
            if len(last) > LONG:
                *pieces, last = read_pieces(io.StringIO(last, newline=""))
            yield from (Piece(text, where=where) for text in pieces)
            if last:
                yield Piece(last, ends=True, where=where)


def _why_bad(config: DataConfig, row: dict[str, Any], fields: list[str]) -> str | None:
    for name in fields:
        if name not in row:
            return f"has no field {name!r}, only {', '.join(map(repr, row)) or 'no fields at all'}"
        text = row[name]
        if name == config.messages_field:  # checked when it is rendered
            return None
        if not isinstance(text, str):
            return f"has {str(text)[:40]!r} for {name!r}, which is not text"
        if not text and len(fields) == 2:
            return f"has an empty {name!r}"
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"has half a character (a lone surrogate) in {name!r}"
    return None


def _json_rows(config: DataConfig, path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file of JSON lines, or of a .json file that is one list of them."""
    with path.open("rb") as file:
        is_list = path.suffix.lower() == ".json" and file.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        for number, text in enumerate([file.read()] if is_list else file, start=1):
            if not text.strip():
                continue
            where = "its list" if is_list else f"line {number:,}"
            try:
                found = json.loads(text)
            except (ValueError, RecursionError) as error:  # ValueError: also not UTF-8
                yield where, f"is not JSON: {error}"
                continue
            for index, row in enumerate(found if is_list else [found]):
                position = f"row {index:,}" if is_list else where
                yield position, row if isinstance(row, dict) else f"is a {type(row).__name__}, not an object"


def _table_rows(config: DataConfig, path: Path) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise _needs_extra(str(path), error) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _columns(config, str(path), file.schema_arrow.names)
            yield from _numbered(file.iter_batches(ROWS_AT_ONCE, columns=columns))
    except pyarrow.ArrowException as error:
        raise source_error(str(path), f"which cannot be read as Parquet: {error}") from error


def _dataset_rows(config: DataConfig, source: str) -> Iterator[tuple[str, Row]]:
    dataset = open_dataset(source, config.streaming)
    columns = _columns(config, source, dataset.column_names or list(next(iter(dataset), {})))
    yield from _numbered(dataset.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE))


def _numbered(tables: Iterable[Any]) -> Iterator[tuple[str, Row]]:
    """Yield the rows of Arrow tables. Asking `datasets` for one row at a time takes a hundred times as long."""
    rows = itertools.chain.from_iterable(table.to_pylist() for table in tables)
    return ((f"row {number:,}", row) for number, row in enumerate(rows))


def _columns(config: DataConfig, name: str, existing: list[str]) -> list[str]:
    given = row_fields(config)
    allowed = f"a column of {name}: {', '.join(map(repr, existing))}"
    if problems := [Problem(*entry, allowed) for entry in given.items() if entry[1] not in existing]:
        raise ConfigError(problems)
    return list(given.values())


def open_dataset(source: str, streaming: bool = False) -> Any:
    """Open the dataset of 'datasets:NAME[,OPTION=VALUE...]': a folder of `save_to_disk`, or what `load_dataset` finds.

    Raises:
        ConfigError: if it cannot be opened, or the library is not installed.
    """
    path, *words = source.removeprefix(DATASETS).split(",")
    options = dict(word.partition("=")[::2] for word in words)
    if unknown := [name for name in options if name not in DATASETS_OPTIONS]:
        allowed = f"{DATASETS}NAME, with the options {', '.join(DATASETS_OPTIONS)}"
        raise source_error(source, f"which has the options {', '.join(unknown)}", allowed)
    try:
        import datasets
    except ImportError as error:
        raise _needs_extra(source, error) from error
    split = options.pop("split", "train")
    if path in UNPICKLES:
        raise source_error(source, "whose files can run code when they are opened", "Parquet, CSV, JSON or Arrow files")
    try:
        if any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(path)
            return found[split] if isinstance(found, dict) else found
        return datasets.load_dataset(path, split=split, streaming=streaming, **options)
    except Exception as error:  # it reads many formats and file systems, each with errors of its own
        raise source_error(source, f"which `datasets` cannot open: {error}") from error


def _needs_extra(name: str, error: ImportError) -> ConfigError:
    return source_error(name, f"which needs {error.name}", advice="Run: pip install 'fundamentallm[data]'.")


def file_states(files: Sequence[Path]) -> list[Any] | None:
    """List path, size, times and inode of files: equal lists mean unchanged files.

    Returns None if a change might not show: files that are missing, or changed less than `SETTLED` ago (a second change
    within a tick of the file system's clock keeps the time; git calls such files racy).
    """
    states: list[Any] = []
    for file in files:
        try:
            found = file.stat()
        except OSError:  # reading the file raises a better error
            return None
        if time.time_ns() - found.st_ctime_ns < SETTLED:
            return None
        states.append([str(file.absolute()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino])
    return states or None


def source_states(source: SourceFiles) -> list[Any] | None:
    """Returns the `file_states` of a source."""
    if source.kind != "dataset":
        return file_states(source.files)
    states = file_states([Path(entry["filename"]) for entry in open_dataset(source.name).cache_files])
    return states and [source.name, *states]
