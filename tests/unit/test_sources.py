"""Sources: every kind gives its documents, bad rows are counted and named, prepared folders can be moved."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fundamentallm.commands import prepare
from fundamentallm.config.schema import BUILT_IN_CORPUS, DataConfig
from fundamentallm.data import encoding, sources
from fundamentallm.data.corpus import Corpus, describe, load_corpus
from fundamentallm.errors import ConfigError
from tests.conftest import problem_of
from tests.unit.test_corpus import flip

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


def tokens_of(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    (source,) = corpus.sources
    return source.train.ids, source.validation.ids


def decode(corpus: Corpus) -> str:
    tokens = np.concatenate(tokens_of(corpus)).tolist()
    return str(corpus.tokenizer.decode(tokens, skip_special_tokens=False))


def as_jsonl(folder: Path) -> str:
    return write_rows(folder / "a.jsonl", [{"text": text, "n": n} for n, text in enumerate(DOCUMENTS)])


def as_json_list(folder: Path) -> str:
    rows = [{"n": n, "text": text} for n, text in enumerate(DOCUMENTS)]
    (folder / "a.JSON").write_text("\ufeff\n" + json.dumps(rows, indent=1), encoding="utf-8")
    return str(folder / "a.JSON")


def as_json_lines(folder: Path) -> str:
    return str(Path(as_jsonl(folder)).rename(folder / "a.json"))


def as_links(folder: Path) -> str:
    """A folder whose files are behind links to folders, which form a circle."""
    tree = Path(as_texts(folder))
    (tree / "sub" / "back").symlink_to(tree)
    (folder / "linked").mkdir()
    for name in ("a", "b"):
        (folder / "linked" / name).symlink_to(tree)
    return str(folder / "linked")


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


KINDS = [as_jsonl, as_json_list, as_json_lines, as_parquet, as_texts, as_links]
KINDS += [as_dataset, as_saved_dataset, as_saved_splits]


@pytest.mark.parametrize("kind", KINDS)
def test_load_corpus_reads_the_documents_of_every_kind(tmp_path: Path, kind: Any) -> None:
    source = kind(tmp_path)
    assert decode(load(tmp_path, source, suffixes=[".py"], end_of_text=None)) == "\n\n".join(DOCUMENTS)
    corpus = load(tmp_path, source, suffixes=[".py"])
    assert decode(corpus) == "".join(text + END for text in DOCUMENTS)
    tokens, end = np.concatenate(tokens_of(corpus)), corpus.end_of_text
    assert corpus.tokenizer.id_to_token(end) == END
    assert (tokens == end).sum() == len(DOCUMENTS)  # what is written out in a text is text


@pytest.mark.parametrize("tokenizer", ["char", "bpe:270"])
def test_validation_bytes_exclude_end_of_text(tmp_path: Path, tokenizer: str) -> None:
    corpus = load(tmp_path, as_jsonl(tmp_path), tokenizer=tokenizer)
    validation = corpus.sources[0].validation
    targets = validation.ids[1:]
    text = corpus.tokenizer.decode(targets[targets != corpus.end_of_text].tolist(), skip_special_tokens=False)
    assert validation.num_bytes == len(text.encode()) > 100


def test_folder_reports_the_files_that_it_leaves_out(tmp_path: Path) -> None:
    folder = Path(as_texts(tmp_path))
    for name in ("b.md", "c.md", "d", ".hidden/e.py", ".f.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("left out")
    (folder / "A.PY").write_text("read")
    (folder / "gone.py").symlink_to(folder / "nothing")
    corpus = load(tmp_path, str(folder), suffixes=[".py"], train_split=0.99)
    assert f"read{END}" in decode(corpus)
    assert "left out" not in decode(corpus)
    left_out = corpus.sources[0].left_out
    assert left_out.startswith("6 files ")
    assert any(left_out in line for line in describe(corpus))


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffsome words" * 2, encoding="utf-8")
    assert decode(load(tmp_path, str(tmp_path / "a.txt"), end_of_text=None)) == "some words\ufeffsome words"


def test_long_row_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONG", 20)
    monkeypatch.setattr(sources, "PIECE", 8)
    longest, real = [], encoding.encode_pieces

    def encode(tokenizer: Any, pieces: Any, *options: Any) -> Any:
        pieces = list(pieces)
        longest.append(max(map(len, pieces)))
        return real(tokenizer, pieces, *options)

    monkeypatch.setattr(encoding, "encode_pieces", encode)
    assert decode(load(tmp_path, as_jsonl(tmp_path))) == "".join(text + END for text in DOCUMENTS)
    assert longest[0] <= 20


# ---- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.gz", "a.XLSX"])
def test_file_that_is_neither_text_nor_rows_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text\nto be or not to be")
    for source in (tmp_path / name, tmp_path / "a.*"):
        problem = problem_of(load, tmp_path, str(source), text_field="output")
        assert problem.setting == "data.source"
        assert Path(name).suffix in problem.reason


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16"])  # without and with a byte order mark
def test_text_in_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(("good\n" * 30_000 + "тоже\n").encode(encoding))
    (tmp_path / "b.txt").write_text("good\n" * 30)
    problem = problem_of(load, tmp_path, str(tmp_path), suffixes=[".txt"])
    assert (problem.setting, "a.txt" in problem.reason) == ("data.source", True)
    assert load(tmp_path, str(tmp_path), suffixes=[".txt"], max_bad_rows=1).sources[0].bad_rows == 1


def test_json_lines_with_the_suffix_of_a_text_are_refused(tmp_path: Path) -> None:
    path = Path(as_jsonl(tmp_path)).rename(tmp_path / "a.jsonl.txt")
    problem = problem_of(load, tmp_path, str(path))
    assert (problem.setting, ".jsonl" in problem.advice) == ("data.source", True)
    path.write_text('{"text": 3}\nThis line is the JSON that the text is about.\n' * 9)
    assert decode(load(tmp_path, str(path), end_of_text=None)) == path.read_text()


def test_text_field_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be " * 9)
    text, rows = str(tmp_path / "a.txt"), write_rows(tmp_path / "a.jsonl", [{"output": "abc" * 40}])
    assert problem_of(load, tmp_path, text, text_field="output").setting == "data.text_field"
    assert problem_of(load, tmp_path, BUILT_IN_CORPUS, text_field="output").setting == "data.text_field"
    assert len(load(tmp_path, {text: 1.0, rows: 1.0}, text_field="output").sources) == 2


@pytest.mark.parametrize("source", ["/dev/zero", "/dev", "pipe"])
def test_source_that_might_never_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    assert problem_of(load, tmp_path, source).setting == "data.source"


def test_dataset_that_is_unpickled_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "ran").encode())
    problem = problem_of(load, tmp_path, f"datasets:pandas,data_files={path}")
    assert (problem.setting, "run code" in problem.reason) == ("data.source", True)
    assert not (tmp_path / "ran").exists()


# ---- bad rows -----------------------------------------------------------------------------------------------


def test_a_json_list_that_is_damaged_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"}, ')
    assert "a.json" in problem_of(load, tmp_path, str(tmp_path / "a.json")).reason
    (tmp_path / "a.json").write_text('[{"text": "to be or not"}, 3]')
    assert load(tmp_path, str(tmp_path / "a.json"), max_bad_rows=1).sources[0].bad_rows == 1


BAD = {
    "{oops": "is not JSON",
    "[1]": "is a list",
    '{"text": 3}': "has '3' for 'text'",
    '{"text": null}': "has 'None' for 'text'",
    '{"tixt": "a"}': "has no field 'text', only 'tixt'",
    '{"text": "\\ud800"}': "surrogates",  # half a character
}


def test_bad_rows_are_skipped_and_listed(tmp_path: Path) -> None:
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
    problem = problem_of(load, tmp_path, path)
    assert (problem.setting, problem.value) == ("data.source", path)
    assert "line 10 is not JSON" in problem.reason
    assert "data.max_bad_rows = 0" in problem.allowed


@pytest.mark.parametrize("kind", [as_parquet, as_dataset])
def test_a_missing_column_is_named_with_the_others(tmp_path: Path, kind: Any) -> None:
    problem = problem_of(load, tmp_path, kind(tmp_path), text_field="body")
    assert problem.setting == "data.source"
    assert "'body', only 'n', 'text'" in problem.reason


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_a_missing_library_names_the_extra(tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = as_parquet(tmp_path) if module == "pyarrow" else "datasets:/nowhere"
    monkeypatch.setitem(sys.modules, module, None)
    problem = problem_of(load, tmp_path, source)
    assert (problem.value, "the extra data" in problem.reason) == (source, True)


# ---- files of tokens --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.bin", "x.npy"])
def test_token_files_are_copied(tmp_path: Path, name: str) -> None:
    made = load(tmp_path, as_jsonl(tmp_path), tokenizer="bpe:300")
    tokens = np.concatenate(tokens_of(made))
    np.save(tmp_path / "x.npy", tokens.astype(np.int64))
    tokens.tofile(tmp_path / "x.bin")
    corpus = load(tmp_path, str(tmp_path / name), tokenizer=str(made.sources[0].folder / "tokenizer.json"))
    cut = int(len(tokens) * 0.7)
    assert [part.tolist() for part in tokens_of(corpus)] == [tokens[:cut].tolist(), tokens[cut:].tolist()]
    text = corpus.tokenizer.decode([t for t in tokens[cut + 1 :].tolist() if t != corpus.end_of_text])
    assert abs(corpus.sources[0].validation.num_bytes - len(text.encode())) <= 6  # the cut may go through a character


def test_token_files_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    tokenizer = str(load(tmp_path, as_jsonl(tmp_path)).sources[0].folder / "tokenizer.json")
    np.arange(1, 200).astype(np.uint32).tofile(tmp_path / "x.bin")
    assert "uint16" in problem_of(load, tmp_path, str(tmp_path / "x.bin"), tokenizer=tokenizer).reason
    wrong = {"tokens from 0 to 399": np.arange(400), "(3, 3)": np.ones((3, 3), np.int64), "float64": np.ones(9)}
    for says, array in wrong.items():
        np.save(tmp_path / "x.npy", array)
        assert says in problem_of(load, tmp_path, str(tmp_path / "x.npy"), tokenizer=tokenizer).reason


def test_source_kinds_have_to_fit_the_settings(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text" * 99)
    np.save(tmp_path / "a.npy", np.arange(9))
    text, tokens = str(tmp_path / "a.txt"), str(tmp_path / "a.npy")
    settings: dict[str, dict[str, Any]] = {text: {"prompt_field": "q"}, tokens: {}, str(tmp_path / "*.*"): {}}
    for source, further in settings.items():
        problem = problem_of(load, tmp_path, source, **further)
        assert (problem.setting, problem.value) == ("data.source", source)


# ---- prepared folders and several sources ------------------------------------------------------------------


def test_a_prepared_folder_can_be_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = as_jsonl(tmp_path)
    settings = {"source": source, "tokenizer": "bpe:300", "end_of_text": END, "cache_dir": "cache"}
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
    flip(tmp_path / "moved" / "train.bin")
    assert problem_of(load_corpus, dataclasses.replace(config, source="moved")).setting == "data.source"
    flip(tmp_path / "moved" / "train.bin")
    with pytest.raises(ConfigError) as error:
        load_corpus(DataConfig(source="moved", train_split=0.5))
    names = {"data.tokenizer", "data.train_split", "data.end_of_text"}
    assert {problem.setting for problem in error.value.problems} == names


def test_folder_prepared_without_an_end_of_text_opens_by_default(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "one.jsonl", [{"text": "abc def" * 40}] * 9)
    made = load(tmp_path, source, tokenizer="bpe:300", end_of_text=None)
    folder = str(made.sources[0].folder)
    opened = load(tmp_path, folder, tokenizer="bpe:300", end_of_text="auto")
    assert (opened.end_of_text, decode(opened)) == (None, decode(made))
    assert load(tmp_path, source, tokenizer="bpe:300", end_of_text="auto").end_of_text is not None
    settings = {"tokenizer": "bpe:300", "end_of_text": "auto", "mask_documents": True}
    assert problem_of(load, tmp_path, folder, **settings).setting == "mask_documents"


def test_several_sources_use_one_tokenizer(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", [{"text": "abc" * 40}])
    two = write_rows(tmp_path / "two.jsonl", [{"text": "xyz" * 40}])
    corpus = load(tmp_path, {one: 1.0, two: 3.0}, tokenizer="char")
    assert corpus.tokenizer.get_vocab_size() == 6 + 2
    assert [source.weight for source in corpus.sources] == [1.0, 3.0]
    inodes = [(source.folder / "train.bin").stat().st_ino for source in corpus.sources]
    again = load(tmp_path, {one: 5.0, two: 3.0}, tokenizer="char")
    assert [(source.folder / "train.bin").stat().st_ino for source in again.sources] == inodes
