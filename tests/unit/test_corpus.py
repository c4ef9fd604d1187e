"""The corpus: split by position, encoded once, complete in the cache or absent."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from fundamentallm.commands import prepare
from fundamentallm.config.schema import BUILT_IN_CORPUS, DataConfig
from fundamentallm.data import corpus, encoding, sources
from fundamentallm.data.corpus import Corpus, load_corpus
from fundamentallm.data.sources import read_pieces
from fundamentallm.data.tokenizers import create_tokenizer
from fundamentallm.errors import FundamentaLLMError
from tests.conftest import problem_of

UNICODE = "Grüße,\r\n\tहिन्दी 漢字 🙂\r old Mac\n\n  don't e\u0301\n" * 20

Load = Callable[..., Corpus]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def load(tmp_path: Path, cache: Path) -> Load:
    """Load a text, or what a source path names, with the settings given."""

    def load(text: str | Path, **settings: object) -> Corpus:
        source = text
        if isinstance(text, str) and text != BUILT_IN_CORPUS:
            source = tmp_path / "source.txt"
            if not source.exists() or source.read_bytes() != text.encode():
                source.write_bytes(text.encode())
        config = DataConfig(source=str(source), cache_dir=str(cache), **{"tokenizer": "byte"} | settings)
        return load_corpus(config, show_progress=False)

    return load


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Where `load` writes a text."""
    return tmp_path / "source.txt"


def tokens_of(made: Corpus) -> list[list[int]]:
    (source,) = made.sources
    return [part.ids.tolist() for part in (source.train, source.validation)]


def decode(made: Corpus) -> tuple[str, ...]:
    return tuple(map(made.tokenizer.decode, tokens_of(made)))


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.name != "known") if cache.exists() else []


