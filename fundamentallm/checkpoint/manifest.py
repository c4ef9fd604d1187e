"""The manifest of a checkpoint: a list of its files with size and SHA-256, and the check of the files against it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fundamentallm.atomic import sync
from fundamentallm.errors import CheckpointError, CheckpointNotFoundError

FORMAT_VERSION = 2
STATE, MANIFEST = "state.json", "manifest.json"
TENSORS = re.compile(r"(model|adapter_model|training)(-\d{5}-of-\d{5})?\.safetensors")
"""Names of tensor files: those with full tensors, and those with the shards of one process."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
"""Allowed names of checkpoints and of their files: not hidden, and without a path to another folder."""
MOST_BYTES = 4 << 20
"""Largest manifest that is read: 20,000 files of 10,000 processes. A stranger's could keep a command busy."""
_FIELDS: dict[str, Any] = {
    "sequence": int,
    "is_best": bool,
    "is_finite": bool,
    "step": (int, type(None)),
    "files": dict,
}


def is_ours(path: Path) -> bool:
    """Returns True if a folder is a checkpoint, even one that lacks a file.

    Other programs write a model.safetensors, a manifest.json or a state.json too.
    """
    has_training = any(TENSORS.fullmatch(file.name) for file in path.glob("training*.safetensors"))
    return has_training or all(os.path.lexists(path / name) for name in (STATE, MANIFEST))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
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
    return {name: {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in sorted(names)}


def write_manifest(folder: Path, files: Mapping[str, dict[str, Any]], **about: Any) -> None:
    """Write and sync a manifest with the entries of `files` (see `describe`) and the fields `about`."""
    manifest = {"format_version": FORMAT_VERSION, **about, "files": dict(sorted(files.items()))}
    manifest["sha256"] = _own_sha256(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and check its own SHA-256 and its form.

    Raises CheckpointNotFoundError if there is no directory at the path; CheckpointError if there is no good manifest.
    """
    path = checkpoint / MANIFEST
    if not checkpoint.is_dir():
        raise CheckpointNotFoundError(f"{checkpoint}: there is no checkpoint directory here.")
    if path.is_symlink() or not path.is_file():  # reading a pipe would block forever
        raise CheckpointError(f"{checkpoint}: incomplete, it has no {MANIFEST}.")
    if path.stat().st_size > MOST_BYTES:
        raise CheckpointError(f"{checkpoint}: {MANIFEST} has more than {MOST_BYTES:,} bytes.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        is_good = type(version) is int and (version != FORMAT_VERSION or _has_form(manifest))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint}: {MANIFEST} is damaged ({type(error).__name__}: {error}).") from error
    if not is_good:
        raise CheckpointError(f"{checkpoint}: {MANIFEST} is damaged.")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint}: its format is {version!r}; allowed: {FORMAT_VERSION}. Use the version of fundamentallm "
            f"that {STATE} names."
        )
    return manifest  # type: ignore[no-any-return]


def _has_form(manifest: dict[str, Any]) -> bool:
    """Returns True if the manifest matches its own SHA-256, has all fields, and names files in its own folder only."""
    return (
        manifest["sha256"] == _own_sha256(manifest)
        and all(isinstance(manifest[field], kind) for field, kind in _FIELDS.items())
        and 0 < manifest["sequence"] < 2**63
        and STATE in manifest["files"]
        and {match[1] for match in map(TENSORS.fullmatch, manifest["files"]) if match}
        in ({"model", "training"}, {"adapter_model", "training"})
        and all(
            NAME.fullmatch(name)
            and name != MANIFEST
            and isinstance(entry, dict)
            and type(entry["size"]) is int
            and 0 <= entry["size"] < 2**63
            and isinstance(entry["sha256"], str)
            for name, entry in manifest["files"].items()
        )
    )


def verify(checkpoint: Path, hashed: Collection[str] | None = None) -> dict[str, Any]:
    """Check the files of a checkpoint against its manifest, which is returned.

    `hashed` names the files whose SHA-256 is checked; None: all. Sizes are always checked. Raises CheckpointError with
    the name of a file that is missing or differs.
    """
    manifest = read_manifest(checkpoint)
    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        checks = [
            pool.submit(_check_file, checkpoint, name, entry, hashed is None or name in hashed)
            for name, entry in manifest["files"].items()
        ]
        for check in checks:
            check.result()
    return manifest


def _check_file(checkpoint: Path, name: str, entry: dict[str, Any], is_hashed: bool) -> None:
    path = checkpoint / name
    if os.path.islink(path) or not os.path.isfile(path):  # unlike pathlib's, these accept names of any length
        raise CheckpointError(f"{checkpoint}: {name} is missing.")
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(f"{checkpoint}: {name} has {size} bytes instead of {entry['size']}.")
        if is_hashed and _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{checkpoint}: {name} is damaged, its SHA-256 differs from the manifest's.")
    except OSError as error:
        raise CheckpointError(f"{checkpoint}: {name} cannot be read: {error}.") from error
