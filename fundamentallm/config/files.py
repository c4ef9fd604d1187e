"""The files and folders that settings name, and what is wrong with them."""

import collections
import glob
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from fundamentallm.config.registry import did_you_mean
from fundamentallm.config.schema import BUILT_IN_CORPUS, Config, DataConfig
from fundamentallm.config.validation import expand_user
from fundamentallm.errors import ConfigError, Problem

DATASETS = "datasets:"
"""Prefix of a source that the datasets library opens."""
PREPARED = ("meta.json", "tokenizer.json", "train.bin", "validation.bin")
"""Files of a prepared source."""
SUFFIXES = {
    "rows": ".jsonl .jsonlines .jl .ndjson .json .parquet",
    "tokens": ".bin .npy",
    # Refused, although some could be decoded as text.
    "no text": ".csv .tsv .arrow .feather .orc .avro .xls .xlsx .ods .db .sqlite .sqlite3 .h5 .hdf5 .npz .pkl .pickle "
    ".pt .pth .safetensors .gz .tgz .bz2 .xz .zst .zip .7z .rar .tar .pdf .doc .docx .odt .epub .ipynb",
}
"""What files hold, by their suffixes. Files with any other suffix hold text."""
KINDS = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes.split()}


class SourceFiles(NamedTuple):
    """A `data.source`, resolved."""

    name: str
    kind: str  # 'prepared', 'built-in', 'dataset', 'rows', 'tokens' or 'text'
    files: tuple[Path, ...]  # sorted; the folder of a prepared source; empty for a dataset
    left_out: str = ""  # number of files of the folder that are not read, by reason


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


def find_sources(data: DataConfig) -> list[SourceFiles]:
    """Looks up the files of all sources, without that for validation.

    Raises:
        ConfigError: listing missing files, and files that do not fit together or the settings.
    """
    found, problems = list[SourceFiles](), list(_field_problems(data))
    named = [("data.source", name) for name in data.sources()]
    if data.validation_source is not None:
        named.append(("data.validation_source", data.validation_source))
    for setting, name in named:
        try:
            found.append(find_source(data, name, setting))
        except ConfigError as error:
            problems += error.problems
    has_rows = {source.kind for source in found} & {"rows", "dataset", "prepared"}  # prepared from rows, perhaps
    if not problems and data.text_field != DataConfig.text_field and not has_rows:
        allowed, reason = f"with rows ({SUFFIXES['rows']}, {DATASETS}NAME)", f"but data.source is {data.source!r}"
        problems.append(Problem("data.text_field", data.text_field, allowed, "Leave it out, or name rows.", reason))
    if problems:
        raise ConfigError(problems)
    return found[: len(data.sources())]


def find_source(data: DataConfig, name: str, setting: str = "data.source") -> SourceFiles:
    """Looks up the files of one source, which `setting` names.

    A folder means every visible file below it with one of `data.suffixes`, in any case.

    Raises:
        ConfigError: if there are no files, they do not fit together or the settings, or reading might not end.
    """
    if is_prepared(name):
        return SourceFiles(name, "prepared", (Path(expand_user(name)),))
    if name.startswith(DATASETS):
        return SourceFiles(name, "dataset", ())
    path, left_out = expand_user(name), collections.Counter[str]()
    allowed = f"a file, a folder, a glob, {DATASETS}NAME, or {BUILT_IN_CORPUS!r}"
    problem = Problem(setting, name, allowed, did_you_mean(name, [BUILT_IN_CORPUS]), text=f"file {name!r} not found")
    if name == BUILT_IN_CORPUS:
        found = [str(find_spec("pydoc_data.topics").origin)]  # type: ignore[union-attr]
    elif os.path.isdir(path):
        found = _files_below(data, path, left_out, setting)
        reason, advice = f"which has no {' or '.join(data.suffixes)} files", "data.suffixes chooses the files."
        problem = Problem(setting, name, advice=advice, reason=reason)
    else:
        found = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
    regular = sorted(filter(os.path.isfile, found), reverse=True)
    left_out["folders and special files"] += len(found) - len(regular)
    files = sorted({os.path.realpath(file): Path(file) for file in regular}.values())  # links may lead to one twice
    if unfit := _kind_problem(data, name, files, setting) if files else problem:
        raise ConfigError(unfit)
    others = ", ".join(f"{count:,} {why}" for why, count in left_out.most_common(5) if count)
    kind = "built-in" if name == BUILT_IN_CORPUS else kind_of_file(files[0])
    return SourceFiles(name, kind, tuple(files), others)


