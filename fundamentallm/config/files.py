"""The files and folders that settings name, and what is wrong with them."""

import glob
import os
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from fundamentallm.config.registry import did_you_mean, set_names
from fundamentallm.config.schema import BUILT_IN_CORPUS, Config, DataConfig
from fundamentallm.config.validation import expand_user
from fundamentallm.errors import ConfigError, Problem, collected, raise_all

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
ROWS = f"{SUFFIXES['rows']}, {DATASETS}NAME"
KINDS = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes.split()}


class SourceFiles(NamedTuple):
    """A `data.source`, resolved."""

    name: str
    kind: str  # 'prepared', 'built-in', 'dataset', 'rows', 'tokens' or 'text'
    files: tuple[Path, ...]  # sorted; the folder of a prepared source; empty for a dataset
    left_out: str = ""  # number of files of the folder that are not read, and why


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


def find_sources(data: DataConfig) -> list[SourceFiles]:
    """Looks up the files of all sources, without that for validation. Raises what `find_source` raises, for all."""
    found, problems = list[SourceFiles](), list[Problem]()
    named = [("data.source", name) for name in data.sources()]
    named += [("data.validation_source", name) for name in data.validation_sources().values()]
    for setting, name in named:
        with collected(problems):
            found.append(find_source(data, name, setting))
    kinds = [source.kind for source in found]
    if not problems and data.text_field != DataConfig.text_field and {*kinds} <= {"built-in", "text", "tokens"}:
        allowed, reason = f"with rows ({ROWS})", f"but data.source is {data.source!r}"
        problems.append(Problem("data.text_field", data.text_field, allowed, "Leave it out, or name rows.", reason))
    if not problems and data.streaming and kinds[0] in ("tokens", "prepared"):
        problems.append(Problem("data.streaming", True, "false", reason="and data.source holds tokens already"))
    raise_all(problems)
    return found[: len(data.sources())]


def validation_sets(data: DataConfig) -> list[str]:
    """Returns the names of the validation sets of a run, each of which has a val_NAME_loss; [] if there is only one."""
    if isinstance(data.validation_source, dict):
        return list(data.validation_source)
    have_parts = data.validation_source is None and data.train_split < 1 and len(data.sources()) > 1
    return set_names(data.sources()) if have_parts else []


def find_source(data: DataConfig, name: str, setting: str = "data.source") -> SourceFiles:
    """Looks up the files of one source, which `setting` names. A folder means all visible ones of `data.suffixes`.

    Raises ConfigError if there are no files, they do not fit together or the settings, or reading might not end.
    """
    if is_prepared(name):
        return SourceFiles(name, "prepared", (Path(expand_user(name)),))
    if name.startswith(DATASETS):
        return SourceFiles(name, "dataset", ())
    path, others, suffixes = expand_user(name), 0, " or ".join(data.suffixes)
    if name == BUILT_IN_CORPUS:
        found = [str(find_spec("pydoc_data.topics").origin)]  # type: ignore[union-attr]
    elif os.path.isdir(path):
        found, others = _files_below(path, data.suffixes, setting)
    else:
        found = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
    regular = sorted(filter(os.path.isfile, found), reverse=True)
    files = sorted({os.path.realpath(file): Path(file) for file in regular}.values())  # links may lead to one twice
    if not files:
        allowed = f"a file, a glob, a folder with {suffixes} (data.suffixes), {DATASETS}NAME or {BUILT_IN_CORPUS!r}"
        advice = did_you_mean(name, [BUILT_IN_CORPUS])
        raise ConfigError(Problem(setting, name, allowed, advice, text=f"no files found for {name!r}"))
    others += len(found) - len(regular)
    left_out = f"{others:,} files (hidden, special, or without {suffixes})" if others else ""
    kind = _kind(data, name, files, setting)
    return SourceFiles(name, "built-in" if name == BUILT_IN_CORPUS else kind, tuple(files), left_out)


def _files_below(root: str, suffixes: list[str], setting: str) -> tuple[list[str], int]:
    """Lists all visible files below a folder with one of `suffixes`, and counts the others."""

    def refuse(error: OSError) -> None:  # os.walk would skip the folder silently
        raise ConfigError(Problem(setting, root, reason=f"but {error.filename} cannot be read ({error.strerror})"))

    seen, found, others = set[str](), list[str](), 0
    endings = tuple(suffix.lower() for suffix in suffixes)
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        visible = sorted(name for name in folders if not name.startswith("."))
        fitting = [name for name in names if name.lower().endswith(endings) and not name.startswith(".")]
        if (real := os.path.realpath(folder)) in seen:  # links may form circles
            folders.clear()
            continue
        seen.add(real)
        found += [os.path.join(folder, name) for name in fitting]
        others += len(folders) + len(names) - len(visible) - len(fitting)
        folders[:] = visible
    return found, others


def _kind(data: DataConfig, name: str, files: list[Path], setting: str) -> str:
    """Returns what a source's files hold. Raises ConfigError if it does not fit: each other, or the settings."""
    suffixes = {KINDS.get(file.suffix.lower(), "text"): file.suffix for file in files}
    field = next(iter(row_fields(data)))
    allowed = advice = ""
    if "no text" in suffixes:
        allowed = f"text, rows ({SUFFIXES['rows']}) or tokens ({SUFFIXES['tokens']})"
        advice = f"Convert or unpack them, or try {DATASETS}BUILDER,data_files=FILE (such as {DATASETS}csv)."
    elif len(suffixes) > 1:
        allowed, advice = "files of one kind", "Name them as several sources."
    elif are_samples(data) and "rows" not in suffixes:
        allowed, advice = f"with {field}, rows ({ROWS})", f"Set {field} to null."
    elif "tokens" in suffixes and not data.tokenizer.endswith(".json"):
        advice = "Set data.tokenizer to the tokenizer.json that made the tokens."
    if advice:
        held = " and ".join(sorted(f"{kind} ({suffix})" for kind, suffix in suffixes.items()))
        raise ConfigError(Problem(setting, name, allowed, advice, f"which holds {held}"))
    return next(iter(suffixes))


def file_problems(config: Config) -> list[Problem]:
    """Returns what is wrong with the files and folders of a run. Creates none."""
    data, training, problems = config.data, config.training, list[Problem]()
    if data.tokenizer.endswith(".json") and not os.path.isfile(expand_user(data.tokenizer)):
        problems.append(Problem("data.tokenizer", data.tokenizer, text=f"file {data.tokenizer!r} not found"))
    with collected(problems):
        find_sources(data)
    made = {"data.cache_dir": data.cache_dir, "output_dir": config.output_dir}
    for name, folder in (made | {"training.checkpoint_dir": training.checkpoint_dir}).items():
        path = Path(expand_user(folder or ".")).absolute()
        if not next(above for above in (path, *path.parents) if os.path.lexists(above)).is_dir():
            problems.append(Problem(name, folder, reason="which is not a folder", advice="Give another."))
    # A resumed run takes its weights from its own newest checkpoint, and the one it started from may be gone.
    if training.mirror or glob.glob(os.path.join(glob.escape(config.folder_of_checkpoints()), "*", "manifest.json")):
        return problems
    for name, folder in {"model.init_from": config.model.init_from, "training.resume": training.resume}.items():
        if folder in (None, "auto", "never"):
            continue
        if not os.path.isfile(os.path.join(expand_user(folder), "manifest.json")):
            problems.append(Problem(name, folder, "", "Give a checkpoint's folder.", "which is not a checkpoint"))
    return problems
