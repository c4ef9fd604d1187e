"""What a source holds, in pieces: text files, rows of JSON lines, Parquet and `datasets`, and files of tokens."""

import collections
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from fundamentallm.config.files import DATASETS, SourceFiles, are_samples, row_fields
from fundamentallm.config.schema import DataConfig
from fundamentallm.data.chat import ROLES, ChatTemplate, applied_template
from fundamentallm.errors import ConfigError, Problem

PIECE = 65_536
"""Characters of a text file that are read and tokenized at once, up to the end of their line."""
BETWEEN = "\n\n"
"""Separates documents if no token does."""
ROWS_AT_ONCE, TOKENS_AT_ONCE = 1024, 2**22
LONG = 2**20
"""Characters of a row's text above which it is tokenized in pieces."""


class Piece(NamedTuple):
    """A segment of text that is tokenized at once."""

    text: str
    ends: bool = False  # whether a document ends with it; of a pair, the answer does and the prompt does not
    where: str = ""  # the file, or the row, that it is from
    line: int = 0  # number of its first line in the file, from 1; 0 for rows
    turns: tuple[tuple[int, int], ...] = ()  # the assistant turns of a chat (see `ChatTemplate.chat`)


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
    try:
        for piece in _pieces(config, source, bad):
            if config.end_of_text is None and has_ended and not are_samples(config):
                yield Piece(BETWEEN)
            has_ended = piece.ends
            # The end-of-text token comes after each document, and once if the document ends with it already.
            if end is not None and has_ended and not piece.turns:
                piece = piece._replace(text=piece.text.removesuffix(end))
            yield piece
    except OSError as error:
        raise source_error(source.name, f"whose files cannot be read: {error}") from error


def skip_row(config: DataConfig, source: SourceFiles, bad: list[str], row: str) -> None:
    """Append what cannot be read to `bad`. Raises ConfigError if it is more than `config.max_bad_rows` allows."""
    bad.append(row)
    if len(bad) > config.max_bad_rows:
        reason = f"which has at least {len(bad)} unreadable rows: {'; '.join(bad[-5:])}"
        allowed = f"data.max_bad_rows = {config.max_bad_rows} of them"
        raise source_error(source.name, reason, allowed, "Correct them, or raise data.max_bad_rows.")


def _pieces(config: DataConfig, source: SourceFiles, bad: list[str]) -> Iterator[Piece]:
    if source.kind == "built-in":
        from pydoc_data.topics import topics

        # Without a token, each topic keeps the separator after it, the last one too: its tokens must not change.
        end, has_token = ("", True) if config.end_of_text is not None else (BETWEEN, False)
        yield from (Piece(text + end, ends=has_token) for text in topics.values())
    elif source.kind == "text":
        for path in source.files:
            yield from _text_pieces(config, source, path, bad)
    else:
        template = ChatTemplate(config.tokenizer) if applied_template(config) else None
        for where, row in _rows(config, source):
            try:
                pieces = _document(config, row, where, template)
                for piece in pieces:
                    piece.text.encode()  # raises a ValueError if it has half a character
            except ValueError as error:
                skip_row(config, source, bad, f"{where} {error}")
            else:
                yield from pieces


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
    lines = [line for line in text.splitlines() if line.strip()][:5]
    try:
        return len(lines) > 1 and all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def _text_pieces(config: DataConfig, source: SourceFiles, path: Path, bad: list[str]) -> Iterator[Piece]:
    """Yield a text file as one document, with the line ends as they are."""
    text, line = "", 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # without a byte order mark
            if config.max_bad_rows:  # a bad file is skipped as a whole, so check it before using any of it
                collections.deque(read_pieces(file), maxlen=0)
                file.seek(0)
            for text, following in itertools.pairwise(itertools.chain(read_pieces(file), [""])):
                if line == 1 and _is_rows(text):
                    reason = f"whose file {path} holds JSON objects, one on each line"
                    advice = f"Rename it to .jsonl. To train on the JSON itself: {DATASETS}text,data_files=FILE."
                    raise source_error(source.name, reason, "text", advice)
                yield Piece(text, ends=not following, where=str(path), line=line)
                line += text.count("\n")
    except UnicodeError as error:
        skip_row(config, source, bad, f"{path} is not UTF-8 text: {error}")
    else:
        if not text and config.end_of_text is None:  # an empty document has its separator too
            yield Piece("", ends=True, where=str(path), line=1)


def token_blocks(
    source: SourceFiles, dtype: np.dtype[np.unsignedinteger]
) -> Iterator[tuple[Path, NDArray[np.integer]]]:
    """Yield the tokens of a source's files in blocks. A .bin holds tokens of type `dtype`, a .npy says its own.

    Raises:
        ConfigError: if a file holds something else.
    """
    for path in source.files:
        try:
            is_array = path.suffix.lower() == ".npy"
            tokens = np.load(path, mmap_mode="r") if is_array else np.memmap(path, dtype, "r")
            if not is_array and len(tokens) >= 128 and tokens[:128:2].any() and not tokens[1:128:2].any():
                raise ValueError(f"every second token of type {dtype} is 0; save wider integers as .npy")
            if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
                raise ValueError(f"it is an array of shape {tokens.shape} and type {tokens.dtype}")
        except (OSError, ValueError) as error:
            reason = f"whose file {path} cannot be read as tokens: {error}"
            raise source_error(source.name, reason, "1-D integers") from error
        for begin in range(0, len(tokens), TOKENS_AT_ONCE):
            yield path, np.asarray(tokens[begin : begin + TOKENS_AT_ONCE])


