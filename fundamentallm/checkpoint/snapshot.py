"""A checkpoint in memory: what is saved, copied so that the training may go on, and compared with what was written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fundamentallm.checkpoint.manifest import MANIFEST, NAME, STATE, TENSORS
from fundamentallm.checkpoint.state_json import encode, unshare
from fundamentallm.checkpoint.tensor_files import Place, file_name, is_first_holder, place_of
from fundamentallm.distributed.dtensor import is_sharded, local
from fundamentallm.errors import CheckpointError

BLOCK = 1 << 22
"""Bytes that are read back at once."""
MODEL_KEY, OPTIMIZER_KEY, AVERAGE_KEY = "model_state_dict", "optimizer_state_dict", "average_state_dict"


class Snapshot(NamedTuple):
    """A checkpoint in memory, ready to be written: all of it, or what one of several processes writes of it."""

    name: str
    about: dict[str, Any]
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    """By file, then by name."""
    places: dict[str, Place] | None
    """Where each tensor's piece belongs, by name; None: all are whole."""
    copies: Mapping[str, Tensor]
    """All tensors, by their path in the state."""
    files: Mapping[str, str]
    """Text files, by name."""
    num_bytes: int
    """Size on the disk of all that the processes write together, but for the tensors' headers."""

    @property
    def is_finite(self) -> bool:
        """Whether weights and moments are. Minus infinity is not counted: attention masks are made of it."""
        checked = (
            tensor
            for file, tensors in self.tensors.items()
            for key, tensor in tensors.items()
            if file.startswith("model") or key.startswith(OPTIMIZER_KEY + "/")
        )
        floating = (tensor for tensor in checked if tensor.is_floating_point())
        wide = (tensor if tensor.element_size() > 1 else tensor.float() for tensor in floating if tensor.numel())
        return all(bool((tensor.amax() < float("inf")).item()) for tensor in wide)  # NaN is below nothing


def take_snapshot(
    checkpoint: Mapping[str, Any],
    name: str,
    is_best: bool,
    files: Mapping[str, str],
    copy: bool,
    part: tuple[int, int] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> Snapshot:
    """`checkpoint` as JSON and tensors on the CPU.

    Args:
        checkpoint: the state.
        name: of the checkpoint's directory.
        is_best: whether it is the best so far.
        files: further text files, by name.
        copy: whether the state changes before the snapshot is written, so that no memory may be shared with it.
        part: (index, number) of this process among those that write the checkpoint together: each writes what it
            holds of the sharded tensors, and the first all else; None: this process writes everything.
        buffers: memory to copy to, of an earlier snapshot that is not needed any more; None: new memory.

    Raises:
        CheckpointError: if the name would leave its directory, or a value is neither tensor nor JSON.
    """
    for text in (name, *files):
        if not NAME.fullmatch(text) or text in (STATE, MANIFEST) or TENSORS.fullmatch(text):
            raise CheckpointError(f"the name is {text!r}; allowed: letters, digits, '_', '-' and '.', not first.")
    tensors: dict[str, Tensor] = {}
    state = encode(checkpoint, (), tensors)
    # The model's first: a tensor that is there twice is stored under its first name.
    of_model = {key: value for key, value in tensors.items() if key.startswith(MODEL_KEY + "/")}
    tensors = of_model | tensors
    mine = {key: local(value) for key, value in tensors.items() if _writes(key, value, part)}
    stored, same_as = unshare(mine, copy, buffers)

    by_file: dict[str, dict[str, Tensor]] = {file_name(kind, part): {} for kind in ("model", "training")}
    for key, value in stored.items():
        by_file[file_name("model" if key in of_model else "training", part)][_in_file(key)] = value
    num_bytes = len(json.dumps(state)) + sum(map(len, files.values()))
    num_bytes += sum(value.nbytes for key, value in tensors.items() if key not in same_as)
    about = {"step": checkpoint.get("progress_state_dict", {}).get("step"), "is_best": is_best}
    return Snapshot(
        name,
        about,
        {"state": state, "same_as": same_as},
        # Of each kind there is one, though it be empty.
        {file: content for file, content in by_file.items() if content or part is None or part[0] == 0},
        None if part is None else {_in_file(key): place_of(tensors[key]) for key in stored},
        stored,
        dict(files),
        num_bytes,
    )


def _in_file(key: str) -> str:
    """A tensor's name in its file: weights go by transformers' names, all else by the path in the state."""
    return key.removeprefix(MODEL_KEY + "/")


def _writes(name: str, tensor: Tensor, part: tuple[int, int] | None) -> bool:
    """Whether this process writes (what it holds of) a tensor."""
    if not is_sharded(tensor):
        return part is None or part[0] == 0
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if part is None and mesh.size() > 1:
        raise CheckpointError(f"{name} is sharded; the processes that hold it have to save it together.")
    if any(placement.is_partial() for placement in placements) or sum(not p.is_replicate() for p in placements) > 1:
        raise CheckpointError(
            f"{name} has the placements {placements}; allowed: sharded along one dimension, or whole."
        )
    return is_first_holder(tensor) and (local(tensor).numel() > 0 or part is None or part[0] == 0)


def read_back(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]) -> None:
    """Compare what is on the disk with what is in memory: the manifest's hashes only say what was written.

    Raises:
        CheckpointError: naming the file that differs.
    """
    for name, content in tensors.items():
        _forget(folder / name)
        if not _holds(folder / name, content):
            raise CheckpointError(f"{folder / name} was not written as it is in memory; the disk may be failing.")
    for name, text in texts.items():
        _forget(folder / name)
        if (folder / name).read_bytes() != text.encode():
            raise CheckpointError(f"{folder / name} was not written as it is in memory; the disk may be failing.")


def _forget(path: Path) -> None:
    """Have the next read of a synced file come from the disk, where the system lets us."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _holds(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a safetensors file holds these tensors, to the bit.

    By plain reads, which leave the interpreter to the thread that trains; the library's hold it while the disk answers.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length))
            places = {name: header[name]["data_offsets"][0] for name in header.keys() - {"__metadata__"}}
            return places.keys() == tensors.keys() and all(
                file.seek(8 + length + place) and _same(file, tensors[name]) for name, place in places.items()
            )
        except (AttributeError, LookupError, MemoryError, OverflowError, TypeError, ValueError):  # not what was written
            return False


def _same(file: BufferedReader, tensor: Tensor) -> bool:
    """Whether the next bytes of a file are those of a dense tensor, so that NaN equals NaN."""
    raw = tensor.reshape(-1).view(torch.uint8).numpy()
    block = np.empty(min(BLOCK, len(raw)), np.uint8)
    for begin in range(0, len(raw), BLOCK):
        expected = raw[begin : begin + BLOCK]
        if file.readinto(block.data) < len(expected) or not np.array_equal(block[: len(expected)], expected):
            return False
    return True
