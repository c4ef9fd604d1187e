"""Sources to memory-mapped tokens: split by position, encoded once, kept in a cache."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from fundamentallm.config.files import is_prepared, kind_of, problems_of_kind, source_files
from fundamentallm.config.schema import DataConfig
from fundamentallm.config.validation import expand_user
from fundamentallm.data.encoding import PARTS, SETTINGS, prepare_source, split_pieces, token_dtype
from fundamentallm.data.sources import looks, read_source, token_blocks
from fundamentallm.data.tokenizers import create_tokenizer, read_tokenizer
from fundamentallm.errors import ConfigError, writing

CACHE_FORMAT = 2
READ_WHOLE = 2**30
"""Bytes of training tokens above which samples are read one by one: in their random order the system's reading ahead
would fetch some hundred times as much. Smaller corpora it soon holds whole that way."""


class Tokens(NamedTuple):
    """The training or validation part of a source."""

    ids: NDArray[np.integer]
    rows: NDArray[np.int64] | None
    """(pairs, 2), of pairs: the token that each one's answer begins at, and the one after its end."""
    num_bytes: int | None
    """UTF-8 bytes of the text of all targets; None: not known."""


class Source(NamedTuple):
    """A tokenized source, split by position."""

    name: str
    weight: float
    train: Tokens
    validation: Tokens
    bad_rows: int
    """Rows that were left out."""
    tokenizer: Tokenizer
    folder: Path
    """Where its files are."""


class Corpus(NamedTuple):
    """Tokenized sources."""

    tokenizer: Tokenizer
    sources: list[Source]
    end_of_text: int | None
    """The token after each document."""

    @property
    def train(self) -> NDArray[np.integer]:
        """Training tokens of the only source."""
        return self._only().train.ids

    @property
    def validation(self) -> NDArray[np.integer]:
        """Validation tokens of the only source."""
        return self._only().validation.ids

    @property
    def validation_bytes(self) -> int | None:
        """UTF-8 bytes of the validation targets of the only source."""
        return self._only().validation.num_bytes

    def _only(self) -> Source:
        if len(self.sources) != 1:
            raise ConfigError(f"the corpus has {len(self.sources)} sources; look at each of its `sources`.")
        return self.sources[0]


class Facts(NamedTuple):
    """What a source holds."""

    sha256: str
    size: int
    """Characters; of pairs and of tokens, their number."""
    alphabet: str
    """Its characters, where they are asked for."""
    bad: list[str]
    """Its rows that cannot be read."""


def load_corpus(config: DataConfig, show_progress: bool = True) -> Corpus:
    """The sources of `config` as tokens, from the cache where they have been encoded before.

    Files that are what they were by size, times and inode are not read again; others are known by their content.

    Raises:
        ConfigError: if a source cannot be read, or has characters that the tokenizer's vocabulary lacks.
        FundamentaLLMError: if the cache cannot be written.

    Examples:
        >>> from pathlib import Path
        >>> from fundamentallm import DataConfig, load_corpus
        >>> _ = Path("my.txt").write_text("to be or not to be " * 100)
        >>> corpus = load_corpus(DataConfig(source="my.txt", train_split=0.9), show_progress=False)
        >>> corpus.tokenizer.decode(corpus.train[:18].tolist()), len(corpus.validation)
        ('to be or not to be', 190)
    """
    cache = Path(expand_user(config.cache_dir)) if config.cache_dir else _user_cache()
    weights = config.sources()
    facts = {
        source: _known_facts(config, source, cache, show_progress) for source in weights if not is_prepared(source)
    }
    keys = _keys(config, facts)
    found = {
        source: _open(Path(expand_user(source)), source, weight, config)
        if source not in facts
        else _cached(cache / keys[source], source, weight)
        for source, weight in weights.items()
    }
    if lacking := [source for source, there in found.items() if there is None]:
        with writing(cache):
            tokenizer = _tokenizer(config, facts, [cache / key for key in keys.values()], show_progress)
            for source in lacking:
                folder, weight, size = cache / keys[source], weights[source], facts[source].size
                is_ready = functools.partial(_is_whole, folder, source, weight)
                prepare_source(config, source, size, facts[source].bad, tokenizer, folder, is_ready, show_progress)
                found[source] = _open(folder, source, weight)
    sources = [source for source in found.values() if source is not None]
    texts = {source.name: (source.folder / "tokenizer.json").read_text(encoding="utf-8") for source in sources}
    if len(set(texts.values())) > 1:
        raise ConfigError("source has several that were prepared with different tokenizers; prepare them together.")
    tokenizer = sources[0].tokenizer
    end = None if config.end_of_text is None else tokenizer.token_to_id(config.end_of_text)
    return Corpus(tokenizer, sources, end)