def _document(config: DataConfig, row: Any, where: str, template: ChatTemplate | None) -> list[Piece]:
    """Returns a row in pieces. Raises ValueError if it cannot be read."""
    if not isinstance(row, dict):
        raise row if isinstance(row, ValueError) else ValueError(f"is a {type(row).__name__}, not an object")
    fields = list(row_fields(config).values())
    for name in fields:
        if name not in row:
            raise ValueError(f"has no field {name!r}, only {', '.join(map(repr, row)) or 'no fields at all'}")
        is_text = isinstance(row[name], str) and (row[name] or len(fields) == 1)
        if not is_text and name != config.messages_field:  # the template checks a chat
            raise ValueError(f"has {str(row[name])[:40]!r} for {name!r}, which is not text")
    if template is not None:
        pair = [{"role": role, "content": row[field]} for role, field in zip(ROLES, fields, strict=False)]
        text, turns = template.chat(pair if config.messages_field is None else row[config.messages_field])
        return [Piece(text, ends=True, where=where, turns=turns)]
    if len(fields) == 2:
        return [Piece(row[fields[0]], where=where), Piece(row[fields[1]], ends=True, where=where)]
    texts = [row[fields[0]]]
    if len(texts[0]) > LONG:
        texts = list(read_pieces(io.StringIO(texts[0], newline="")))
    pieces = [Piece(text, where=where) for text in texts if text]  # an empty text is no document
    return [*pieces[:-1], *(piece._replace(ends=True) for piece in pieces[-1:])]


def _rows(config: DataConfig, source: SourceFiles) -> Iterator[tuple[str, Any]]:
    """Yield all rows of a source, each with its place for people to read. A ValueError takes the place of a bad one."""
    if source.kind == "dataset":
        dataset = open_dataset(source.name, config.streaming)
        columns = _columns(config, dataset.column_names or list(next(iter(dataset), {})))
        # Asking for one row at a time takes a hundred times as long.
        yield from _table_rows(source.name, dataset.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE))
    for path in source.files:
        if path.suffix.lower() != ".parquet":
            yield from _json_rows(path)
            continue
        try:
            from pyarrow import parquet

            with parquet.ParquetFile(path) as file:
                columns = _columns(config, file.schema_arrow.names)
                yield from _table_rows(str(path), file.iter_batches(ROWS_AT_ONCE, columns=columns))
        except Exception as error:  # pyarrow has many of its own
            reason = f"which pyarrow (the extra data) cannot read as Parquet: {error}"
            raise source_error(str(path), reason) from error


def _columns(config: DataConfig, existing: list[str]) -> list[str]:
    """Returns the columns to read: all if one is missing, which each row then reports."""
    fields = list(row_fields(config).values())
    return fields if set(fields) <= set(existing) else existing


def _table_rows(name: str, tables: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    rows = itertools.chain.from_iterable(table.to_pylist() for table in tables)
    return ((f"{name}, row {number:,}", row) for number, row in enumerate(rows))


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file of JSON lines, or of a .json file that is one list of them."""
    with path.open("rb") as file:
        is_list = path.suffix.lower() == ".json" and file.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        for number, text in enumerate([file.read()] if is_list else file, start=1):
            if not text.strip():
                continue
            where = f"{path}, {'its list' if is_list else f'line {number:,}'}"
            try:
                found = json.loads(text)
            except (ValueError, RecursionError) as error:  # ValueError: also not UTF-8
                yield where, ValueError(f"is not JSON: {error}")
                continue
            for index, row in enumerate(found if is_list else [found]):
                yield f"{path}, row {index:,}" if is_list else where, row


def open_dataset(source: str, streaming: bool = False) -> Any:
    """Open the dataset of 'datasets:NAME[,OPTION=VALUE...]': a folder of `save_to_disk`, or what `load_dataset` finds.

    Raises:
        ConfigError: if it cannot be opened, or the library is not installed.
    """
    path, *words = source.removeprefix(DATASETS).split(",")
    options: dict[str, Any] = dict(word.partition("=")[::2] for word in words)
    options["keep_in_memory"] = False  # so that it has files whose times show a change
    split = options.pop("split", "train")
    if path == "pandas":  # which unpickles files
        raise source_error(source, "whose files can run code when they are opened", "Parquet, CSV, JSON or Arrow files")
    try:
        import datasets

        if any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(path, **options)
            return found[split] if isinstance(found, dict) else found
        return datasets.load_dataset(path, split=split, streaming=streaming, **options)
    except Exception as error:  # it reads many formats and file systems, each with errors of its own
        raise source_error(source, f"which `datasets` (the extra data) cannot open: {error}") from error


def source_states(source: SourceFiles) -> list[Any]:
    """Lists path, size, times and inode of a source's files: equal lists mean unchanged files."""
    files, about = list(source.files), source.kind
    if source.kind == "dataset":
        files, about = [Path(entry["filename"]) for entry in open_dataset(source.name).cache_files], source.name
    try:
        found = [(str(file.absolute()), file.stat()) for file in files]
    except OSError as error:  # a file was removed since it was found
        raise source_error(source.name, f"whose files cannot be read: {error}") from error
    return [about, *((path, at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino) for path, at in found)]
