"""Sources: every kind of file gives its documents, what cannot be read is counted and named, and an encoding that was
broken off goes on to the same tokens.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fundamentallm.commands import prepare
from fundamentallm.config.files import data_problems
from fundamentallm.config.schema import DataConfig
from fundamentallm.data import encoding, sources
from fundamentallm.data.corpus import Corpus, load_corpus
from fundamentallm.errors import ConfigError

END = "<|endoftext|>"
DOCUMENTS = [
    "first\ndocument",
    "zweites Dökument",
    "x" * 30,
    "漢字 and 🙂",
    "ends with a new line\n",
    f"has {END} in it",
] * 5


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> None:
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()


def write_rows(path: Path, rows: Sequence[Any]) -> str:
    """As JSON lines; text is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def load(folder: Path, source: str | dict[str, float], **settings: Any) -> Corpus:
    defaults = {"tokenizer": "byte", "end_of_text": END, "train_split": 0.7, "cache_dir": str(folder / "cache")}
    return load_corpus(DataConfig(source=source, **{**defaults, **settings}), show_progress=False)


def decode(corpus: Corpus) -> str:
    tokens = np.concatenate([corpus.train, corpus.validation]).tolist()
    return str(corpus.tokenizer.decode(tokens, skip_special_tokens=False))


def as_jsonl(folder: Path) -> str:
    return write_rows(folder / "a.jsonl", [{"text": text, "n": n} for n, text in enumerate(DOCUMENTS)])


def as_parquet(folder: Path) -> str:
    table = pyarrow.table({"n": list(range(len(DOCUMENTS))), "text": DOCUMENTS})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=7)
    return str(folder / "a.parquet")


def as_texts(folder: Path) -> str:
    (folder / "tree" / "sub").mkdir(parents=True)
    for number, text in enumerate(DOCUMENTS):
        (folder / "tree" / ("sub" if number > 9 else "") / f"{number:02d}.py").write_bytes(text.encode())
    return str(folder / "tree")


def as_dataset(folder: Path) -> str:
    return f"datasets:parquet,data_files={as_parquet(folder)}"


def as_saved_dataset(folder: Path) -> str:
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(folder / "saved")
    return f"datasets:{folder / 'saved'}"


def as_saved_splits(folder: Path) -> str:
    splits = {"train": datasets.Dataset.from_dict({"text": DOCUMENTS}), "other": datasets.Dataset.from_dict({"x": [1]})}
    datasets.DatasetDict(splits).save_to_disk(folder / "splits")
    return f"datasets:{folder / 'splits'},split=train"


def as_capitals(folder: Path) -> str:
    return str(Path(as_jsonl(folder)).rename(folder / "A.JSONL"))


