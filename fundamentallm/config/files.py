"""The files and folders that settings name, and what is wrong with them."""

from __future__ import annotations

import collections
import glob
import os
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from fundamentallm.config.registry import did_you_mean
from fundamentallm.config.schema import BUILT_IN_CORPUS, Config, DataConfig
from fundamentallm.config.validation import expand_user
from fundamentallm.errors import ConfigError, Problem

DATASETS = "datasets:"
"""Prefix of a source that the datasets library opens."""
PREPARED = ("meta.json", "tokenizer.json", "train.bin", "validation.bin")
"""Files of a prepared source."""
ROWS, TOKENS = (".jsonl", ".jsonlines", ".jl", ".ndjson", ".json", ".parquet"), (".bin", ".npy")
"""Suffixes of files with rows of fields, and of files with tokens."""
NOT_TEXT = (
    ".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro", ".xls", ".xlsx", ".ods", ".db", ".sqlite", ".sqlite3",
    ".h5", ".hdf5", ".npz", ".pkl", ".pickle", ".pt", ".pth", ".safetensors", ".gz", ".tgz", ".bz2", ".xz", ".zst",
    ".zip", ".7z", ".rar", ".tar", ".pdf", ".doc", ".docx", ".odt", ".epub",
    ".ipynb",
)  # fmt: skip
"""Suffixes of files that are refused, although some could be decoded as text. Files with any other suffix are text."""
ENDINGS = 5
"""Suffixes of left out files that are named."""


NO_TRAINING = 1e-18
"""The `train_split` that leaves no character for training."""


class SourceFiles(NamedTuple):
    """A `data.source`, resolved."""

    name: str
    kind: str
    """'prepared', 'built-in', 'dataset', 'rows', 'tokens' or 'text'."""
    files: list[Path]
    """The files, sorted; the folder of a prepared source; empty for a dataset."""
    left_out: str = ""
    """Number of files of the folder that are not read, by reason."""


def is_prepared(source: str) -> bool:
    """Returns whether a source is a folder that `fundamentallm prepare` made."""
    return all(os.path.isfile(os.path.join(expand_user(source), name)) for name in PREPARED)


def row_fields(data: DataConfig) -> dict[str, str]:
    """Returns the fields that are read from each row, by the settings that name them; the prompt comes first."""
    if data.messages_field is not None:
        return {"data.messages_field": data.messages_field}
    prompt = {} if data.prompt_field is None else {"data.prompt_field": data.prompt_field}
    return {**prompt, "data.text_field": data.text_field}


def are_samples(data: DataConfig) -> bool:
    """Returns whether each row is a sample of its own: a prompt with its answer, or a chat."""
    return data.prompt_field is not None or data.messages_field is not None


def _field_problems(data: DataConfig) -> Iterator[Problem]:
    """Yields what does not fit `data.messages_field`, or lacks it."""
    if data.messages_field is None:
        if data.chat_template and data.prompt_field is None:
            yield Problem("data.chat_template", True, "null, or with a data.prompt_field or data.messages_field")
        return
    allowed = {"prompt_field": (None,), "text_field": (DataConfig.text_field,), "chat_template": (None, True)}
    for name in allowed:
        if (value := getattr(data, name)) not in allowed[name]:
            reason = f"and data.messages_field is {data.messages_field!r}"
            yield Problem(f"data.{name}", value, "", "Omit one of them.", reason)


def validation_only(data: DataConfig) -> DataConfig | None:
    """Returns the settings that read all of `validation_source` for validation; None if there is none."""
    if data.validation_source is None:
        return None
    settings: dict[str, Any] = dict.fromkeys(("validation_source", "shuffle_buffer", "validation_tokens"))
    settings |= {"source": data.validation_source, "train_split": NO_TRAINING, "streaming": False}
    return replace(data, **settings)


