"""The files and folders that settings name, and what is wrong with them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from fundamentallm.config.registry import did_you_mean
from fundamentallm.config.schema import BUILT_IN_CORPUS, Config, DataConfig
from fundamentallm.config.validation import expand_user
from fundamentallm.errors import ConfigError, Problem

DATASETS = "datasets:"
"""Prefix of a source that the datasets library opens."""
PREPARED = ("meta.json", "tokenizer.json", "train.bin", "validation.bin")
"""Files of a prepared source."""
ROWS, TOKENS = (".jsonl", ".parquet"), (".bin", ".npy")
"""Suffixes of files with rows of fields, and of files with tokens; all others are text."""


def is_prepared(source: str) -> bool:
    """Returns whether a source is a folder that `fundamentallm prepare` made."""
    return all(os.path.isfile(os.path.join(expand_user(source), name)) for name in PREPARED)


def is_checkpoint(folder: str) -> bool:
    """Returns whether a folder is a checkpoint, without verifying it."""
    return os.path.isfile(os.path.join(expand_user(folder), "manifest.json"))


def kind_of_file(file: Path) -> str:
    """Returns what a file holds, by its suffix: 'rows', 'tokens' or 'text'."""
    suffix = file.suffix.lower()
    return "rows" if suffix in ROWS else "tokens" if suffix in TOKENS else "text"


def source_files(data: DataConfig, source: str) -> list[Path]:
    """Returns the files of a source, sorted; none for the built-in corpus, datasets and prepared folders.

    A folder means every file below it with one of `data.suffixes`. Hidden files and folders are skipped.

    Raises:
        ConfigError: if there are no files, or a folder cannot be read.
    """
    if source == BUILT_IN_CORPUS or source.startswith(DATASETS) or is_prepared(source):
        return []
    path = expand_user(source)
    if os.path.isdir(path):
        files = sorted(_files_below(data, source))
        reason = f"which has no {' or '.join(data.suffixes)} files"
        problem = Problem("source", source, advice="data.suffixes chooses the files of a folder.", reason=reason)
    else:
        found = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
        files = sorted(Path(file) for file in found if os.path.isfile(file))
        allowed = f"a file, a folder, a glob, {DATASETS}NAME, or {BUILT_IN_CORPUS!r}"
        text = f"file {source!r} not found"
        problem = Problem("source", source, allowed, did_you_mean(source, [BUILT_IN_CORPUS]), text=text)
    if not files:
        raise ConfigError(problem)
    return files


def _files_below(data: DataConfig, source: str) -> Iterator[Path]:
    def refuse(error: OSError) -> None:  # os.walk would skip the folder silently
        raise ConfigError(Problem("source", source, reason=f"but {error.filename} cannot be read ({error.strerror})"))

    for folder, folders, names in os.walk(expand_user(source), onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = os.path.join(folder, name)
            if name.endswith(tuple(data.suffixes)) and not name.startswith(".") and os.path.isfile(path):
                yield Path(path)


def problems_of_kind(data: DataConfig, source: str, files: list[Path]) -> list[Problem]:
    """Returns what does not fit in the kinds of a source's files: with each other, or with the settings."""
    kinds = set(map(kind_of_file, files))
    reason = f"which holds {' and '.join(sorted(kinds))}"
    if len(kinds) > 1:
        return [Problem("source", source, "files of one kind", "Name them as several sources.", reason)]
    if kinds <= {"rows"}:
        return []
    if data.prompt_field is not None:
        allowed = f"with data.prompt_field, rows ({', '.join(ROWS)} or {DATASETS}NAME)"
        return [Problem("source", source, allowed, "Set data.prompt_field to null.", reason)]
    if kinds == {"tokens"} and not data.tokenizer.endswith(".json"):
        advice = "Set data.tokenizer to the tokenizer.json that made the tokens."
        return [Problem("source", source, "", advice, f"{reason}, and tokenizer is {data.tokenizer!r}")]
    return []


def data_problems(data: DataConfig) -> list[Problem]:
    """Returns what is wrong with the files that the data settings name."""
    problems = []
    if data.tokenizer.endswith(".json") and not os.path.isfile(expand_user(data.tokenizer)):
        problems.append(Problem("tokenizer", data.tokenizer, text=f"file {data.tokenizer!r} not found"))
    problems += _folder_problems("cache_dir", data.cache_dir)
    for source in data.sources():
        try:
            problems += problems_of_kind(data, source, source_files(data, source))
        except ConfigError as error:
            problems += error.problems
    return problems


def _folder_problems(setting: str, path: str | None) -> list[Problem]:
    """Returns the problem with a folder to be made: it, or a parent, is something else."""
    if path is None:
        return []
    absolute = Path(expand_user(path)).absolute()
    existing = next(folder for folder in (absolute, *absolute.parents) if os.path.lexists(folder))
    return [] if existing.is_dir() else [Problem(setting, path, reason="which is not a folder", advice="Give another.")]


def file_problems(config: Config) -> list[Problem]:
    """Returns what is wrong with the files and folders of a run. Creates none."""
    problems = [problem.within("data") for problem in data_problems(config.data)]
    problems += _folder_problems("output_dir", config.output_dir)
    problems += _folder_problems("training.checkpoint_dir", config.training.checkpoint_dir)
    # A resumed run takes its weights from its own newest checkpoint, and the one it started from may be gone.
    has_own = glob.glob(os.path.join(glob.escape(config.folder_of_checkpoints()), "*", "manifest.json"))
    initial = {"model.init_from": config.model.init_from, "training.resume": config.training.resume}
    for name, folder in initial.items():
        if folder not in (None, "auto", "never") and not is_checkpoint(folder) and not has_own:
            problems.append(
                Problem(name, folder, reason="which is not a checkpoint", advice="Give a checkpoint's folder.")
            )
    return problems