KINDS: list[Callable[[Path], str]] = [
    as_jsonl,
    as_capitals,
    as_parquet,
    as_texts,
    as_dataset,
    as_saved_dataset,
    as_saved_splits,
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_its_documents_each_with_the_end_of_text_token(tmp_path: Path, kind: Any) -> None:
    corpus = load(tmp_path, kind(tmp_path), suffixes=[".py"])
    assert decode(corpus) == "".join(text + END for text in DOCUMENTS)
    tokens, end = np.concatenate([corpus.train, corpus.validation]), corpus.end_of_text
    assert corpus.tokenizer.id_to_token(end) == END
    assert (tokens == end).sum() == len(DOCUMENTS)  # what is written out in a text is text
    assert 0.6 < len(corpus.train) / len(tokens) < 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_end_of_text_token_documents_are_one_text(tmp_path: Path, kind: Any) -> None:
    corpus = load(tmp_path, kind(tmp_path), suffixes=[".py"], end_of_text=None)
    assert decode(corpus) == "\n\n".join(DOCUMENTS)


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:270"])
def test_bits_per_byte_counts_the_bytes_of_the_text_alone(tmp_path: Path, tokenizer: str) -> None:
    corpus = load(tmp_path, as_jsonl(tmp_path), tokenizer=tokenizer)
    targets = corpus.validation[1:]
    text = corpus.tokenizer.decode(targets[targets != corpus.end_of_text].tolist(), skip_special_tokens=False)
    first = corpus.tokenizer.decode(corpus.validation[:1].tolist())
    assert corpus.validation_bytes == len(text.encode()) > 100
    assert first != END
    sizes = {"char": len(set("".join(DOCUMENTS))) + 2, "byte": 257, "bpe:270": 270}
    assert corpus.tokenizer.get_vocab_size() == sizes[tokenizer]


# ---- bad rows -----------------------------------------------------------------------------------------------

BAD = {
    "{oops": "is no JSON",
    "[1]": "is a list, no object",
    '{"text": 3}': "has '3' for 'text', which is no text",
    '{"text": null}': "has 'None' for 'text', which is no text",
    '{"tixt": "a"}': "has no field 'text', but 'tixt'",
    '{"text": "\\ud800"}': "half a character",
}


def test_bad_rows_are_counted_and_named_and_the_rest_is_there(tmp_path: Path) -> None:
    good = [{"text": text} for text in DOCUMENTS]
    path = write_rows(tmp_path / "a.jsonl", [*good[:9], *BAD, "", {"text": ""}, *good[9:]])
    corpus = load(tmp_path, path, max_bad_rows=len(BAD))
    assert decode(corpus) == "".join(text + END for text in DOCUMENTS)
    (source,) = corpus.sources
    assert source.bad_rows == len(BAD)
    named = (source.folder / "bad_rows.txt").read_text().splitlines()
    for number, (line, why) in enumerate(zip(named, BAD.values(), strict=True), start=10):
        assert f"a.jsonl, line {number} " in line
        assert why in line


@pytest.mark.parametrize("row", BAD)
def test_one_bad_row_more_than_allowed_is_an_error_that_names_it(tmp_path: Path, row: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a" * 99}, row, {"text": "b"}])
    with pytest.raises(ConfigError, match=r"line 2 .*data\.max_bad_rows = 0") as error:
        load(tmp_path, path)
    assert BAD[row] in str(error.value)
    assert not list((tmp_path / "cache").glob("*")) or [p.name for p in (tmp_path / "cache").iterdir()] == ["known"]


def test_a_file_that_is_no_text_is_left_out_where_that_is_allowed(tmp_path: Path) -> None:
    source = as_texts(tmp_path)
    (tmp_path / "tree" / "00a.py").write_bytes(b"good\n" * 30_000 + b"\xff")
    corpus = load(tmp_path, source, suffixes=[".py"], max_bad_rows=1)
    assert decode(corpus) == "".join(text + END for text in DOCUMENTS)
    assert "00a.py is not UTF-8" in (corpus.sources[0].folder / "bad_rows.txt").read_text()
    with pytest.raises(ConfigError, match=r"00a\.py.*not UTF-8"):
        load(tmp_path, source, suffixes=[".py"])


@pytest.mark.parametrize("kind", [as_parquet, as_dataset])
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(ConfigError, match=r"text_field is 'body'.*'n', 'text'"):
        load(tmp_path, kind(tmp_path), text_field="body")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("datasets:/nowhere/at_all", "datasets cannot open"),
        ("datasets:json,files=x", r"allowed: datasets:NAME.*data_files"),
    ],
)
def test_what_datasets_cannot_open_is_named(tmp_path: Path, source: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, source)


