"""The files that settings name, and what is wrong with them: told at once, since nothing here needs torch."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path

from fundamentallm.config.registry import did_you_mean
from fundamentallm.config.schema import BUILT_IN_CORPUS, Config, DataConfig
from fundamentallm.config.validation import expand_user
from fundamentallm.errors import ConfigError

DATASETS = "datasets:"
"""How a source begins that the library of that name opens."""
PREPARED = ("meta.json", "tokenizer.json", "train.bin", "validation.bin")
"""Files of a prepared source."""
ROWS, TOKENS = (".jsonl", ".parquet"), (".bin", ".npy")
"""Endings of files that hold rows with fields, and of those that hold tokens; all others are text."""


def is_no_folder(path: str) -> bool:
    """Whether something that is no folder is at the path, or a part of it, or no folder can have it for a name."""
    if os.path.isdir(path):
        return False
    try:
        os.lstat(path)
    except OSError:  # none is there yet
        pass
    except ValueError:  # a null character, or what no file system can encode
        return True
    return os.path.exists(path) or (bool(parent := os.path.dirname(path.rstrip("/"))) and is_no_folder(parent))


def is_prepared(source: str) -> bool:
    """Whether a source is a folder that `fundamentallm prepare` made."""
    return all(os.path.isfile(os.path.join(expand_user(source), name)) for name in PREPARED)


def is_checkpoint(folder: str) -> bool:
    """Whether a folder is a checkpoint (of which `CheckpointManager` finds out whether it is whole)."""
    return os.path.isfile(os.path.join(expand_user(folder), "manifest.json"))


def _has_files(source: str) -> bool:
    """Whether a source is to be looked for among the files: not what is built in, of datasets, or prepared."""
    return source != BUILT_IN_CORPUS and not source.startswith(DATASETS) and not is_prepared(source)


def source_files(data: DataConfig, source: str) -> list[Path]:
    """The files that one of the sources names, sorted; empty for what is no files.

    A folder means every non-hidden file below it that has one of `data.suffixes`.

    Raises:
        ConfigError: if there are none.
    """
    files = sorted(_files(data, source))
    if not files and _has_files(source):
        wanted = f"a file, a folder, a glob, {DATASETS}NAME, or {BUILT_IN_CORPUS!r}"
        if os.path.isdir(expand_user(source)):
            wanted = f"a folder with {' or '.join(data.suffixes)} files below it (data.suffixes)"
        near = did_you_mean(source, [BUILT_IN_CORPUS])
        raise ConfigError(f"source is {source!r}, where there is no text; allowed: {wanted}.{near}")
    return files


def _files(data: DataConfig, source: str) -> Iterator[Path]:
    """Them as they are found; ConfigError where a folder cannot be read."""

    def refuse(error: OSError) -> None:  # which else would be passed over, text and all
        raise ConfigError(f"source is {source!r}, in which {error.filename} cannot be read: {error.strerror}.")

    # os.path answers False where pathlib raises: an unknown ~user, a name too long, a null character.
    path = expand_user(source)
    if not _has_files(source):
        return
    if os.path.isfile(path):
        yield Path(path)
    elif os.path.isdir(path):
        for where, folders, names in os.walk(path, onerror=refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]  # nor gone into
            wanted = (name for name in names if name.endswith(tuple(data.suffixes)) and not name.startswith("."))
            yield from (Path(file) for name in wanted if os.path.isfile(file := os.path.join(where, name)))
    else:
        with contextlib.suppress(ValueError):  # a null character
            yield from (Path(found) for found in glob.iglob(path, recursive=True) if os.path.isfile(found))


def kind_of(data: DataConfig, source: str) -> str:
    """What a source holds: 'rows', 'tokens' or 'text'. The first file tells, since all are of one kind."""
    if source.startswith(DATASETS):
        return "rows"
    return next(map(kind_of_file, _files(data, source)), "text")


def kind_of_file(file: Path) -> str:
    """What a file holds, by its ending: 'rows', 'tokens' or 'text'."""
    suffix = file.suffix.lower()
    return "rows" if suffix in ROWS else "tokens" if suffix in TOKENS else "text"


def data_problems(data: DataConfig) -> list[str]:
    """What is wrong with the files of the data: missing, empty, or certainly too short."""
    problems = []
    if data.tokenizer.endswith(".json") and not os.path.isfile(expand_user(data.tokenizer)):
        problems.append(f"tokenizer is {data.tokenizer!r}, which is not a file; give the path of a tokenizer.json.")
    if data.cache_dir is not None and is_no_folder(expand_user(data.cache_dir)):
        problems.append(f"cache_dir is {data.cache_dir!r}, which is no folder; give another.")
    for source in data.sources():
        try:
            files = source_files(data, source)
            problems += problems_of_kind(data, source, files) or _problems_of_size(data, source, files)
        except ConfigError as error:
            problems += error.problems
    return problems


def problems_of_kind(data: DataConfig, source: str, files: list[Path]) -> list[str]:
    """What the files of a source hold that does not go together, or not with the settings."""
    kinds, given = set(map(kind_of_file, files)), f"source is {source!r}"
    if len(kinds) > 1:
        return [
            f"{given}, which has files of {' and of '.join(sorted(kinds))}; allowed: of one kind. Name them as several "
            "sources."
        ]
    if "text" in kinds and data.prompt_field is not None:
        return [
            f"{given}, which has no rows, and prompt_field is {data.prompt_field!r}; allowed: {', '.join(ROWS)} or "
            f"{DATASETS}NAME. Set data.prompt_field to null, or give another source."
        ]
    if "tokens" in kinds and not data.tokenizer.endswith(".json"):
        return [
            f"{given}, which holds tokens, and tokenizer is {data.tokenizer!r}; allowed: the tokenizer.json that they "
            "were made with."
        ]
    if "tokens" in kinds and data.prompt_field is not None:
        return [f"{given}, which holds tokens; allowed: with a data.prompt_field, sources of rows."]
    return []


def _problems_of_size(data: DataConfig, source: str, files: list[Path]) -> list[str]:
    size, needed = sum(file.stat().st_size for file in files), data.sequence_length + 1
    if files and size == 0:
        return [f"source is {source!r}, which is empty; give a file with text in it."]
    # Our own tokenizers make at most a token of a byte, so this finds the hopeless cases before anything is
    # read; the exact count, of each part of the split, is checked after encoding.
    is_text = set(map(kind_of_file, files)) == {"text"} and not data.tokenizer.endswith(".json")
    if is_text and size + 2 * len(files) < needed:
        return [
            f"source is {source!r}, which has {size} bytes; allowed: at least sequence_length + 1 = {needed} tokens in "
            "each part of the split. Give more text or a smaller data.sequence_length."
        ]
    return []


def _has_checkpoints(config: Config) -> bool:
    """Whether the run has some of its own, from the newest of which it goes on."""
    folder = config.folder_of_checkpoints()
    with contextlib.suppress(OSError, ValueError):  # no such folder, a null character
        return any(is_checkpoint(os.path.join(folder, name)) for name in os.listdir(folder))
    return False


def file_problems(config: Config) -> list[str]:
    """What is wrong with the files and folders of this run, found without creating any."""
    problems = [f"data.{problem}" for problem in data_problems(config.data)]
    if is_no_folder(expand_user(config.output_dir)):
        problems.append(f"output_dir is {config.output_dir!r}, which is no folder; give another.")
    checkpoints = config.training.checkpoint_dir
    begins_from = {"model.init_from": config.model.init_from, "training.resume": config.training.resume}
    for name, path in begins_from.items():
        if path is None or path in ("auto", "never"):
            continue
        if not is_checkpoint(path) and not _has_checkpoints(config):
            problems.append(f"{name} is {path!r}, which is no checkpoint; give the folder of one.")
    if checkpoints is not None and is_no_folder(expand_user(checkpoints)):
        problems.append(f"training.checkpoint_dir is {checkpoints!r}, which is no folder; give another.")
    return problems
