"""The manifest of a checkpoint: a list of its files with size and SHA-256, and the check of the files against it."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch

from fundamentallm.atomic import sync
from fundamentallm.errors import CheckpointError, CheckpointNotFoundError, FundamentaLLMError

FORMAT_VERSION = 2
STATE, MANIFEST = "state.json", "manifest.json"
TENSORS = re.compile(r"(model|adapter_model|training)(-\d{5}-of-\d{5})?\.safetensors")
"""Names of tensor files: those with full tensors, and those with the shards of one process."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
"""Allowed names of checkpoints and of their files: not hidden, and without a path to another folder."""
MOST_BYTES = 4 << 20
"""Largest manifest that is read: 20,000 files of 10,000 processes. A stranger's could keep a command busy."""


@contextlib.contextmanager
def explained(path: object, what: str = "it cannot be read or used") -> Iterator[None]:
    """On exit, raises CheckpointError for an error or panic of reading a stranger's checkpoint; our own errors pass."""
    try:
        yield
    except (FundamentaLLMError, BrokenPipeError, torch.OutOfMemoryError):  # not of the checkpoint
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise  # an interruption
        raise CheckpointError(f"{path}: {what} ({type(error).__name__}: {error}).") from error


def is_ours(path: Path) -> bool:
    """Returns True if a folder is a checkpoint, even one that lacks a file. Other programs write such files too."""
    has_training = any(TENSORS.fullmatch(file.name) for file in path.glob("training*.safetensors"))
    return has_training or all(os.path.lexists(path / name) for name in (STATE, MANIFEST))


def sha256_of(opened: contextlib.AbstractContextManager[IO[bytes]]) -> str:
    """Returns the SHA-256 of an open file's content, in hex, and closes it."""
    digest = hashlib.sha256()
    with opened as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _own_sha256(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def describe(folder: Path, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Sync files to the disk and return their manifest entries: {name: {"size": in bytes, "sha256": in hex}}."""
    for name in names:
        sync(folder / name)
    paths = {name: folder / name for name in sorted(names)}
    return {name: {"size": p.stat().st_size, "sha256": sha256_of(p.open("rb"))} for name, p in paths.items()}


def write_manifest(folder: Path, files: Mapping[str, dict[str, Any]], **about: Any) -> None:
    """Write and sync a manifest with the entries of `files` (see `describe`) and the fields `about`."""
    manifest = {"format_version": FORMAT_VERSION, **about, "files": dict(sorted(files.items()))}
    manifest["sha256"] = _own_sha256(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest. Check its own SHA-256, its fields, and that it names files in its folder only."""
    path = checkpoint / MANIFEST
    if not checkpoint.is_dir():
        raise CheckpointNotFoundError(f"{checkpoint}: there is no checkpoint directory here.")
    if path.is_symlink() or not path.is_file():  # reading a pipe would block forever
        raise CheckpointError(f"{checkpoint}: incomplete, it has no {MANIFEST}.")
    with explained(checkpoint), path.open("rb") as file:
        return parse_manifest(file.read(MOST_BYTES + 1), checkpoint)


def parse_manifest(content: bytes, checkpoint: object) -> dict[str, Any]:
    """Returns the manifest with this content, checked as by `read_manifest`. `checkpoint` says where it is from."""
    with explained(checkpoint, f"{MANIFEST} is damaged"):
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        manifest: dict[str, Any] = json.loads(content)
        if (version := manifest["format_version"]) != FORMAT_VERSION:
            advice = f"Use the version of fundamentallm that {STATE} names."
            raise CheckpointError(f"{checkpoint}: its format is {version!r}; allowed: {FORMAT_VERSION}. {advice}")
        names, numbers = manifest["files"], (manifest["sequence"], manifest["step"] or 0)
        has_form = all(type(number) is int for number in numbers) and {"is_best", "is_finite"} <= manifest.keys()
        is_safe = STATE in names and all(map(NAME.fullmatch, names))
        if manifest["sha256"] != _own_sha256(manifest) or not has_form or not is_safe:
            raise ValueError("it does not match its SHA-256 or has another form")
    return manifest


def total_size(manifest: Mapping[str, Any]) -> int:
    """Returns the size of a checkpoint's files together, in bytes."""
    return sum(entry["size"] for entry in manifest["files"].values())


def verify(checkpoint: Path, hashed: Collection[str] | None = None) -> dict[str, Any]:
    """Check the sizes of all files of a checkpoint, and the SHA-256 of those in `hashed` (None: all).

    Returns its manifest. Raises CheckpointError with the name of a file that is missing or differs.
    """
    manifest = read_manifest(checkpoint)

    def check(name: str) -> None:
        path, entry = checkpoint / name, manifest["files"][name]
        if os.path.islink(path) or not os.path.isfile(path):  # unlike pathlib's, these accept names of any length
            raise CheckpointError(f"{checkpoint}: {name} is missing.")
        if (size := path.stat().st_size) != entry["size"]:
            raise CheckpointError(f"{checkpoint}: {name} has {size} bytes instead of {entry['size']}.")
        if (hashed is None or name in hashed) and sha256_of(path.open("rb")) != entry["sha256"]:
            raise CheckpointError(f"{checkpoint}: {name} is damaged, its SHA-256 differs from the manifest's.")

    with explained(checkpoint), ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        list(pool.map(check, manifest["files"]))
    return manifest
