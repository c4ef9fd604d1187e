"""A checkpoint on the disk: known for one, verified, and read, whole or in parts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from fundamentallm.checkpoint.manifest import MANIFEST, STATE, TENSORS, read_manifest, sync, verify
from fundamentallm.checkpoint.snapshot import AVERAGE_KEY, MODEL_KEY
from fundamentallm.checkpoint.state_json import MALFORMED, decode
from fundamentallm.checkpoint.tensor_files import Like, TensorFiles, consolidate
from fundamentallm.distributed.dtensor import local
from fundamentallm.errors import CheckpointError

RAW = f"{AVERAGE_KEY}/weights/"
"""Before the names of weights that the checkpoint holds beside their average."""


def is_ours(path: Path) -> bool:
    """Whether a path is a checkpoint, or what is left of one."""
    if not path.is_dir() or path.is_symlink():
        return False
    has_texts = any(os.path.lexists(path / file) for file in (STATE, MANIFEST))
    return has_texts or any(TENSORS.fullmatch(entry.name) for entry in path.glob("*.safetensors"))


def load_checkpoint(path: Path, like: Like | None = None, is_verified: bool = False) -> dict[str, Any]:
    """What was saved at `path`, tensors on the CPU; a checkpoint is complete in itself, wherever it lies.

    Args:
        path: its directory.
        like: says of which tensors a part is wanted; None: all are read whole.
        is_verified: whether every byte of it has been verified already.

    Raises:
        CheckpointNotFoundError: if there is no directory at the path.
        CheckpointError: if the checkpoint is incomplete or damaged, naming the file.
    """
    manifest = read_manifest(path) if is_verified else verify(path)
    with _opened(path, manifest, like) as (state, tensors):
        return dict(decode(state, tensors))


def load_parts(path: Path, parts: Collection[str], like: Like | None = None) -> dict[str, Any]:
    """Some entries of what was saved, those that are there; no other tensor is read. `like`: see `load_checkpoint`.

    The sizes of all files, and every byte of state.json, are verified; tensors are not.

    Raises:
        CheckpointNotFoundError: if there is no directory at the path.
        CheckpointError: if the checkpoint is incomplete or damaged, naming the file.
    """
    with _opened(path, verify(path, hashed=[STATE]), like) as (state, tensors):
        return {part: decode(state[part], tensors) for part in parts if part in state}


def export_weights(path: Path, folder: Path, raw: bool = False) -> None:
    """Write a checkpoint's weights, whole and in one file, and its further text files into `folder`.

    A tensor is in memory at a time, however large the model and however many processes saved it.

    Args:
        path: the checkpoint.
        folder: an empty one.
        raw: the weights as trained, of a run that averages them; else those that the checkpoint opens as.

    Raises:
        CheckpointNotFoundError: if there is no directory at the path.
        CheckpointError: if the checkpoint is incomplete or damaged, naming the file; or with `raw`, if nothing in it
            is averaged.
        OSError: if the folder cannot be written to.
    """
    manifest = verify(path)
    with contextlib.ExitStack() as stack:
        with _explained(path):
            tensors = TensorFiles(path, list(manifest["files"]), f"{MODEL_KEY}/", stack)
        named = {
            name.removeprefix(f"{MODEL_KEY}/"): name for name in tensors.shapes if name.startswith(f"{MODEL_KEY}/")
        }
        if raw:
            # A state exchanges the two before it is saved (see `training.average`).
            there = {name.removeprefix(RAW): name for name in tensors.shapes if name.startswith(RAW)}
            if not there:
                raise CheckpointError(f"{path} holds no averaged weights: what it opens as are those trained.")
            named |= there
        consolidate(tensors, {name: stored_as for stored_as, name in named.items()}, folder / "model.safetensors")
    for name in manifest["files"]:
        if name != STATE and not TENSORS.fullmatch(name):
            shutil.copyfile(path / name, folder / name)
    for file in (*folder.iterdir(), folder):
        sync(file)


def load_weights(path: Path, files: Collection[str], model: nn.Module, like: Like | None = None) -> None:
    """Copy the weights in some of a folder's files into a model, one tensor after the other, in the model's precision.

    Args:
        path: the folder: a checkpoint, or another in transformers' format.
        files: names of those that hold weights.
        model: on its device, sharded or not.
        like: see `load_checkpoint`.

    Raises:
        CheckpointError: if the files are damaged, or are not the weights of this model.
    """
    own = model.state_dict(keep_vars=True)
    with contextlib.ExitStack() as stack, torch.no_grad():
        try:
            tensors = TensorFiles(path, files, f"{MODEL_KEY}/", stack, like=like)
            given = {name.removeprefix(f"{MODEL_KEY}/"): shape for name, shape in tensors.shapes.items()}
            there = {id(own[name]) for name in given.keys() & own.keys()}
            problems = [
                f"lacks {name}" for name in own if id(own[name]) not in there
            ]  # one of several tied names will do
            problems += [f"has {name}, which the model has not" for name in sorted(given.keys() - own.keys())]
            problems += [
                f"has {name} of shape {given[name]}, and the model of {tuple(own[name].shape)}"
                for name in sorted(given.keys() & own.keys())
                if given[name] != tuple(own[name].shape)
            ]
            filled: set[int] = set()
            for name in () if problems else given:
                tensor = tensors[f"{MODEL_KEY}/{name}"].to(own[name].device, own[name].dtype)
                if id(own[name]) in filled and not torch.equal(local(own[name]), local(tensor)):
                    problems.append(f"has another {name} than what the model ties it to")
                own[name].copy_(tensor)
                filled.add(id(own[name]))
        except (OSError, SafetensorError, *MALFORMED) as error:
            raise CheckpointError(f"{path}: its weights cannot be read ({type(error).__name__}: {error}).") from error
    if problems:
        more = f" ({len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{path}: the weights do not fit the model: it {', it '.join(problems[:3])}{more}.")


def check_checkpoint(path: Path) -> None:
    """Verify every byte of a checkpoint, and that its state has all its tensors; none of them is kept in memory.

    Raises:
        CheckpointNotFoundError: if there is no directory at the path.
        CheckpointError: if the checkpoint is incomplete or damaged, naming the file.
    """
    with _opened(path, verify(path)) as (state, tensors):
        decode(state, dict.fromkeys(tensors, torch.empty(0)))


@contextlib.contextmanager
def _opened(
    path: Path, manifest: Mapping[str, Any], like: Like | None = None
) -> Iterator[tuple[dict[str, Any], TensorFiles]]:
    """The state of a checkpoint, encoded, and its tensors by name."""
    with _explained(path), contextlib.ExitStack() as stack:
        saved = json.loads((path / STATE).read_text(encoding="utf-8"))
        tensors = TensorFiles(path, list(manifest["files"]), f"{MODEL_KEY}/", stack, saved["same_as"], like)
        yield _mapping(saved["state"]), tensors


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"the state is a {type(value).__name__}")
    return value


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """A stranger's checkpoint may hold anything; what does not fit is an error of the checkpoint."""
    try:
        yield
    except (OSError, SafetensorError, *MALFORMED) as error:
        raise CheckpointError(
            f"{path}: {STATE} does not fit the tensors of the other files ({type(error).__name__}: {error})."
        ) from error