def find_sources(data: DataConfig) -> list[SourceFiles]:
    """Looks up the files of all sources.

    Raises:
        ConfigError: listing missing files, and files that do not fit together or the settings.
    """
    found, problems = list[SourceFiles](), list(_field_problems(data))
    for name in data.sources():
        try:
            found.append(find_source(data, name))
        except ConfigError as error:
            problems += error.problems
    has_rows = {source.kind for source in found} & {"rows", "dataset", "prepared"}  # prepared from rows, perhaps
    is_validation = data.train_split == NO_TRAINING  # the field is that of the training source
    if not problems and data.text_field != DataConfig.text_field and not (has_rows or is_validation):
        allowed, reason = f"with rows ({', '.join(ROWS)} or {DATASETS}NAME)", f"but data.source is {data.source!r}"
        problems.append(Problem("data.text_field", data.text_field, allowed, "Leave it out, or name rows.", reason))
    if problems:
        raise ConfigError(problems)
    return found


def find_source(data: DataConfig, name: str) -> SourceFiles:
    """Looks up the files of one source.

    A folder means every visible file below it with one of `data.suffixes`, in any case.

    Raises:
        ConfigError: if there are no files, they do not fit together or the settings, or reading might not end.
    """
    if is_prepared(name):
        return SourceFiles(name, "prepared", [Path(expand_user(name))])
    if name == BUILT_IN_CORPUS:
        topics = Path(str(find_spec("pydoc_data.topics").origin))  # type: ignore[union-attr]
        if problems := _kind_problems(data, name, [topics]):
            raise ConfigError(problems)
        return SourceFiles(name, "built-in", [topics])
    if name.startswith(DATASETS):
        return SourceFiles(name, "dataset", [])
    path, left_out = expand_user(name), collections.Counter[str]()
    if os.path.isdir(path):
        suffixes, found = tuple(suffix.lower() for suffix in data.suffixes), []
        for file in _walk(name, path, left_out):
            if file.lower().endswith(suffixes):
                found.append(file)
            else:
                left_out[os.path.splitext(file)[1] or "without suffix"] += 1
        reason = f"which has no {' or '.join(data.suffixes)} files"
        advice = "data.suffixes chooses the files of a folder."
        problem = Problem("data.source", name, advice=advice, reason=reason)
    else:
        found = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
        allowed = f"a file, a folder, a glob, {DATASETS}NAME, or {BUILT_IN_CORPUS!r}"
        advice, text = did_you_mean(name, [BUILT_IN_CORPUS]), f"file {name!r} not found"
        problem = Problem("data.source", name, allowed, advice, text=text)
    regular = sorted(filter(os.path.isfile, found), reverse=True)
    left_out["folders and special files"] += len(found) - len(regular)
    files = sorted({os.path.realpath(file): Path(file) for file in regular}.values())  # links may lead to one twice
    if problems := _kind_problems(data, name, files) if files else [problem]:
        raise ConfigError(problems)
    others = ", ".join(f"{count:,} {why}" for why, count in left_out.most_common(ENDINGS) if count)
    return SourceFiles(name, kind_of_file(files[0]), files, others)


def kind_of_file(file: Path) -> str:
    """Returns what a file holds, by its suffix: 'rows', 'tokens', 'text' or 'no text'."""
    suffix, kinds = file.suffix.lower(), {"rows": ROWS, "tokens": TOKENS, "no text": NOT_TEXT}
    return next((kind for kind, suffixes in kinds.items() if suffix in suffixes), "text")


def _walk(source: str, root: str, left_out: collections.Counter[str]) -> Iterator[str]:
    """Yields all visible files below a folder. Each folder is read once, since links may form circles."""

    def refuse(error: OSError) -> None:  # os.walk would skip the folder silently
        reason = f"but {error.filename} cannot be read ({error.strerror})"
        raise ConfigError(Problem("data.source", source, reason=reason))

    seen = set[str]()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        left_out["hidden"] += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(folder, name) for name in names if not name.startswith("."))


