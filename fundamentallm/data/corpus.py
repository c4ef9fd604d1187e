"""Sources as memory-mapped tokens: split by position, encoded once, kept in a cache."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fundamentallm.config.files import (
    DATASETS,
    PREPARED,
    SourceFiles,
    are_samples,
    find_sources,
    is_prepared,
    validation_only,
)
from fundamentallm.config.schema import BUILT_IN_CORPUS, DataConfig
from fundamentallm.config.validation import expand_user
from fundamentallm.data.chat import applied_template
from fundamentallm.data.encoding import (
    PARTS,
    Facts,
    digested,
    progress_bar,
    read_again,
    settings_of_tokens,
    split_pieces,
    token_dtype,
    write_source,
)
from fundamentallm.data.sources import (
    check_bad_rows,
    file_states,
    read_source,
    reads_special_tokens,
    source_error,
    source_states,
    token_blocks,
)
from fundamentallm.data.tokenizers import create_tokenizer, num_ids, read_tokenizer, same_tokenizer
from fundamentallm.errors import ConfigError, Problem, writing

CACHE_FORMAT = 3
CHECKSUMS = "checksums.json"
"""File of a prepared source with the CRC-32 of each block of the others."""
BLOCK = 2**24
"""Bytes of a block."""
ALWAYS_CHECKED = 2**30
"""Bytes up to which a prepared source is checked at each opening; a larger one once, and after changes of its files."""
RANDOM_ACCESS_ABOVE = 2**30
"""Bytes of training tokens above which read-ahead is switched off: with it, samples in random order would read some
hundred times their size. A smaller corpus is soon in memory as a whole."""


class Tokens(NamedTuple):
    """The training or validation part of a source."""

    ids: NDArray[np.integer]
    rows: NDArray[np.int64] | None
    """For pairs, (pairs, 2): the index of each answer's first token, and of the one after its end."""
    num_bytes: int | None
    """UTF-8 bytes of the text of all targets, or None if unknown."""
    turns: NDArray[np.int64] | None = None
    """For chats, the index of each assistant turn's first token and of the one after its last, one after the other."""


class Source(NamedTuple):
    """A tokenized source, split by position."""

    name: str
    weight: float
    train: Tokens
    validation: Tokens
    bad_rows: int  # number of rows that were skipped
    counts: dict[str, int]  # what else to report, by its name
    tokenizer: Tokenizer
    folder: Path
    left_out: str = ""  # files of the source that are not read


class Corpus(NamedTuple):
    """Tokenized sources."""

    tokenizer: Tokenizer
    sources: list[Source]
    end_of_text: int | None
    """The token after each document."""
    validation: Sequence[Source] = ()
    """Sources whose validation parts take the place of those of `sources`."""


