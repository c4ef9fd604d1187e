"""A checkpoint in memory: what is saved, copied so that the training may go on, and compared with what was written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from fundamentallm.errors import CheckpointError
from fundamentallm.training.manifest import MANIFEST, MODEL, NAME, STATE, TRAINING
from fundamentallm.training.serialization import encode, unshare

MODEL_KEY, OPTIMIZER_KEY = "model_state_dict", "optimizer_state_dict"


class Snapshot(NamedTuple):
    """A checkpoint in memory, ready to be written."""

    name: str
    about: dict[str, Any]
    state: dict[str, Any]
    weights: dict[str, Tensor]
    others: dict[str, Tensor]
    files: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        """Size on the disk, but for the tensors' headers."""
        texts = len(json.dumps(self.state)) + sum(map(len, self.files.values()))
        return texts + sum(tensor.nbytes for tensors in (self.weights, self.others) for tensor in tensors.values())


def take_snapshot(
    checkpoint: Mapping[str, Any], name: str, is_best: bool, files: Mapping[str, str], copy: bool
) -> Snapshot:
    """`checkpoint` as JSON and tensors on the CPU; with `copy`, nothing that happens afterwards changes them.

    Raises:
        CheckpointError: if the name would leave its directory, or a value is neither tensor nor JSON.
    """
    for text in (name, *files):
        if not NAME.fullmatch(text) or text in (STATE, MODEL, TRAINING, MANIFEST):
            raise CheckpointError(f"the name is {text!r}; allowed: letters, digits, '_', '-' and '.', not first.")
    tensors: dict[str, Tensor] = {}
    state = encode(checkpoint, (), tensors)
    # The model's first: a tensor that is there twice is stored under its first name.
    of_model = {key: value for key, value in tensors.items() if key.startswith(MODEL_KEY + "/")}
    stored, same_as = unshare(of_model | tensors, copy)
    weights = {key.removeprefix(MODEL_KEY + "/"): stored[key] for key in of_model if key in stored}
    others = {key: value for key, value in stored.items() if key not in of_model}
    step = checkpoint.get("progress_state_dict", {}).get("step")
    about = {"step": step, "is_best": is_best}
    return Snapshot(name, about, {"state": state, "same_as": same_as}, weights, others, dict(files))


def is_finite(snapshot: Snapshot) -> bool:
    """Whether weights and moments are. Minus infinity is not counted: attention masks are made of it."""
    moments = (value for key, value in snapshot.others.items() if key.startswith(OPTIMIZER_KEY + "/"))
    floating = (tensor for tensor in (*snapshot.weights.values(), *moments) if tensor.is_floating_point())
    wide = (tensor if tensor.element_size() > 1 else tensor.float() for tensor in floating if tensor.numel())
    return all(bool((tensor.amax() < float("inf")).item()) for tensor in wide)  # NaN is below nothing


def read_back(
    folder: Path, weights: Mapping[str, Tensor], others: Mapping[str, Tensor], texts: Mapping[str, str]
) -> None:
    """Compare what is on the disk with what is in memory: the manifest's hashes only say what was written.

    Raises:
        CheckpointError: naming the file that differs.
    """
    for name, tensors in ((MODEL, weights), (TRAINING, others)):
        _forget(folder / name)
        with safe_open(folder / name, "pt") as file:
            same = set(file.keys()) == tensors.keys() and all(
                torch.equal(_raw(file.get_tensor(key)), _raw(tensor)) for key, tensor in tensors.items()
            )
        if not same:
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


def _raw(tensor: Tensor) -> Tensor:
    """The bytes of a dense tensor, so that NaN equals NaN."""
    return tensor.reshape(-1).view(torch.uint8)
