"""Tensors in safetensors files: full ones in model.safetensors and training.safetensors, shards in files of each rank.

A file's metadata says where its shards lie, as in torch.distributed.checkpoint's Hugging Face storage. That does not
write them, because it verifies nothing, and needs the optimizer's state to exist before it is loaded.
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

    `prefix` is put before the names of weights, which are all tensors outside of training*.safetensors. `stack` closes
    the files. `same_as` is {further name of a tensor: name it is stored under}. Raises ValueError if a file cannot be
    opened, or shards of a tensor are missing or overlap.
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
        self._dims: dict[str, int] = {}  # along which the shards follow each other
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the full tensors, by name."""
        for file in files:
            try:
                handle = stack.enter_context(safe_open(folder / file, "pt"))
            except SafetensorError as error:
                raise ValueError(f"{file} is not a safetensors file: {error}") from error
            info = json.loads((handle.metadata() or {}).get(SHARDING_INFO, "{}"))
            for key in handle.keys():  # noqa: SIM118
                size = tuple(handle.get_slice(key).get_shape())
                full = {OFFSETS: (0,) * len(size), "shape": size}
                offsets, shape = (tuple(info.get(key, full)[entry]) for entry in (OFFSETS, "shape"))
                name = key if file.startswith("training") else f"{prefix}{key}"
                self._shards.setdefault(name, []).append(_Shard(offsets, size, handle, key))
                if self.shapes.setdefault(name, shape) != shape:
                    raise ValueError(f"shards of {name} have different full shapes")
        for name, shards in self._shards.items():
            shards.sort(key=lambda shard: shard.offsets)
            dim = _sharded_dim(self.shapes[name], shards)
            if dim is None:
                raise ValueError(f"shards of {name} are missing or overlap")
            self._dims[name] = dim
        for name, stored_as in (same_as or {}).items():
            self._shards[name] = self._shards[stored_as]
            self._dims[name] = self._dims[stored_as]
            self.shapes[name] = self.shapes[stored_as]

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        like = None if self._like is None else self._like(name, shape)
        if like is None:
            return self.read(name, (0,) * len(shape), shape)
        from torch.distributed.tensor import DTensor  # takes half a second to import

        here, mesh, placements = local(like), like.device_mesh, like.placements  # type: ignore[attr-defined]
        shard = self.read(name, region_of(like).offsets, tuple(here.shape)).to(here.device)
        return DTensor.from_local(shard, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, name: str, offsets: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """Read the box of a tensor that starts at `offsets`, from all shards that overlap it."""
        shards, dim = self._shards[name], self._dims[name]
        if len(shards) == 1 and size == self.shapes[name]:
            return shards[0].file.get_tensor(shards[0].key)  # type: ignore[no-any-return]
        box = [slice(start, start + length) for start, length in zip(offsets, size, strict=True)]
        pieces = []
        for shard in shards:
            begin, length = shard.offsets[dim], shard.size[dim]
            start = min(max(offsets[dim] - begin, 0), length)
            box[dim] = slice(start, max(min(offsets[dim] + size[dim] - begin, length), start))
            pieces.append(shard.file.get_slice(shard.key)[tuple(box)])
        return torch.cat(pieces, dim)


def _sharded_dim(shape: tuple[int, ...], shards: list[_Shard]) -> int | None:
    """Returns the dimension along which the sorted shards follow each other to the full tensor, or None."""
    first, zeros = shards[0], (0,) * len(shape)
    if len(shards) == 1:
        return 0 if (first.offsets, first.size) == (zeros, shape) else None
    dim = next((dim for dim, size in enumerate(first.size[: len(shape)]) if size != shape[dim]), 0)
    end = 0
    for shard in shards:
        length = shard.size[dim] if len(shard.size) == len(shape) > 0 else 0
        offsets, size = (*zeros[:dim], end, *zeros[dim + 1 :]), (*shape[:dim], length, *shape[dim + 1 :])
        if length == 0 or (shard.offsets, shard.size) != (offsets, size):
            return None
        end += length
    return dim if end == shape[dim] else None