def load_corpus(config: DataConfig, show_progress: bool = True, tokenizer: Tokenizer | None = None) -> Corpus:
    """Load the sources of `config` as tokens, from the cache if they were encoded before.

    Files whose size, times and inode are unchanged are not read again. Others are recognised by their content. A given
    `tokenizer`, which the run began with, replaces one that would be learned from the text as it is now.

    Raises:
        ConfigError: if a source cannot be read, or has characters that the tokenizer's vocabulary lacks.
        FundamentaLLMError: if the cache cannot be written.

    Examples:
        >>> from pathlib import Path
        >>> from fundamentallm import DataConfig, load_corpus
        >>> _ = Path("my.txt").write_text("to be or not to be " * 100)
        >>> corpus = load_corpus(DataConfig(source="my.txt", train_split=0.9), show_progress=False)
        >>> source = corpus.sources[0]
        >>> corpus.tokenizer.decode(source.train.ids[:18].tolist()), len(source.validation.ids)
        ('to be or not to be', 190)
    """
    if config.streaming:
        raise ConfigError(Problem("data.streaming", True, "false, since the whole text is needed"))
    if (only := validation_only(config)) is not None:
        whole = replace(config, validation_source=None, train_split=1.0)
        corpus = load_corpus(whole, show_progress, tokenizer)
        return corpus._replace(validation=load_corpus(only, show_progress, corpus.tokenizer).sources)
    cache = Path(expand_user(config.cache_dir)) if config.cache_dir else _user_cache()
    weights, resolved = config.sources(), find_sources(config)
    raw = [source for source in resolved if source.kind != "prepared"]
    facts = {source.name: _cached_facts(config, source, cache, show_progress) for source in raw}
    folders = {name: cache / key for name, key in _keys(config, facts).items()}
    if tokenizer is not None and not all(_has_tokenizer(folder, tokenizer) for folder in folders.values()):
        folders = {name: cache / key for name, key in _keys(config, facts, tokenizer).items()}
    for source in resolved:
        if source.kind == "prepared":
            (folders[source.name],) = source.files
            _check_settings(source, config)
            # Earlier versions wrote no checksums.
            if (source.files[0] / CHECKSUMS).exists() and not _is_ready(source.files[0], cache):
                raise source_error(source.name, "which is damaged", advice="Prepare it again.")
    if missing := [source for source in raw if not _is_ready(folders[source.name], cache)]:
        with writing(cache, "Choose another data.cache_dir."):
            if tokenizer is None:
                ready = [folders[source.name] for source in raw if source not in missing]
                tokenizer = _make_tokenizer(config, raw, facts, ready, show_progress)
            tokenizer.encode_special_tokens = not reads_special_tokens(config)
            for source in missing:
                _encode(config, source, facts[source.name], tokenizer, folders[source.name], show_progress)
    sources = []
    for name, source in zip(weights, resolved, strict=True):
        sources.append(_open(folders[name], name, weights[name])._replace(left_out=source.left_out))
        if name in facts and sources[-1].bad_rows > config.max_bad_rows:  # encoded when more were allowed
            check_bad_rows(config, name, (folders[name] / "bad_rows.txt").read_text("utf-8").splitlines())
        touch_note(opened_note(name))  # so that checkpoints of this run may open it
    if len({(source.folder / "tokenizer.json").read_text(encoding="utf-8") for source in sources}) > 1:
        reason = "which were prepared with different tokenizers"
        raise ConfigError(Problem("data.source", list(weights), "", "Prepare them together.", reason))
    tokenizer = sources[0].tokenizer
    tokenizer.encode_special_tokens = not reads_special_tokens(config)
    end = None if config.end_of_text is None else tokenizer.token_to_id(config.end_of_text)
    return Corpus(tokenizer, sources, end)


def describe(corpus: Corpus) -> list[str]:
    """Returns a line for each source, and one for the rows that were skipped in it."""
    lines, total = [], sum(source.weight for source in corpus.sources)
    for source in (*corpus.sources, *corpus.validation):
        sizes = f"{len(source.train.ids):,} training and {len(source.validation.ids):,} validation tokens"
        if source.train.rows is not None and source.validation.rows is not None:
            kind = "pairs" if source.train.turns is None else "chats"
            sizes += f", {len(source.train.rows):,} and {len(source.validation.rows):,} {kind}"
        weight = f", weight {source.weight / total:.3g}" if len(corpus.sources) > 1 else ""
        lines.append(f"{source.name}: {sizes}{weight}, vocabulary {num_ids(corpus.tokenizer):,}")
        lines += [f"{source.name}: {count:,} {what}" for what, count in source.counts.items()]
        if source.left_out:
            lines.append(f"{source.name}: not read: {source.left_out}")
        if source.bad_rows:
            lines.append(f"{source.name}: {source.bad_rows:,} bad rows skipped: {source.folder / 'bad_rows.txt'}")
    return lines


def vocabulary_size(config: DataConfig) -> int:
    """Returns the vocabulary size of `load_corpus`'s tokenizer without encoding anything.

    For 'bpe:<size>' it is the size asked for, which a short text may not fill. Only 'char' reads the text.

    Raises:
        ConfigError: if the text or the tokenizer.json cannot be read.
    """
    for name in filter(is_prepared, config.sources()):
        return num_ids(read_tokenizer(Path(expand_user(name)) / "tokenizer.json"))
    kind, _, size = config.tokenizer.partition(":")
    if kind == "bpe":
        return int(size)
    alphabets = [_read_facts(config, source).alphabet for source in find_sources(config)] if kind == "char" else []
    return num_ids(create_tokenizer(config.tokenizer, alphabets, config.end_of_text))


def was_opened(config: DataConfig) -> bool:
    """Returns whether this user has loaded every source of `config` before, by a config of their own."""
    names = [*config.sources(), *([config.validation_source] if config.validation_source is not None else [])]
    return all(name == BUILT_IN_CORPUS or opened_note(name).exists() for name in names)


def opened_note(name: str) -> Path:
    """Returns the file by whose existence a run of this user's has opened a source or a base model's folder."""
    where = name if name.startswith(DATASETS) else os.path.abspath(expand_user(name))
    return _user_cache() / "known" / _hash("opened", where)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or expand_user("~/.cache")) / "fundamentallm"


