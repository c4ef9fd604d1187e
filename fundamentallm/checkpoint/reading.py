"""Read checkpoints, in full or in part.

Every function raises CheckpointNotFoundError if there is no directory at its path, and CheckpointError, with the name
of the file, if the checkpoint is incomplete or damaged.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fundamentallm.checkpoint.manifest import STATE, TENSORS, explained as explained, verify
from fundamentallm.checkpoint.snapshot import OFFSETS, SHARDING_INFO, WEIGHTS, decode, sharding_info, write_tensors
from fundamentallm.distributed.dtensor import local
from fundamentallm.errors import CheckpointError

MISFIT = f"{STATE} does not fit the tensors of the other files"
Like = Callable[[str, tuple[int, ...]], "Tensor | None"]
"""Maps a stored tensor's name and shape to the DTensor whose local shard should be read; None means the full tensor."""


class Shard(NamedTuple):
    """A part of a tensor in a file, or all of it."""

    offsets: list[int]
    shape: list[int]  # of the full tensor
    size: list[int]
    file: Any
    key: str


def open_files(folder: Path, files: Iterable[str]) -> dict[str, list[Shard]]:
    """Returns the shards of each tensor by its path in the state. Raises ValueError if some are missing or overlap."""
    found: dict[str, list[Shard]] = {}
    for file in files:
        handle: Any = safe_open(folder / file, "pt")
        info = json.loads((handle.metadata() or {}).get(SHARDING_INFO, "{}"))
        for key in handle.keys():  # noqa: SIM118
            size = handle.get_slice(key).get_shape()
            region = info.get(key, {OFFSETS: [0] * len(size), "shape": size})
            name = key if file.startswith("training") else f"{WEIGHTS}{key}"
            found.setdefault(name, []).append(Shard(region[OFFSETS], region["shape"], size, handle, key))
    for name, shards in found.items():
        shards.sort(key=lambda shard: shard.offsets)
        shape, end, is_whole = shards[0].shape, 0, True
        for shard in shards:
            rows = shard.size[0] if shard.size else 1
            expected = ([end, *[0] * len(shape[1:])], [rows, *shape[1:]]) if shape else ([], [])
            is_whole &= shard.shape == shape and (shard.offsets, shard.size) == expected
            end += rows
        if not is_whole or end != (shape[0] if shape else 1):
            raise ValueError(f"shards of {name} are missing or overlap")
    return found


def read_tensor(name: str, shards: list[Shard], like: Like | None = None) -> Tensor:
    """Returns the tensor of this path, or its local shard as `like` says."""
    wanted = None if like is None else like(name, tuple(shards[0].shape))
    if wanted is None:
        return _rows(shards)
    from torch.distributed.tensor import DTensor  # takes half a second to import

    here, mesh, placements = local(wanted), wanted.device_mesh, wanted.placements  # type: ignore[attr-defined]
    begin = sharding_info(wanted)[OFFSETS][0]
    shard = _rows(shards, begin, begin + len(here)).to(here.device)
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=wanted.shape, stride=wanted.stride())


def _rows(shards: list[Shard], begin: int = 0, end: int | None = None) -> Tensor:
    if len(shards) == 1 and end is None:
        return shards[0].file.get_tensor(shards[0].key)  # type: ignore[no-any-return]
    pieces = []
    for (offset, *_), shape, (rows, *_), file, key in shards:
        start, stop = (min(max(edge - offset, 0), rows) for edge in (begin, shape[0] if end is None else end))
        pieces.append(file.get_slice(key)[start:stop])
    return torch.cat(pieces)


@contextlib.contextmanager
def _opened(
    path: Path, hashed: Collection[str] | None = None, like: Like | None = None
) -> Iterator[tuple[dict[str, Any], Callable[[str], Tensor]]]:
    """Yields a checkpoint's encoded state, and what reads a tensor by its path."""
    files = filter(TENSORS.fullmatch, verify(path, hashed)["files"])
    with explained(path, MISFIT):
        saved, shards = json.loads((path / STATE).read_text(encoding="utf-8")), open_files(path, files)
        same_as = saved["same_as"]
        yield saved["state"], lambda name: read_tensor(name, shards[same_as.get(name, name)], like)


def load_checkpoint(path: Path, like: Like | None = None, hashed: Collection[str] | None = None) -> dict[str, Any]:
    """Load a checkpoint, wherever it is; tensors are on the CPU.

    `like` selects tensors of which only this process's shard is read; None: read all in full. `hashed` names the files
    whose SHA-256 is checked; None: all.
    """
    with _opened(path, hashed, like) as (state, read):
        return dict(decode(state, read))


def load_parts(path: Path, parts: Collection[str]) -> dict[str, Any]:
    """Load some entries of a checkpoint, those that it has. Only sizes and the SHA-256 of state.json are checked."""
    with _opened(path, [STATE]) as (state, read):
        return {part: decode(state[part], read) for part in parts if part in state}


def export_weights(path: Path, folder: Path) -> None:
    """Write a checkpoint's weights into one file of an empty folder, and copy its text files."""
    names = verify(path)["files"]
    files = [name for name in names if TENSORS.fullmatch(name) and not name.startswith("training")]
    with explained(path, MISFIT):
        shards = open_files(path, files)
        weights = {name.removeprefix(WEIGHTS): read_tensor(name, shards[name]) for name in shards}
        kind = "adapter_model" if files[0].startswith("adapter") else "model"
    write_tensors(folder / f"{kind}.safetensors", weights)
    for name in names:
        if name != STATE and not TENSORS.fullmatch(name):
            shutil.copyfile(path / name, folder / name)


def load_weights(path: Path, files: Collection[str], model: nn.Module, like: Like | None = None) -> None:
    """Copy weights from `files` in a checkpoint, or another folder in transformers' format, into a model.

    For `like` see `load_checkpoint`. Raises CheckpointError also if they are not the weights of this model.
    """
    own, first = model.state_dict(keep_vars=True), dict[int, str]()
    with explained(path, "its weights do not fit the model"):
        shards = open_files(path, files)
        # Older versions of transformers saved what follows from the config, Llama 2 among others.
        names = [name for name in shards if not name.endswith(".rotary_emb.inv_freq")]
        given = {name.removeprefix(WEIGHTS): read_tensor(name, shards[name], like) for name in names}
        for name in [name for name in given if name in own]:
            other = first.setdefault(id(own[name]), name)
            if other != name and not torch.equal(local(given[other]), local(given[name])):
                raise CheckpointError(f"{path}: {name} differs from {other}, which the model ties it to.")
        missing, unknown = model.load_state_dict(given, strict=False)
        wrong = [*unknown, *(name for name in missing if id(own[name]) not in first)]  # one of several tied names does
        if wrong:
            raise CheckpointError(f"{path}: {len(wrong)} weights are missing or not of this model, such as {wrong[0]}.")