@pytest.mark.parametrize(("kind", "module"), [(as_parquet, "pyarrow"), (as_saved_dataset, "datasets")])
def test_a_library_that_is_not_there_is_an_error_that_names_the_extra(
    tmp_path: Path, kind: Any, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = kind(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"fundamentallm\[data\]"):
        load(tmp_path, source)


# ---- tokens that are there already --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.bin", "x.npy"])
def test_tokens_are_taken_as_they_are(tmp_path: Path, name: str) -> None:
    made = load(tmp_path, as_jsonl(tmp_path), tokenizer="bpe:300")
    tokenizer = str(made.sources[0].folder / "tokenizer.json")
    tokens = np.concatenate([made.train, made.validation])
    if name == "x.bin":
        tokens.tofile(tmp_path / name)
    else:
        np.save(tmp_path / name, tokens.astype(np.int64))
    corpus = load(tmp_path, str(tmp_path / name), tokenizer=tokenizer)
    cut = int(len(tokens) * 0.7)
    assert corpus.train.tolist() == tokens[:cut].tolist()
    assert corpus.validation.tolist() == tokens[cut:].tolist()
    text = corpus.tokenizer.decode([t for t in tokens[cut + 1 :].tolist() if t != corpus.end_of_text])
    assert abs(corpus.validation_bytes - len(text.encode())) <= 6  # the cut may go through a character


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.arange(400), "tokens from 0 to 399; allowed: 0 to 256"),
        (-np.arange(9), "tokens from -8 to 0"),
        (np.ones((3, 3), np.int64), r"shape \(3, 3\)"),
        (np.ones(9), "float64"),
    ],
)
def test_what_are_no_tokens_of_the_vocabulary_is_refused(tmp_path: Path, array: Any, says: str) -> None:
    tokenizer = str(load(tmp_path, as_jsonl(tmp_path)).sources[0].folder / "tokenizer.json")
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, str(tmp_path / "x.npy"), tokenizer=tokenizer)


@pytest.mark.parametrize("wider", [np.uint32, np.int64])
def test_integers_of_another_width_are_not_read_as_tokens(tmp_path: Path, wider: Any) -> None:
    tokenizer = str(load(tmp_path, as_jsonl(tmp_path)).sources[0].folder / "tokenizer.json")
    np.arange(1, 200).astype(wider).tofile(tmp_path / "x.bin")
    with pytest.raises(ConfigError, match="every second token of type uint16 is 0"):
        load(tmp_path, str(tmp_path / "x.bin"), tokenizer=tokenizer)