# ---- content of the sources ---------------------------------------------------------------------------------


def _cached_facts(config: DataConfig, source: SourceFiles, cache: Path, show_progress: bool) -> Facts:
    """Returns the facts of a source, from the cache if its files are unchanged since they were found."""
    states, note = source_states(source), None
    if states is not None:
        settings: list[Any] = [config.text_field, config.prompt_field, config.end_of_text, config.max_bad_rows]
        settings += [reads_special_tokens(config), config.tokenizer == "char"]
        settings += [config.messages_field, applied_template(config)] if are_samples(config) else []
        # The type of the tokens in a .bin, and so their number, follows from the tokenizer.
        width = token_dtype(read_tokenizer(config.tokenizer)).name if source.kind == "tokens" else None
        note = cache / "known" / _hash(CACHE_FORMAT, states, settings, width)
        with contextlib.suppress(OSError, ValueError, TypeError):
            facts, checksum = json.loads(note.read_text(encoding="utf-8"))
            if _hash(facts) == checksum:
                return Facts(*facts)
    facts = _read_facts(config, source, show_progress)
    if note is not None and states == source_states(source):  # otherwise it changed while it was read
        with contextlib.suppress(OSError):  # a read-only cache still serves its tokens
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps([facts, _hash(facts)]), encoding="utf-8")
    return facts


def _read_facts(config: DataConfig, source: SourceFiles, show_progress: bool = False) -> Facts:
    """Read a source and return its facts."""
    digest, size, bad = hashlib.sha256(), 0, list[str]()
    if source.kind == "tokens":
        for _, block in token_blocks(source, token_dtype(read_tokenizer(config.tokenizer))):
            digest.update(np.ascontiguousarray(block, np.int64).data)
            size += len(block)
        return Facts(digest.hexdigest(), size, "", [])
    characters = np.zeros(0x110000, dtype=bool)
    with progress_bar("reading", source, show_progress) as bar:
        for piece in digested(config, read_source(config, source, bad), digest):
            size += len(piece.text) if not are_samples(config) else piece.ends
            if config.tokenizer == "char":
                characters[np.frombuffer(piece.text.encode("utf-32-le"), np.uint32)] = True
            bar.update(len(piece.text))
    if size == 0:
        raise source_error(source.name, "which is empty", "a source with text in it")
    return Facts(digest.hexdigest(), size, "".join(map(chr, np.flatnonzero(characters))), bad)


def _keys(config: DataConfig, facts: dict[str, Facts], given: Tokenizer | None = None) -> dict[str, str]:
    """Returns the name of each source's folder in the cache."""
    tokenizer: Any = config.tokenizer
    if given is not None:
        tokenizer = given.to_str()
    elif config.tokenizer.endswith(".json"):
        tokenizer = read_tokenizer(config.tokenizer).to_str()
    elif config.tokenizer != "byte":  # the vocabulary depends on the text of all sources
        tokenizer = [config.tokenizer, *(found.sha256 for found in facts.values())]
    settings = settings_of_tokens(config)
    reading = settings["special_tokens"], settings["unknown_tokens"]
    shared = CACHE_FORMAT, tokenizers.__version__, tokenizer, config.train_split, config.end_of_text, reading
    return {name: _hash(*shared, are_samples(config), found.sha256) for name, found in facts.items()}


def _make_tokenizer(
    config: DataConfig, sources: list[SourceFiles], facts: dict[str, Facts], ready: list[Path], show_progress: bool
) -> Tokenizer:
    """Make the tokenizer, or take it from a source that is `ready`."""
    if ready:
        return read_tokenizer(ready[0] / "tokenizer.json")
    if not config.tokenizer.startswith("bpe:"):
        return create_tokenizer(config.tokenizer, (found.alphabet for found in facts.values()), config.end_of_text)

    def training_text() -> Iterator[str]:
        for source in sources:
            size = int(facts[source.name].size * config.train_split)
            pieces = split_pieces(read_again(config, source, facts[source.name]), size, are_samples(config))
            with progress_bar(f"learning {config.tokenizer} from", source, show_progress) as bar:
                for part, piece in pieces:
                    if part == 0:
                        bar.update(len(piece.text))
                        yield piece.text

    return create_tokenizer(config.tokenizer, training_text(), config.end_of_text)


