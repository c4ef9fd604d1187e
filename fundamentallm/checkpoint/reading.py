"""Verify checkpoints and read them, in full or in part.

Every function raises CheckpointNotFoundError if there is no directory at its path, and CheckpointError, with the name
of the file, if the checkpoint is incomplete or damaged.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fundamentallm.atomic import sync
from fundamentallm.checkpoint.manifest import STATE, TENSORS, read_manifest, verify
from fundamentallm.checkpoint.snapshot import WEIGHTS
from fundamentallm.checkpoint.state_json import decode
from fundamentallm.checkpoint.tensor_files import Like, TensorFiles, write_tensors
from fundamentallm.distributed.dtensor import local
from fundamentallm.errors import CheckpointError, FundamentaLLMError

MISFIT = f"{STATE} does not fit the tensors of the other files"
"""Prefix of the weights as trained, in a checkpoint whose model weights are their average."""


def load_checkpoint(path: Path, like: Like | None = None, is_verified: bool = False) -> dict[str, Any]:
    """Load a checkpoint, wherever it is; tensors are on the CPU.

    `like` selects tensors of which only this process's shard is read; None: read all in full. With `is_verified`, no
    SHA-256 is checked, because the caller has done it.
    """
    manifest = read_manifest(path) if is_verified else verify(path)
    with _opened(path, manifest, like) as (state, tensors):
        return dict(decode(state, tensors))


def load_parts(path: Path, parts: Collection[str]) -> dict[str, Any]:
    """Load some entries of a checkpoint, those that it has. Only sizes and the SHA-256 of state.json are checked."""
    with _opened(path, verify(path, hashed=[STATE])) as (state, tensors):
        return {part: decode(state[part], tensors) for part in parts if part in state}


def check_checkpoint(path: Path) -> None:
    """Verify every byte of a checkpoint, and that it has all tensors of its state, without loading them."""
    with _opened(path, verify(path)) as (state, tensors):
        decode(state, {name: torch.empty(shape, device="meta") for name, shape in tensors.shapes.items()})


def export_weights(path: Path, folder: Path) -> None:
    """Write a checkpoint's weights into one file of an empty folder, and copy its text files."""
    manifest = verify(path)
    with explained(path, MISFIT), contextlib.ExitStack() as stack:
        files = [name for name in manifest["files"] if TENSORS.fullmatch(name) and not name.startswith("training")]
        tensors = TensorFiles(path, files, WEIGHTS, stack)
        weights = {name.removeprefix(WEIGHTS): tensors[name] for name in tensors}
    kind = files[0].partition(".")[0].partition("-")[0]  # model or adapter_model
    write_tensors(folder / f"{kind}.safetensors", weights)
    for name in manifest["files"]:
        if name != STATE and not TENSORS.fullmatch(name):
            shutil.copyfile(path / name, folder / name)
    for file in (*folder.iterdir(), folder):
        sync(file)


def load_weights(path: Path, files: Collection[str], model: nn.Module, like: Like | None = None) -> None:
    """Copy weights from `files` in a checkpoint, or another folder in transformers' format, into a model on its device.

    One tensor at a time is converted to the model's precision. For `like` see `load_checkpoint`. Raises CheckpointError
    also if they are not the weights of this model.
    """
    own = model.state_dict(keep_vars=True)
    with explained(path, "its weights cannot be read"), contextlib.ExitStack() as stack, torch.no_grad():
        tensors = TensorFiles(path, files, WEIGHTS, stack, like=like)
        given = {name.removeprefix(WEIGHTS): shape for name, shape in tensors.shapes.items()}
        # Older versions of transformers saved what follows from the config, Llama 2 among others.
        given = {name: shape for name, shape in given.items() if not name.endswith(".rotary_emb.inv_freq")}
        shared = sorted(given.keys() & own.keys())
        present = {id(own[name]) for name in shared}  # one of several tied names is enough
        problems = [f"lacks {name}" for name in own if id(own[name]) not in present]
        problems += [f"has {name}, which is not in the model" for name in sorted(given.keys() - own.keys())]
        problems += [
            f"has {name} with shape {given[name]} instead of {tuple(own[name].shape)}"
            for name in shared
            if given[name] != tuple(own[name].shape)
        ]
        filled: set[int] = set()
        for name in () if problems else shared:
            tensor = tensors[f"{WEIGHTS}{name}"].to(own[name].device, own[name].dtype)
            if id(own[name]) in filled and not torch.equal(local(own[name]), local(tensor)):
                problems.append(f"has different values for {name} and the weight that the model ties it to")
            own[name].copy_(tensor)
            filled.add(id(own[name]))
    if problems:
        more = f" ({len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{path}: the weights do not fit the model: it {', it '.join(problems[:3])}{more}.")


@contextlib.contextmanager
def _opened(
    path: Path, manifest: Mapping[str, Any], like: Like | None = None
) -> Iterator[tuple[dict[str, Any], TensorFiles]]:
    """Yields a checkpoint's encoded state and its tensors by name; closes the files on exit."""
    with explained(path, MISFIT), contextlib.ExitStack() as stack:
        saved = json.loads((path / STATE).read_text(encoding="utf-8"))
        files = filter(TENSORS.fullmatch, manifest["files"])
        tensors = TensorFiles(path, files, WEIGHTS, stack, saved["same_as"], like)
        if not isinstance(saved["state"], dict):
            raise TypeError(f"the state is a {type(saved['state']).__name__}")
        yield saved["state"], tensors


@contextlib.contextmanager
def explained(path: Path, what: str = "it cannot be read or used") -> Iterator[None]:
    """Raises CheckpointError for whatever reading a stranger's checkpoint raises; our own errors pass.

    Libraries raise anything: RecursionError, ZeroDivisionError, and tokenizers' panics, which are no `Exception`.
    """
    try:
        yield
    except (FundamentaLLMError, BrokenPipeError, torch.OutOfMemoryError):  # not of the checkpoint
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise  # an interruption
        raise CheckpointError(f"{path}: {what} ({type(error).__name__}: {error}).") from error