def save_tokenizer(path: Path, characters: str, unknown: str | None = None) -> str:
    vocabulary = {character: index for index, character in enumerate([*characters, *([unknown] if unknown else [])])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize(
    ("tokenizer", "train_split"), [("char", 0.53), ("byte", 0.53), ("byte", 1e-6), ("bpe:300", 1.0)]
)
def test_load_corpus_splits_at_a_character(
    load: Load, tokenizer: str, train_split: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE", 7)
    monkeypatch.setattr(encoding, "PIECES_AT_ONCE", 2)
    cut = int(len(UNICODE) * train_split)
    made = load(UNICODE, tokenizer=tokenizer, train_split=train_split)
    assert decode(made) == (UNICODE[:cut], UNICODE[cut:])
    assert (made.sources[0].validation.num_bytes == 0) == (train_split == 1.0)
    if tokenizer == "byte":
        assert tokens_of(made) == [create_tokenizer("byte").encode(text).ids for text in (UNICODE[:cut], UNICODE[cut:])]


@pytest.mark.parametrize("text", ["word " * 300, "x" * 999, "漢字" * 300 + " " + "ab\n" * 9, "a  b\r\nc" * 200])
def test_read_pieces_cuts_at_lines_or_white_space(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 50)
    pieces = list(read_pieces(io.StringIO(text, newline="")))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 150
    if " " in text[:50]:
        assert [piece for piece in pieces[1:] if not (piece[0].isspace() or piece[0] == "c")] == []
    assert all(piece.endswith("\n") for piece in read_pieces(io.StringIO("some words\n" * 99)))


def test_bpe_learns_nothing_from_the_validation_text(load: Load, text: str) -> None:
    train, validation = text[:10_000], text[10_000:20_000]
    learned = load(train + validation, tokenizer="bpe:300", train_split=0.5).tokenizer.to_str()
    assert learned == load(train + "zq" * 5_000, tokenizer="bpe:300", train_split=0.5).tokenizer.to_str()
    assert learned != load(validation + train, tokenizer="bpe:300", train_split=0.5).tokenizer.to_str()


def test_char_knows_the_characters_of_the_validation_text(load: Load) -> None:
    made = load("a" * 50 + "漢" * 50, tokenizer="char", train_split=0.5)
    assert decode(made) == ("a" * 50, "漢" * 50)


@pytest.mark.parametrize(("tokenizer", "start"), [("char", "🙂"), ("byte", "🙂"), ("bpe:300", "a")])
def test_validation_bytes_exclude_the_first_token(load: Load, tokenizer: str, start: str) -> None:
    text = "x" * 100 + start + "y漢 é" * 20
    made = load(text, tokenizer=tokenizer, train_split=100 / len(text) + 1e-9)
    validation = text[100:].encode()
    # bpe learns from x alone, so that its first token is a byte too.
    first = 1 if tokenizer != "char" else len(start.encode())
    assert decode(made)[1] == validation.decode()
    assert made.sources[0].validation.num_bytes == len(validation) - first


@pytest.mark.parametrize("change", [{"tokenizer": "char"}, {"train_split": 0.25}])
def test_another_tokenizer_or_split_is_encoded(load: Load, change: dict) -> None:
    before = decode(load(UNICODE))
    made = load(UNICODE, **change)
    cut = int(len(UNICODE) * change.get("train_split", 0.9))
    assert decode(made) == (UNICODE[:cut], UNICODE[cut:])
    assert made.tokenizer.get_vocab_size() == (256 if "tokenizer" not in change else len(set(UNICODE)) + 1)
    assert decode(load(UNICODE)) == before


def test_changed_tokenizer_file_is_noticed(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    for characters, ids in (("ab", [0, 1, 1, 0]), ("ba", [1, 0, 0, 1])):
        made = load("abba", tokenizer=save_tokenizer(path, characters), train_split=1.0)
        assert tokens_of(made)[0] == ids


def test_given_tokenizer_finds_the_tokens_that_it_was_learned_for(load: Load, source: Path) -> None:
    made = load(UNICODE, tokenizer="bpe:300")
    given = Tokenizer.from_str(made.tokenizer.to_str(pretty=True))
    config = DataConfig(str(source), "bpe:300", cache_dir=str(source.parent / "cache"))
    assert load_corpus(config, False, given).sources[0].folder == made.sources[0].folder
    source.write_text(UNICODE + "something else " * 30)  # from which others would be learned
    again = load_corpus(config, False, given)
    assert again.tokenizer.to_str() == made.tokenizer.to_str()
    assert "something else" in "".join(decode(again))


@pytest.mark.parametrize("name", ["validation.bin", "checksums.json", "tokenizer.json"])
def test_damaged_cache_entry_is_encoded_again(load: Load, cache: Path, name: str) -> None:
    before = decode(load(UNICODE))
    (entry,) = entries(cache)
    files = {path.name: path.read_bytes() for path in entry.iterdir()}
    if name == "tokenizer.json":
        (entry / name).unlink()
    else:
        flip(entry / name)
    assert decode(load(UNICODE)) == before
    assert entries(cache) == [entry]
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == files


def test_prepared_source_without_checksums_that_is_cut_off_is_refused(load: Load, tmp_path: Path) -> None:
    load(UNICODE).sources[0].folder.rename(tmp_path / "early")
    (tmp_path / "early" / "checksums.json").unlink()
    os.truncate(tmp_path / "early" / "train.bin", 10)
    assert "damaged" in problem_of(load, tmp_path / "early").reason


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("change", "reason"), [(flip, "changed"), (os.remove, "cannot be read")])
def test_source_that_changes_while_it_is_read_is_refused(
    load: Load, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, change: Any, reason: str
) -> None:
    real = corpus.write_source

    def write_and_change(*arguments: Any) -> Any:
        made = real(*arguments)
        change(source)
        return made

    monkeypatch.setattr(corpus, "write_source", write_and_change)
    found = problem_of(load, UNICODE)
    assert found.setting == "data.source"
    assert reason in found.reason
    assert entries(cache) == []


def test_large_cache_entry_is_checked_by_prepare(load: Load, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(UNICODE)
    monkeypatch.setattr(corpus, "CHECKED_BYTES", 0)
    flip(entries(cache)[0] / "validation.bin")
    assert "".join(decode(load(UNICODE))) != UNICODE
    source, folder = str(cache.parent / "source.txt"), str(cache)
    words = [f"--data.source={source}", f"--data.cache_dir={folder}", "--data.tokenizer=byte"]
    assert problem_of(prepare.main, words, "prepare").setting == "data.source"


def test_cache_needs_no_home_folder(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run as a user that has none."""
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["no such user"])
    assert "".join(decode(load(UNICODE))) == UNICODE


def test_unknown_characters_are_named(load: Load, cache: Path, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "mine.json", "ab\n", unknown="<unk>")
    text = "ab\n" * 100 + "a漢b\nabéab\n" + "ab\n" * 100
    problem = problem_of(load, text, tokenizer=tokenizer)
    assert problem.setting == "data.source"
    assert f"{tmp_path / 'source.txt'}, line 101 has 'é', '漢'" in problem.reason
    assert entries(cache) == []
    assert "unknown_tokens" in problem.advice
    made = load(text, tokenizer=tokenizer, unknown_tokens=True)
    assert sum(part.count(3) for part in tokens_of(made)) == sum(made.sources[0].counts.values()) == 2


def test_characters_are_not_dropped_silently(load: Load, tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "mine.json", "ab")  # there is no unknown token to allow
    problem = problem_of(load, "abzab" * 20, tokenizer=path, unknown_tokens=True)
    assert ("line 1 has 'z'" in problem.reason, "unknown_tokens" in problem.advice) == (True, False)


def save_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("prompts", [False, True])
def test_row_with_an_unknown_character_is_bad(load: Load, tmp_path: Path, prompts: bool) -> None:
    path = tmp_path / "mine.json"
    tokenizer = create_tokenizer("char", "abc", end_of_text="<end>")
    tokenizer.save(str(path))
    texts = [("a", "ab"), ("漢", "ab"), ("b", "漢"), ("c", "ba")]
    rows = save_rows(tmp_path / "rows.jsonl", [{"ask": ask, "text": text} for ask, text in texts])
    given = {"tokenizer": str(path), "end_of_text": "<end>", "train_split": 1.0}
    given |= {"prompt_field": "ask"} if prompts else {}
    bad = 2 if prompts else 1
    made = load(rows, max_bad_rows=bad, **given)
    assert tokens_of(made)[0] == tokenizer.encode("aab<end>cba<end>" if prompts else "ab<end>ab<end>ba<end>").ids
    assert made.sources[0].bad_rows == bad
    assert "line 3 has '漢'" in (made.sources[0].folder / "bad_rows.txt").read_text()
    assert problem_of(load, rows, max_bad_rows=bad - 1, **given).setting == "data.source"


CHAT = "<|im_start|>a<|im_end|>"


def test_special_tokens_of_a_given_tokenizer(load: Load, tmp_path: Path) -> None:
    tokenizer = create_tokenizer("byte", end_of_text="<|im_end|>")
    tokenizer.add_special_tokens(["<|im_start|>"])
    tokenizer.save(str(tmp_path / "mine.json"))
    rows = save_rows(tmp_path / "rows.jsonl", [{"text": CHAT}] * 2)
    given = {"tokenizer": str(tmp_path / "mine.json"), "end_of_text": "<|im_end|>", "train_split": 1.0}
    for setting in ("text", None, "tokens"):
        made = load(rows, special_tokens=setting, **given)
        tokenizer.encode_special_tokens = as_text = setting == "text"
        # The token that ends a row is there once, also if the row has it.
        assert tokens_of(made)[0] == [*tokenizer.encode(CHAT).ids, *([256] if as_text else [])] * 2
        assert made.tokenizer.encode(CHAT).ids == tokenizer.encode(CHAT).ids
        assert sum(made.sources[0].counts.values()) == 4 * as_text


def test_special_token_of_a_made_tokenizer_is_text(load: Load) -> None:
    made = load("a<end>b", end_of_text="<end>", train_split=1.0)
    assert tokens_of(made)[0] == [*create_tokenizer("byte").encode("a<end>b").ids, 256]
    assert list(made.sources[0].counts.values()) == [1]


@pytest.mark.parametrize(("largest", "dtype"), [(2**16 - 1, np.uint16), (2**16, np.uint32)])
def test_ids_with_gaps_have_the_type_of_the_largest(load: Load, tmp_path: Path, largest: int, dtype: type) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": largest}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "mine.json"))
    made = load("abba", tokenizer=str(tmp_path / "mine.json"), train_split=0.5)
    assert tokens_of(made) == [[0, largest], [largest, 0]]
    assert (made.sources[0].train.ids.dtype, made.sources[0].validation.num_bytes) == (dtype, 1)
    np.save(tmp_path / "tokens.npy", np.array([0, largest]))
    assert tokens_of(load(tmp_path / "tokens.npy", tokenizer=str(tmp_path / "mine.json"))) == [[0], [largest]]


def test_text_that_a_tokenizer_normalises_is_known(load: Load, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "caf": 1, "##e": 2, "fin": 3}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "mine.json"))
    settings = {"tokenizer": str(tmp_path / "mine.json"), "train_split": 1.0}
    assert tokens_of(load("Café ﬁn", **settings))[0] == [1, 2, 3]
    assert "'漢'" in problem_of(load, "Café 漢", **settings).reason
    assert "'" + "fin" * 50 + "'" in problem_of(load, "fin" * 50, **settings).reason  # longer than a word may be


def test_empty_text_is_refused(load: Load, cache: Path) -> None:
    assert problem_of(load, "").setting == "data.source"
    assert entries(cache) == []


def test_interrupted_encoding_leaves_no_entry(load: Load, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "read_source", refuse)
    with pytest.raises(KeyboardInterrupt):
        load(UNICODE)
    assert entries(cache) == []
    monkeypatch.undo()
    load(UNICODE)
    (entry,) = entries(cache)
    left = entry.rename(cache / f".staging-{entry.name}")  # by a process that was killed
    (left / "train.bin").write_bytes(b"half")
    assert "".join(decode(load(UNICODE))) == UNICODE
    assert entries(cache) == [entry]


def refuse(*_: object) -> Any:
    raise KeyboardInterrupt


def test_unchanged_source_is_not_read_again(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    before = decode(load(UNICODE, tokenizer="char"))
    monkeypatch.setattr(corpus, "read_source", refuse)
    assert decode(load(UNICODE, tokenizer="char")) == before


@pytest.mark.parametrize("is_in_place", [True, False])
def test_changed_text_of_the_same_size_and_time_is_noticed(load: Load, source: Path, is_in_place: bool) -> None:
    load(UNICODE)
    other, status = UNICODE.replace("old", "new"), source.stat()
    written = source if is_in_place else source.parent / "new"
    written.write_bytes(other.encode())
    os.utime(written, ns=(status.st_atime_ns, status.st_mtime_ns))
    written.rename(source)
    assert "".join(decode(load(source))) == other


def test_read_only_cache_still_serves_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be " * 20)
    config, known = DataConfig(str(tmp_path / "a.txt"), cache_dir=str(tmp_path)), tmp_path / "known"
    made = load_corpus(config, show_progress=False)
    known.rename(tmp_path / "moved")
    known.touch()  # where no folder can be made
    assert load_corpus(config, show_progress=False).sources[0].folder == made.sources[0].folder


def test_cache_that_cannot_be_made_names_its_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be " * 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a.txt"))
    with pytest.raises(FundamentaLLMError, match=r"data\.cache_dir"):
        load_corpus(DataConfig(str(tmp_path / "a.txt")), show_progress=False)
