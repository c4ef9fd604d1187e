"""Checkpoints: safetensors and JSON in a directory that is whole or not there.

    step_00001000/
      model.safetensors      the entry `model_state_dict`, under transformers' parameter names
      training.safetensors   every other tensor, keyed by its path in the state
      state.json             everything that is no tensor, and where each tensor belongs
      config.json ...        further text files the caller gives (transformers' config, tokenizer.json)
      manifest.json          written last: size and SHA-256 of every file, place in the sequence, best or not

A checkpoint is staged in a hidden sibling directory, synced, and renamed. What exists, which is newest and
which is best are read from the disk, never from memory. No pickle: opening a stranger's checkpoint runs none
of their code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fundamentallm.config import TrainingConfig
from fundamentallm.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from fundamentallm.training.serialization import decode, encode, unshare
from fundamentallm.validation import range_problems

FORMAT_VERSION = 1
MODEL, TRAINING, STATE, MANIFEST = "model.safetensors", "training.safetensors", "state.json", "manifest.json"
MODEL_KEY = "model_state_dict"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
"""Names of checkpoints and of their files: nothing hidden, nothing that leaves the directory."""


def _sync(path: Path) -> None:
    """Wait until `path` (a file, or a directory's list of names) is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_ours(path: Path) -> bool:
    """Whether a path is a checkpoint, or what is left of one."""
    is_folder = path.is_dir() and not path.is_symlink()
    return is_folder and any((path / file).exists() for file in (STATE, MODEL, TRAINING, MANIFEST))


def _own_sha256(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's manifest, its form checked.

    Raises:
        CheckpointNotFoundError: if there is no directory at the path.
        CheckpointError: if it is no whole checkpoint, or one of a later version.
    """
    if not checkpoint.is_dir():
        raise CheckpointNotFoundError(f"{checkpoint}: there is no checkpoint directory here.")
    if (checkpoint / MANIFEST).is_symlink():
        raise CheckpointError(f"{checkpoint}: {MANIFEST} is damaged, it is a link.")
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format_version"], manifest["files"]
        good = (
            manifest["sha256"] == _own_sha256(manifest)
            and isinstance(manifest["sequence"], int)
            and isinstance(manifest["is_best"], bool)
        )
        good &= all(NAME.fullmatch(name) and {"size", "sha256"} <= set(entry) for name, entry in files.items())
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: incomplete, it has no {MANIFEST}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint}: {MANIFEST} is damaged ({error}).") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{checkpoint}: format {version!r}; this version reads {FORMAT_VERSION}. Upgrade.")
    if not good or not {STATE, MODEL, TRAINING} <= set(files):
        raise CheckpointError(f"{checkpoint}: {MANIFEST} is damaged.")
    return manifest  # type: ignore[no-any-return]


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest, once every file it lists has been found to have its size and SHA-256.

    Raises:
        CheckpointError: naming the first file that has not.
    """
    manifest = read_manifest(checkpoint)
    for name, entry in manifest["files"].items():
        path = checkpoint / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{checkpoint}: {name} is missing.")
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(f"{checkpoint}: {name} has {path.stat().st_size} bytes instead of {entry['size']}.")
        if _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{checkpoint}: {name} is damaged, its SHA-256 differs from the manifest's.")
    return manifest


class CheckpointManager:
    """Saves, finds, loads and rotates the checkpoints of one directory.

    Args:
        checkpoint_dir: the directory; created by the first save.
        keep_last_n: how many checkpoints to keep, besides the best. Older ones are deleted after each save,
            whatever their name; what is not a whole checkpoint of ours is never touched.

    Raises:
        ConfigError: if keep_last_n is below 1.
    """

    def __init__(self, checkpoint_dir: Path | str, keep_last_n: int = TrainingConfig.keep_last_n) -> None:
        if problems := range_problems(keep_last_n=keep_last_n):
            raise ConfigError(problems)
        self.checkpoint_dir, self.keep_last_n = Path(checkpoint_dir), keep_last_n

    def save(
        self,
        checkpoint: Mapping[str, Any],
        name: str = "checkpoint",
        is_best: bool = False,
        files: Mapping[str, str] | None = None,
    ) -> Path:
        """Write a checkpoint and delete those that are neither recent nor best.

        Args:
            checkpoint: nested dicts, lists and tuples of tensors, numbers, text and None; the flat
                dict of tensors under 'model_state_dict' goes into model.safetensors.
            name: its directory; one that is there already is replaced.
            is_best: whether it is the best so far, by whatever measure the caller has.
            files: further text files, by name.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointError: if the name would leave the directory, a value is neither tensor nor JSON
                (naming its path), or the files cannot be written; nothing is changed then.
        """
        for text in (name, *(files or {})):
            if not NAME.fullmatch(text) or text in (STATE, MODEL, TRAINING, MANIFEST):
                raise CheckpointError(f"the name is {text!r}; allowed: letters, digits, '_', '-' and '.', not first.")
        tensors: dict[str, Tensor] = {}
        state = encode(checkpoint, (), tensors)
        # The model's first: a tensor that is there twice is stored under its first name.
        stored, same_as = unshare(
            dict(sorted(tensors.items(), key=lambda item: not item[0].startswith(MODEL_KEY + "/")))
        )
        try:
            self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
            staging = self._hidden_folder(f"staging-{name}")
            try:
                self._write(staging, {"state": state, "same_as": same_as}, stored, is_best, files or {})
                path = self._publish(staging, name)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
        except OSError as error:
            raise CheckpointError(f"cannot write checkpoint {name!r} in {self.checkpoint_dir}: {error}.") from error
        self._rotate()
        return path

    def _write(
        self, folder: Path, state: dict[str, Any], tensors: dict[str, Tensor], is_best: bool, files: Mapping[str, str]
    ) -> None:
        prefix = MODEL_KEY + "/"
        weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        others = {key: value for key, value in tensors.items() if not key.startswith(prefix)}
        save_file(weights, folder / MODEL, metadata={"format": "pt"})  # transformers asks for this mark
        save_file(others, folder / TRAINING)
        texts = {**files, STATE: json.dumps(state, indent=1, allow_nan=False)}
        for file_name, text in texts.items():
            (folder / file_name).write_text(text, encoding="utf-8")
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "sequence": max((m["sequence"] for _, m in self._found()), default=0) + 1,
            "is_best": is_best,
            "files": {
                path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())
            },
        }
        manifest["sha256"] = _own_sha256(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*folder.iterdir(), folder):
            _sync(path)

    def _publish(self, staging: Path, name: str) -> Path:
        """Give the staged checkpoint its name. An intact one that has the name steps aside first, and goes last."""
        path = self.checkpoint_dir / name
        aside = None
        if path.exists() or path.is_symlink():
            if not _is_ours(path):
                raise CheckpointError(f"{path} is in the way, and is no checkpoint to replace; move it away.")
            try:
                verify(path)
                aside = self._hidden_folder(f"replaced-{name}") / name
                path.rename(aside)
            except CheckpointError:  # somebody may want to see what is left of it, so it is never deleted
                path.rename(self.checkpoint_dir / f"{name}~damaged-{uuid.uuid4().hex[:6]}")
        staging.rename(path)
        _sync(self.checkpoint_dir)
        if aside is not None:
            shutil.rmtree(aside.parent)
        return path

    def _hidden_folder(self, purpose: str) -> Path:
        # tempfile.mkdtemp would close the folder to everyone else, and with it the checkpoint it becomes.
        path = self.checkpoint_dir / f".{purpose}-{uuid.uuid4().hex[:12]}"
        path.mkdir()
        return path

    def _found(self) -> list[tuple[Path, dict[str, Any]]]:
        """Complete checkpoints and their manifests, oldest first."""
        found = []
        for path in self.checkpoint_dir.iterdir() if self.checkpoint_dir.is_dir() else ():
            if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                with contextlib.suppress(CheckpointError):
                    found.append((path, read_manifest(path)))
        return sorted(found, key=lambda item: item[1]["sequence"])

    def _rotate(self) -> None:
        found = self._found()
        keep = {path for path, _ in found[-self.keep_last_n :]} | {self.get_best()}
        for path, _ in found:
            if path not in keep:
                # Renamed first, so that a kill in between leaves no half of a checkpoint under its name.
                doomed = self._hidden_folder(f"deleting-{path.name}")
                shutil.rmtree(path.rename(doomed / path.name))
                doomed.rmdir()

    def get_latest(self) -> Path | None:
        """The checkpoint saved last, or None."""
        found = self._found()
        return found[-1][0] if found else None

    def get_best(self) -> Path | None:
        """The last checkpoint that was saved as the best, or None."""
        return next((path for path, manifest in reversed(self._found()) if manifest["is_best"]), None)

    def load_latest(self) -> tuple[dict[str, Any] | None, Path | None, list[str]]:
        """(checkpoint, its path, why others were passed over) of the newest intact checkpoint; None: there is none."""
        passed_over = []
        for path in sorted(self.checkpoint_dir.iterdir()) if self.checkpoint_dir.is_dir() else ():
            if NAME.fullmatch(path.name) and _is_ours(path):
                try:
                    read_manifest(path)
                except CheckpointError as error:
                    passed_over.append(str(error))
        for path, _ in reversed(self._found()):
            try:
                return load_checkpoint(path), path, passed_over
            except CheckpointError as error:
                passed_over.append(str(error))
        return None, None, passed_over

    def load(self, path: Path | str) -> dict[str, Any]:
        """What was saved at `path`, tensors on the CPU, every byte verified.

        Raises:
            CheckpointNotFoundError: if there is no directory at the path.
            CheckpointError: if the checkpoint is incomplete or damaged, naming the file.
        """
        return load_checkpoint(Path(path))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """See `CheckpointManager.load`; a checkpoint is complete in itself, wherever it lies."""
    verify(path)
    try:
        saved = json.loads((path / STATE).read_text(encoding="utf-8"))
        tensors = load_file(path / TRAINING)
        tensors |= {f"{MODEL_KEY}/{name}": tensor for name, tensor in load_file(path / MODEL).items()}
        tensors |= {name: tensors[other] for name, other in saved["same_as"].items()}
        return decode(saved["state"], tensors)  # type: ignore[no-any-return]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: {STATE} does not fit the tensors of {MODEL} and {TRAINING} ({type(error).__name__}: {error})."
        ) from error