def describe(corpus: Corpus) -> list[str]:
    """A line for each source, and what was left out of it."""
    lines, total = [], sum(source.weight for source in corpus.sources)
    for source in corpus.sources:
        sizes = f"{len(source.train.ids):,} training and {len(source.validation.ids):,} validation tokens"
        if source.train.rows is not None and source.validation.rows is not None:
            sizes += f", {len(source.train.rows):,} and {len(source.validation.rows):,} pairs"
        weight = f", weight {source.weight / total:.3g}" if len(corpus.sources) > 1 else ""
        lines.append(f"{source.name}: {sizes}{weight}, vocabulary {corpus.tokenizer.get_vocab_size():,}")
        if source.bad_rows:
            lines.append(f"{source.name}: {source.bad_rows:,} bad rows left out: {source.folder / 'bad_rows.txt'}")
    return lines


def vocabulary_size(config: DataConfig) -> int:
    """Tokens that `load_corpus`'s tokenizer knows; of 'bpe:<size>' what is asked for, which a short text may not fill.

    Without encoding anything: only 'char' reads the text, and a tokenizer.json is opened.

    Raises:
        ConfigError: if what has to be read cannot be.
    """
    for source in filter(is_prepared, config.sources()):
        return read_tokenizer(Path(expand_user(source)) / "tokenizer.json").get_vocab_size()
    kind, _, size = config.tokenizer.partition(":")
    if kind == "bpe":
        return int(size)
    alphabets = (_facts(config, source).alphabet for source in config.sources())
    return create_tokenizer(config.tokenizer, lambda: alphabets, lambda: (), config.end_of_text).get_vocab_size()


# ---- what the sources hold ----------------------------------------------------------------------------------


def _known_facts(config: DataConfig, source: str, cache: Path, show_progress: bool) -> Facts:
    """The facts, from a note in the cache where the source looks as it did when they were found."""
    before, note = looks(config, source), None
    if before is not None:
        settings = config.text_field, config.prompt_field, config.end_of_text, config.max_bad_rows
        # A .bin's type, and so its number of tokens, is the tokenizer's.
        width = token_dtype(read_tokenizer(config.tokenizer)).name if kind_of(config, source) == "tokens" else None
        note = cache / "known" / _hash(CACHE_FORMAT, before, settings, config.tokenizer == "char", width)
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Facts(*json.loads(note.read_text(encoding="utf-8")))
    facts = _facts(config, source, show_progress)
    if note is not None and before == looks(config, source):  # else it was changed while it was read
        with contextlib.suppress(OSError):  # a cache that can only be read has the tokens all the same
            note.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=note.parent, delete=False) as file:
                json.dump(facts, file)
            os.replace(file.name, note)
    return facts


def _bar(what: str, is_shown: bool) -> tqdm[Any]:
    """For what a small text does not take a second of."""
    return tqdm(desc=what, unit="", unit_scale=True, delay=1, disable=not is_shown)


def _facts(config: DataConfig, source: str, show_progress: bool = False) -> Facts:
    """What a source holds, all of it read."""
    if problems := problems_of_kind(config, source, source_files(config, source)):
        raise ConfigError(problems)
    if kind_of(config, source) == "tokens":
        return _facts_of_tokens(config, source)
    digest, size, bad = hashlib.sha256(), 0, list[str]()
    characters = np.zeros(0x110000, dtype=bool)
    with _bar(f"reading {os.path.basename(source)}", show_progress) as bar:
        for piece in read_source(config, source, bad):
            digest.update(piece.text.encode())
            if config.end_of_text is not None and (piece.ends or piece.is_prompt):
                digest.update(b"\xff" if piece.ends else b"\xfe")  # which no text holds
            size += len(piece.text) if config.prompt_field is None else piece.ends
            if config.tokenizer == "char":
                characters[np.frombuffer(piece.text.encode("utf-32-le"), np.uint32)] = True
            bar.update(len(piece.text))
    if size == 0:
        raise ConfigError(f"source is {source!r}, which is empty; give one with text in it.")
    return Facts(digest.hexdigest(), size, "".join(map(chr, np.flatnonzero(characters))), bad)