def _kind_problems(data: DataConfig, name: str, files: list[Path]) -> list[Problem]:
    """Returns what does not fit in the kinds of a source's files: with each other, or with the settings."""
    kinds = set(map(kind_of_file, files))
    reason = f"which holds {' and '.join(sorted(kinds))}"
    if "no text" in kinds:
        suffixes = {file.suffix for file in files if kind_of_file(file) == "no text"}
        allowed, reason = f"text, {', '.join(ROWS + TOKENS)}", f"which has {', '.join(sorted(suffixes))} files"
        advice = f"Convert or unpack them, or try {DATASETS}BUILDER,data_files=FILE (such as {DATASETS}csv)."
        return [Problem("data.source", name, allowed, advice, reason)]
    if len(kinds) > 1:
        return [Problem("data.source", name, "files of one kind", "Name them as several sources.", reason)]
    if kinds <= {"rows"}:
        return []
    if are_samples(data):
        setting = next(iter(row_fields(data)))
        allowed = f"with {setting}, rows ({', '.join(ROWS)} or {DATASETS}NAME)"
        return [Problem("data.source", name, allowed, f"Set {setting} to null.", reason)]
    if kinds == {"tokens"} and not data.tokenizer.endswith(".json"):
        advice = "Set data.tokenizer to the tokenizer.json that made the tokens."
        return [Problem("data.source", name, "", advice, f"{reason}, and tokenizer is {data.tokenizer!r}")]
    return []


def _folder_problems(setting: str, path: str | None) -> list[Problem]:
    """Returns the problem with a folder to be made: it, or a parent, is something else."""
    if path is None:
        return []
    absolute = Path(expand_user(path)).absolute()
    existing = next(folder for folder in (absolute, *absolute.parents) if os.path.lexists(folder))
    return [] if existing.is_dir() else [Problem(setting, path, reason="which is not a folder", advice="Give another.")]


def _renamed(problem: Problem, setting: str) -> Problem:
    """Returns a problem of `data.source` as one of `setting`."""
    name = setting if problem.setting == "data.source" else problem.setting
    return Problem(name, problem.value, problem.allowed, problem.advice, problem.reason, problem.text)


def file_problems(config: Config) -> list[Problem]:
    """Returns what is wrong with the files and folders of a run. Creates none."""
    data, problems = config.data, list[Problem]()
    if data.tokenizer.endswith(".json") and not os.path.isfile(expand_user(data.tokenizer)):
        problems.append(Problem("data.tokenizer", data.tokenizer, text=f"file {data.tokenizer!r} not found"))
    for each, setting in ((data, "data.source"), (validation_only(data), "data.validation_source")):
        try:
            found = [] if each is None else find_sources(each)
        except ConfigError as error:
            problems += [_renamed(problem, setting) for problem in error.problems]
            continue
        if data.streaming and each is data and found[0].kind in ("tokens", "prepared"):
            reason = f"and {found[0].name} holds tokens already, which are not loaded before they are used"
            problems.append(Problem("data.streaming", True, "false", reason=reason))
    problems += _folder_problems("data.cache_dir", data.cache_dir)
    problems += _folder_problems("output_dir", config.output_dir)
    problems += _folder_problems("training.checkpoint_dir", config.training.checkpoint_dir)
    # A resumed run takes its weights from its own newest checkpoint, and the one it started from may be gone.
    own = os.path.join(glob.escape(config.folder_of_checkpoints()), "*", "manifest.json")
    has_own = glob.glob(own)
    initial = {"model.init_from": config.model.init_from, "training.resume": config.training.resume}
    for name, folder in initial.items():
        if folder in (None, "auto", "never") or has_own:
            continue
        if not os.path.isfile(os.path.join(expand_user(folder), "manifest.json")):
            advice, reason = "Give a checkpoint's folder.", "which is not a checkpoint"
            problems.append(Problem(name, folder, advice=advice, reason=reason))
    return problems