def kind_of_file(file: Path) -> str:
    """Returns what a file holds, by its suffix: 'rows', 'tokens', 'text' or 'no text'."""
    return KINDS.get(file.suffix.lower(), "text")


def _files_below(data: DataConfig, root: str, left_out: collections.Counter[str], setting: str) -> list[str]:
    """Lists all visible files below a folder with one of `data.suffixes`, and counts the others."""

    def refuse(error: OSError) -> None:  # os.walk would skip the folder silently
        raise ConfigError(Problem(setting, root, reason=f"but {error.filename} cannot be read ({error.strerror})"))

    seen, found = set[str](), list[str]()
    suffixes = tuple(suffix.lower() for suffix in data.suffixes)
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # links may form circles
            folders.clear()
            continue
        seen.add(real)
        left_out["hidden"] += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.lower().endswith(suffixes) and not name.startswith("."):
                found.append(os.path.join(folder, name))
            elif not name.startswith("."):
                left_out[os.path.splitext(name)[1] or "without suffix"] += 1
    return found


def _kind_problem(data: DataConfig, name: str, files: list[Path], setting: str) -> Problem | None:
    """Returns what does not fit in the kinds of a source's files: with each other, or with the settings."""
    kinds = {kind_of_file(file): file.suffix for file in files}
    field = next(iter(row_fields(data)))
    if "no text" in kinds:
        allowed = f"text, rows ({SUFFIXES['rows']}) or tokens ({SUFFIXES['tokens']})"
        advice = f"Convert or unpack them, or try {DATASETS}BUILDER,data_files=FILE (such as {DATASETS}csv)."
    elif len(kinds) > 1:
        allowed, advice = "files of one kind", "Name them as several sources."
    elif are_samples(data) and "rows" not in kinds:
        allowed, advice = f"with {field}, rows ({SUFFIXES['rows']}, {DATASETS}NAME)", f"Set {field} to null."
    elif "tokens" in kinds and not data.tokenizer.endswith(".json"):
        allowed, advice = "", "Set data.tokenizer to the tokenizer.json that made the tokens."
    else:
        return None
    held = " and ".join(sorted(f"{kind} ({suffix})" for kind, suffix in kinds.items()))
    return Problem(setting, name, allowed, advice, f"which holds {held}")


def _can_be_made(path: str) -> bool:
    """Returns whether a path is a folder, or could be one."""
    absolute = Path(expand_user(path)).absolute()
    return next(folder for folder in (absolute, *absolute.parents) if os.path.lexists(folder)).is_dir()


def file_problems(config: Config) -> list[Problem]:
    """Returns what is wrong with the files and folders of a run. Creates none."""
    data, problems = config.data, list[Problem]()
    if data.tokenizer.endswith(".json") and not os.path.isfile(expand_user(data.tokenizer)):
        problems.append(Problem("data.tokenizer", data.tokenizer, text=f"file {data.tokenizer!r} not found"))
    try:
        found = find_sources(data)
        if data.streaming and found[0].kind in ("tokens", "prepared"):
            reason = f"and {found[0].name} holds tokens already, which are not loaded before they are used"
            problems.append(Problem("data.streaming", True, "false", reason=reason))
    except ConfigError as error:
        problems += error.problems
    made = {"data.cache_dir": data.cache_dir, "output_dir": config.output_dir}
    for name, folder in (made | {"training.checkpoint_dir": config.training.checkpoint_dir}).items():
        if folder is not None and not _can_be_made(folder):
            problems.append(Problem(name, folder, reason="which is not a folder", advice="Give another."))
    # A resumed run takes its weights from its own newest checkpoint, and the one it started from may be gone.
    has_own = glob.glob(os.path.join(glob.escape(config.folder_of_checkpoints()), "*", "manifest.json"))
    initial = {"model.init_from": config.model.init_from, "training.resume": config.training.resume}
    for name, folder in initial.items():
        if folder in (None, "auto", "never") or has_own:
            continue
        if not os.path.isfile(os.path.join(expand_user(folder), "manifest.json")):
            advice, reason = "Give a checkpoint's folder.", "which is not a checkpoint"
            problems.append(Problem(name, folder, advice=advice, reason=reason))
    return problems