def test_contradictions_of_source_and_settings_are_found_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text" * 99)
    np.save(tmp_path / "a.npy", np.arange(9))
    text, tokens = str(tmp_path / "a.txt"), str(tmp_path / "a.npy")
    pairs = {"prompt_field": "q", "end_of_text": END, "sequence_length": 8}
    assert "prompt_field" in str(data_problems(DataConfig(text, **pairs)))
    assert "tokenizer.json" in str(data_problems(DataConfig(tokens)))
    assert "of one kind" in str(data_problems(DataConfig(str(tmp_path / "*"))))
    for wrong in ({"prompt_field": "q"}, {"mask_documents": True}, {"source": {"a.txt": 0.0}}, {"source": {}}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            DataConfig(**wrong)


# ---- going on, and prepared folders -------------------------------------------------------------------------


class Killed(Exception):
    """As a kill would."""


@pytest.mark.parametrize(
    "kind", [as_jsonl, as_parquet, as_saved_dataset, as_texts, "one text", "rows as one text", "pairs"]
)
def test_an_encoding_that_was_broken_off_goes_on_to_the_same_tokens(
    tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE", 16)
    monkeypatch.setattr(encoding, "PIECES_AT_ONCE", 2)
    monkeypatch.setattr(encoding, "ROWS_AT_ONCE", 2)
    settings: dict[str, Any] = {"suffixes": [".py"], "tokenizer": "bpe:280"}
    if kind == "one text":
        source = str(tmp_path / "a.txt")
        Path(source).write_text("\n".join(DOCUMENTS))
        settings["end_of_text"] = None
    elif kind == "rows as one text":
        source, settings["end_of_text"] = as_jsonl(tmp_path), None
    elif kind == "pairs":
        settings["prompt_field"] = "question"
        rows = [{"question": f"q{n} ", "text": text} for n, text in enumerate(DOCUMENTS)]
        source = write_rows(tmp_path / "pairs.jsonl", rows)
    else:
        source = kind(tmp_path)
    expected = load(tmp_path / "whole", source, **settings)

    written, real = [], encoding._write_note

    def dies(note: Any, files: Any, staging: Path) -> None:
        real(note, files, staging)
        written.append(note.done)
        for file in files:  # what is not noted, and half of something
            file.write(b"\0\0\0")
        raise Killed

    monkeypatch.setattr(encoding, "NOTED_EVERY", 60)
    monkeypatch.setattr(encoding, "_write_note", dies)
    while True:
        try:
            corpus = load(tmp_path, source, **settings)
            break
        except Killed:
            assert len(written) < 100
    assert len(written) > 3
    assert written == sorted(set(written))  # each start went on where the last one was
    for name in sorted(path.name for path in expected.sources[0].folder.iterdir()):
        assert (corpus.sources[0].folder / name).read_bytes() == (expected.sources[0].folder / name).read_bytes(), name


def test_a_prepared_folder_is_a_source_anywhere_with_the_settings_it_was_made_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = as_jsonl(tmp_path)
    settings = {
        "source": source,
        "tokenizer": "bpe:300",
        "end_of_text": END,
        "cache_dir": "cache",
        "sequence_length": 8,
    }
    words = [word for name, value in settings.items() for word in (f"--data.{name}", str(value))]
    assert prepare.main(words, "fundamentallm prepare") == 0
    config = DataConfig(**settings)
    made = load_corpus(config, show_progress=False)
    folder = made.sources[0].folder
    assert f"is prepared in {folder}" in capsys.readouterr().out
    shutil.copytree(folder, tmp_path / "moved")
    os.remove(source)
    shutil.rmtree("cache")
    moved = load_corpus(dataclasses.replace(config, source="moved"), show_progress=False)
    assert decode(moved) == decode(made)
    with pytest.raises(ConfigError) as error:
        load_corpus(DataConfig(source="moved", train_split=0.5))
    assert {problem.split()[0] for problem in error.value.problems} == {"tokenizer", "train_split", "end_of_text"}


def test_from_python_too_files_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "b.txt"
    text.write_text("text")
    with pytest.raises(ConfigError, match="prompt_field"):
        load(tmp_path, str(text), prompt_field="question")
    as_jsonl(tmp_path)
    with pytest.raises(ConfigError, match="rows and text"):
        load(tmp_path, str(tmp_path), suffixes=[".txt", ".jsonl"])


def test_a_tokenizer_is_shared_by_all_sources_and_each_is_encoded_once(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", [{"text": "abc" * 40}])
    two = write_rows(tmp_path / "two.jsonl", [{"text": "xyz" * 40}])
    corpus = load(tmp_path, {one: 1.0, two: 3.0}, tokenizer="char")
    assert corpus.tokenizer.get_vocab_size() == 6 + 2
    assert [source.weight for source in corpus.sources] == [1.0, 3.0]
    with pytest.raises(ConfigError, match="the corpus has 2 sources"):
        _ = corpus.train
    inodes = [(source.folder / "train.bin").stat().st_ino for source in corpus.sources]
    again = load(tmp_path, {one: 5.0, two: 3.0}, tokenizer="char")
    assert [(source.folder / "train.bin").stat().st_ino for source in again.sources] == inodes


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = as_jsonl(tmp_path)
    real = encoding.read_source

    def shorter(*arguments: Any) -> Any:
        write_rows(Path(source), [{"text": text} for text in DOCUMENTS[:-1]])
        return real(*arguments)

    monkeypatch.setattr(encoding, "read_source", shorter)
    with pytest.raises(ConfigError, match="changed while it was read"):
        load(tmp_path, source)
    monkeypatch.undo()
    assert decode(load(tmp_path, source)) == "".join(text + END for text in DOCUMENTS[:-1])