def _encode(
    config: DataConfig, source: SourceFiles, facts: Facts, tokenizer: Tokenizer, folder: Path, show_progress: bool
) -> None:
    """Make a folder of the cache, completely or not at all, unless another process makes it meanwhile."""
    new, locks = folder.with_name(f".staging-{folder.name}"), folder.parent / "known"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / f"{folder.name}.lock").open("w") as lock:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_ready(folder, folder.parent):
            return
        shutil.rmtree(new, ignore_errors=True)  # of a killed process
        new.mkdir()
        try:
            write_source(config, source, facts, tokenizer, new, show_progress)
            (new / CHECKSUMS).write_text(json.dumps(_checksums(sorted(new.iterdir()))))
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def touch_note(note: Path) -> None:
    """Makes a note in the user's cache."""
    with contextlib.suppress(OSError):  # a read-only cache still serves its tokens
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def _hash(*parts: object) -> str:
    """Returns 32 hexadecimal digits for values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _has_tokenizer(folder: Path, tokenizer: Tokenizer) -> bool:
    with contextlib.suppress(ConfigError):
        return same_tokenizer(read_tokenizer(folder / "tokenizer.json"), tokenizer)
    return False


# ---- opening ------------------------------------------------------------------------------------------------


def _is_ready(folder: Path, cache: Path) -> bool:
    """Returns whether a prepared source exists, is complete and has its checksums."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ConfigError):
        _open(folder, "", 1.0)
        saved = json.loads((folder / CHECKSUMS).read_text())
        files = [folder / name for name in sorted(saved)]
        states = file_states(files) if sum(path.stat().st_size for path in files) > ALWAYS_CHECKED else None
        note = cache / "known" / _hash("intact", states)
        if states is not None and note.exists():
            return True
        if set(PREPARED) <= saved.keys() and saved == _checksums(files):
            if states is not None:
                touch_note(note)
            return True
    return False


def _checksums(files: Iterable[Path]) -> dict[str, list[int]]:
    """Returns the CRC-32 of each block of files by their name."""
    found = {}
    with ThreadPoolExecutor() as executor:  # zlib releases the interpreter lock
        for path in files:
            size = path.stat().st_size
            data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
            blocks = (data[start : start + BLOCK] for start in range(0, size, BLOCK))
            found[path.name] = list(executor.map(zlib.crc32, blocks))
    return found


def _open(folder: Path, name: str, weight: float) -> Source:
    """Open a prepared source. Raises FileNotFoundError if it is missing or incomplete."""
    meta, parts = json.loads((folder / "meta.json").read_text()), list[Tokens]()
    for index, part in enumerate(PARTS):
        ids, rows = _map_file(folder / f"{part}.bin", np.dtype(meta["dtype"]), meta["tokens"][index]), None
        turns = None
        if meta["rows"] is not None:
            rows = _map_file(folder / f"{part}.rows.bin", np.dtype(np.int64), 2 * meta["rows"][index]).reshape(-1, 2)
        if meta.get("turns") is not None:
            turns = _map_file(folder / f"{part}.turns.bin", np.dtype(np.int64), meta["turns"][index])
        parts.append(Tokens(ids, rows, meta["validation_bytes"] if part == "validation" else None, turns))
    train, validation = parts
    if train.ids.nbytes > RANDOM_ACCESS_ABOVE and hasattr(mmap, "MADV_RANDOM"):
        train.ids.base.madvise(mmap.MADV_RANDOM)  # type: ignore[union-attr]
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    return Source(name, weight, train, validation, meta["bad_rows"], meta.get("counts", {}), tokenizer, folder)


def _map_file(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    if path.stat().st_size != count * dtype.itemsize:
        raise FileNotFoundError(path)
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype)


def _check_settings(source: SourceFiles, config: DataConfig) -> None:
    """Refuse settings that differ from those a source was prepared with."""
    (folder,) = source.files
    made_with = {"chat_template": False, **json.loads((folder / "meta.json").read_text())["settings"]}
    settings = settings_of_tokens(config).items()
    different = {key: made_with[key] for key, value in settings if made_with.get(key, value) != value}
    if config.tokenizer.endswith(".json") and "tokenizer" in different:
        given, prepared = (read_tokenizer(path).to_str() for path in (config.tokenizer, folder / "tokenizer.json"))
        if given == prepared:
            del different["tokenizer"]
    if different:
        allowed = {setting: f"{value!r}, as in the source {source.name}" for setting, value in different.items()}
        raise ConfigError([Problem(f"data.{key}", getattr(config, key), text) for key, text in allowed.items()])