def _facts_of_tokens(config: DataConfig, source: str) -> Facts:
    digest, size, dtype = hashlib.sha256(), 0, token_dtype(read_tokenizer(config.tokenizer))
    for _, block in token_blocks(config, source, dtype):
        digest.update(np.ascontiguousarray(block, np.int64).data)
        size += len(block)
    return Facts(digest.hexdigest(), size, "", [])


def _keys(config: DataConfig, facts: dict[str, Facts]) -> dict[str, str]:
    """The names under which the cache has the sources."""
    tokenizer: Any = config.tokenizer
    if config.tokenizer.endswith(".json"):
        tokenizer = read_tokenizer(config.tokenizer).to_str()
    elif config.tokenizer != "byte":  # it is made of all the text
        tokenizer = [config.tokenizer, *(found.sha256 for found in facts.values())]
    made = CACHE_FORMAT, tokenizers.__version__, tokenizer, config.train_split, config.end_of_text
    of_pairs = config.prompt_field is not None
    return {source: _hash(*made, of_pairs, found.sha256) for source, found in facts.items()}


def _tokenizer(config: DataConfig, facts: dict[str, Facts], folders: list[Path], show_progress: bool) -> Tokenizer:
    """The tokenizer; one that was trained for the same text before is not trained again."""
    if config.tokenizer.startswith("bpe:"):
        for folder in folders:
            for path in (folder, folder.with_name(f".staging-{folder.name}")):
                with contextlib.suppress(ConfigError):
                    return read_tokenizer(path / "tokenizer.json")

    def training_text() -> Iterator[str]:
        for source, found in facts.items():
            size = int(found.size * config.train_split)
            pieces = split_pieces(read_source(config, source, []), size, by_rows=config.prompt_field is not None)
            with _bar(f"learning {config.tokenizer} from {os.path.basename(source)}", show_progress) as bar:
                for part, piece in pieces:
                    if part == 0:
                        bar.update(len(piece.text))
                        yield piece.text

    alphabets = [found.alphabet for found in facts.values()]
    return create_tokenizer(config.tokenizer, lambda: alphabets, training_text, config.end_of_text)


def _hash(*parts: object) -> str:
    """32 hexadecimal digits for what JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fundamentallm"


# ---- opening ------------------------------------------------------------------------------------------------


def _cached(folder: Path, name: str, weight: float) -> Source | None:
    """The cache entry at `folder`; None where there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ConfigError):
        return _open(folder, name, weight)
    return None


def _is_whole(folder: Path, name: str, weight: float) -> bool:
    return _cached(folder, name, weight) is not None


def _open(folder: Path, name: str, weight: float, config: DataConfig | None = None) -> Source:
    """The prepared source in `folder`.

    Raises:
        FileNotFoundError: if it is not there or not whole.
        ConfigError: if it was prepared with other settings than `config` has (None: they are known to be the same).
    """
    meta = json.loads((folder / "meta.json").read_text())
    if config is not None:
        _check_settings(folder, meta["settings"], config)
    dtype, parts = np.dtype(meta["dtype"]), []
    for index, part in enumerate(PARTS):
        ids = _mapped(folder / f"{part}.bin", dtype, meta["tokens"][index])
        rows = None
        if meta["rows"] is not None:
            rows = _mapped(folder / f"{part}.rows.bin", np.dtype(np.int64), 2 * meta["rows"][index]).reshape(-1, 2)
        parts.append(Tokens(ids, rows, meta["validation_bytes"] if part == "validation" else None))
    train = parts[0].ids
    if train.nbytes > READ_WHOLE and hasattr(mmap, "MADV_RANDOM"):
        train.base.madvise(mmap.MADV_RANDOM)  # type: ignore[union-attr]
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    return Source(name, weight, parts[0], parts[1], meta["bad_rows"], tokenizer, folder)


def _mapped(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    if path.stat().st_size != count * dtype.itemsize:
        raise FileNotFoundError(path)
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype)


def _check_settings(folder: Path, made_with: dict[str, Any], config: DataConfig) -> None:
    """Refuse settings that a prepared source was not made with."""
    different = {name: made_with[name] for name in SETTINGS if made_with[name] != getattr(config, name)}
    if config.tokenizer.endswith(".json") and "tokenizer" in different:
        mine, its = (read_tokenizer(path).to_str() for path in (config.tokenizer, folder / "tokenizer.json"))
        if mine == its:
            del different["tokenizer"]
    if different:
        raise ConfigError(
            [
                f"{name} is {getattr(config, name)!r}, and {folder} was prepared with {value!r}; set it to that."
                for name, value in different.items()
            ]
        )
