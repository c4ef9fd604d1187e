"""Read checkpoints, in full or in part.

Every function raises CheckpointNotFoundError if there is no directory at its path, and CheckpointError, with the name
of the file, if the checkpoint is incomplete or damaged.
"""

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fundamentallm.checkpoint.manifest import STATE, TENSORS, explained as explained, verify
from fundamentallm.checkpoint.snapshot import decode
from fundamentallm.checkpoint.tensor_files import WEIGHTS, Like, TensorFiles, write_tensors
from fundamentallm.distributed.dtensor import local
from fundamentallm.errors import CheckpointError

MISFIT = f"{STATE} does not fit the tensors of the other files"


def load_checkpoint(path: Path, like: Like | None = None, hashed: Collection[str] | None = None) -> dict[str, Any]:
    """Load a checkpoint, wherever it is; tensors are on the CPU.

    `like` selects tensors of which only this process's shard is read; None: read all in full. `hashed` names the files
    whose SHA-256 is checked; None: all.
    """
    with _opened(path, hashed, like) as (state, tensors):
        return dict(decode(state, tensors))


def load_parts(path: Path, parts: Collection[str]) -> dict[str, Any]:
    """Load some entries of a checkpoint, those that it has. Only sizes and the SHA-256 of state.json are checked."""
    with _opened(path, [STATE]) as (state, tensors):
        return {part: decode(state[part], tensors) for part in parts if part in state}


@contextlib.contextmanager
def _opened(
    path: Path, hashed: Collection[str] | None, like: Like | None = None
) -> Iterator[tuple[dict[str, Any], TensorFiles]]:
    """Yields a checkpoint's encoded state and its tensors by name; explains errors."""
    files = filter(TENSORS.fullmatch, verify(path, hashed)["files"])
    with explained(path, MISFIT):
        saved = json.loads((path / STATE).read_text(encoding="utf-8"))
        yield saved["state"], TensorFiles(path, files, saved["same_as"], like)


def export_weights(path: Path, folder: Path) -> None:
    """Write a checkpoint's weights into one file of an empty folder, and copy its text files."""
    names = verify(path)["files"]
    files = [name for name in names if TENSORS.fullmatch(name) and not name.startswith("training")]
    with explained(path, MISFIT):
        tensors = TensorFiles(path, files)
        kind = files[0].partition(".")[0].partition("-")[0]  # model or adapter_model
        weights = {name.removeprefix(WEIGHTS): tensors[name] for name in tensors}
    write_tensors(folder / f"{kind}.safetensors", weights)
    for name in names:
        if name != STATE and not TENSORS.fullmatch(name):
            shutil.copyfile(path / name, folder / name)


def load_weights(path: Path, files: Collection[str], model: nn.Module, like: Like | None = None) -> None:
    """Copy weights from `files` in a checkpoint, or another folder in transformers' format, into a model on its device.

    One tensor at a time is converted to the model's precision. For `like` see `load_checkpoint`. Raises CheckpointError
    also if they are not the weights of this model.
    """
    own = model.state_dict(keep_vars=True)
    with explained(path, "its weights cannot be read"), torch.no_grad():
        tensors = TensorFiles(path, files, like=like)
        given = {name.removeprefix(WEIGHTS): tensors.shape(name) for name in tensors}
        # Older versions of transformers saved what follows from the config, Llama 2 among others.
        given = {name: shape for name, shape in given.items() if not name.endswith(".rotary_emb.inv_freq")}
        present = {id(own[name]) for name in given.keys() & own.keys()}  # one of several tied names is enough
        needed = {n: tuple(weight.shape) for n, weight in own.items() if n in given or id(weight) not in present}
        wrong = [
            f"{name} has shape {given.get(name, 'none')} instead of {needed.get(name, 'none')}"
            for name in sorted({*given, *needed})
            if given.get(name) != needed.get(name)
        ]
        filled: set[int] = set()
        for name in () if wrong else given:
            tensor = tensors[f"{WEIGHTS}{name}"].to(own[name].device, own[name].dtype)
            if id(own[name]) in filled and not torch.equal(local(own[name]), local(tensor)):
                wrong.append(f"{name} differs from the weight that the model ties it to")
            own[name].copy_(tensor)
            filled.add(id(own[name]))
    if wrong:
        more = f" ({len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise CheckpointError(f"{path}: the weights do not fit the model: {', '.join(wrong[:3])}{more}.")
