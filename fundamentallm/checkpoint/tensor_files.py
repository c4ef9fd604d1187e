"""Tensors in safetensors files: full ones in model.safetensors and training.safetensors, shards in files of each rank.

A file's metadata says where its shards lie, in the form of torch.distributed.checkpoint's Hugging Face storage, which
can read the weights too. It is not used to write them, because it verifies nothing, and needs the optimizer's state to
exist before it is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fundamentallm.distributed.dtensor import is_sharded, local

SHARDING_INFO, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # torch's names
Like = Callable[[str, tuple[int, ...]], "Tensor | None"]
"""Maps a stored tensor's name and shape to the DTensor whose local shard should be read; None means the full tensor."""


class Region(NamedTuple):
    """The part of a tensor that a shard covers: shape of the full tensor, index in it of the shard's first element."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]


def region_of(tensor: Tensor) -> Region:
    """Returns the region of this process's shard; a tensor that is not sharded starts at 0.

    FSDP2 shards one dimension as `torch.chunk` does: all ranks but the last ones get ceil(size / ranks) elements.
    """
    offsets = [0] * tensor.ndim
    if is_sharded(tensor):
        mesh = tensor.device_mesh  # type: ignore[attr-defined]
        for mesh_dim, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
            if placement.is_shard():
                size = tensor.shape[placement.dim]
                chunk = math.ceil(size / mesh.size(mesh_dim))
                offsets[placement.dim] = min(mesh.get_coordinate()[mesh_dim] * chunk, size)
    return Region(tuple(tensor.shape), tuple(offsets))


def is_first_holder(tensor: Tensor) -> bool:
    """Returns True if this process is the first of those that hold the same shard: HSDP replicates shards."""
    coordinate = tensor.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    placements = tensor.placements  # type: ignore[attr-defined]
    return all(index == 0 for index, placement in zip(coordinate, placements, strict=True) if placement.is_replicate())


def file_name(kind: str, rank: int, num_ranks: int) -> str:
    """Returns the name of a rank's file; kind: model or training. A single process writes full tensors."""
    return f"{kind}.safetensors" if num_ranks == 1 else f"{kind}-{rank + 1:05d}-of-{num_ranks:05d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], regions: Mapping[str, Region] | None = None) -> None:
    """Write one file; `regions` has the region of each tensor by name, or is None if all tensors are full."""
    metadata = {"format": "pt"}  # required by transformers
    if regions is not None:
        info = {name: {OFFSETS: regions[name].offsets, "shape": regions[name].shape} for name in tensors}
        metadata[SHARDING_INFO] = json.dumps(info)
    save_file(dict(tensors), path, metadata=metadata)


class _Shard(NamedTuple):
    offsets: tuple[int, ...]
    size: tuple[int, ...]
    file: Any
    key: str


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a checkpoint by their path in its state. A tensor is read when it is looked up.

    Args:
        folder: of the checkpoint.
        files: names of its tensor files.
        prefix: put before the names of weights, which are all tensors outside of training*.safetensors.
        stack: closes the files.
        same_as: {further name of a tensor: name it is stored under}.
        like: see `Like`; None: read all tensors in full.

    Raises:
        ValueError: if a file cannot be opened, or shards of a tensor are missing or overlap.
    """

    def __init__(
        self,
        folder: Path,
        files: Iterable[str],
        prefix: str,
        stack: ExitStack,
        same_as: Mapping[str, str] | None = None,
        like: Like | None = None,
    ) -> None:
        self._like = like
        self._shards: dict[str, list[_Shard]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the full tensors, by name."""
        for file in files:
            try:
                handle = stack.enter_context(safe_open(folder / file, "pt"))
            except SafetensorError as error:
                raise ValueError(f"{file} is not a safetensors file: {error}") from error
            self._add(handle, "" if file.startswith("training") else prefix)
        for name, shards in self._shards.items():
            shards.sort(key=lambda shard: shard.offsets)
            if not _is_complete(self.shapes[name], shards):
                raise ValueError(f"shards of {name} are missing or overlap")
        for name, stored_as in (same_as or {}).items():
            self._shards[name], self.shapes[name] = self._shards[stored_as], self.shapes[stored_as]

    def _add(self, file: Any, prefix: str) -> None:
        info = json.loads((file.metadata() or {}).get(SHARDING_INFO, "{}"))
        for key in file.keys():  # noqa: SIM118
            size = tuple(file.get_slice(key).get_shape())
            shape = tuple(info[key]["shape"]) if key in info else size
            offsets = tuple(info[key][OFFSETS]) if key in info else (0,) * len(size)
            name = f"{prefix}{key}"
            self._shards.setdefault(name, []).append(_Shard(offsets, size, file, key))
            if self.shapes.setdefault(name, shape) != shape:
                raise ValueError(f"shards of {name} have different full shapes")

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        like = None if self._like is None else self._like(name, shape)
        return self.read(name, (0,) * len(shape), shape) if like is None else self._read_shard(name, like)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def _read_shard(self, name: str, like: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor  # takes half a second to import

        here, mesh, placements = local(like), like.device_mesh, like.placements  # type: ignore[attr-defined]
        shard = self.read(name, region_of(like).offsets, tuple(here.shape)).to(here.device)
        return DTensor.from_local(shard, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())

    def read(self, name: str, offsets: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """Read the box of a tensor that starts at `offsets`, from all shards that overlap it."""
        shards = self._shards[name]
        first = shards[0]
        if len(shards) == 1 and size == self.shapes[name]:
            return first.file.get_tensor(first.key)  # type: ignore[no-any-return]
        box = torch.empty(size, dtype=first.file.get_slice(first.key)[:0].dtype)
        for shard in shards:
            starts = [max(o, s) for o, s in zip(offsets, shard.offsets, strict=True)]
            ends = [min(o + n, s + m) for o, n, s, m in zip(offsets, size, shard.offsets, shard.size, strict=True)]
            if all(start < end for start, end in zip(starts, ends, strict=True)):
                source = tuple(slice(a - s, b - s) for a, b, s in zip(starts, ends, shard.offsets, strict=True))
                target = tuple(slice(a - o, b - o) for a, b, o in zip(starts, ends, offsets, strict=True))
                box[target] = shard.file.get_slice(shard.key)[source]
        return box


def _is_complete(shape: tuple[int, ...], shards: list[_Shard]) -> bool:
    """Returns True if the sorted shards are the full tensor, or follow each other along one dimension of it."""
    zeros = (0,) * len(shape)
    if len(shards) == 1 and (shards[0].offsets, shards[0].size) == (zeros, shape):
        return True
    if not shape or any(len(shard.size) != len(shape) for shard in shards):
        return False
    dim = next((dim for dim, size in enumerate(shards[0].size) if size != shape[dim]), 0)
    end = 0
    for shard in shards:
        length = shard.size[dim]
        if length < 1 or shard.offsets != (*zeros[:dim], end, *zeros[dim + 1 :]):
            return False
        if shard.size != (*shape[:dim], length, *shape[dim + 1 :]):
            return False
        end += length
    return end == shape[dim]
