"""Tensors in safetensors files: full ones in model.safetensors and training.safetensors, shards in files of each rank.

A file's metadata says where its shards lie, as in torch.distributed.checkpoint's Hugging Face storage. That does not
write them, because it verifies nothing, and needs the optimizer's state to exist before it is loaded.
Shards are cut along the first dimension only, as FSDP2 does it.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fundamentallm.distributed.dtensor import is_sharded, local
from fundamentallm.errors import CheckpointError

MODEL_KEY = "model_state_dict"
WEIGHTS = f"{MODEL_KEY}/"
"""Prefix of the weights' paths in the state. In model.safetensors they have the names of transformers instead."""
SHARDING_INFO, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # torch's names
Like = Callable[[str, tuple[int, ...]], "Tensor | None"]
"""Maps a stored tensor's name and shape to the DTensor whose local shard should be read; None means the full tensor."""


def sharding_info(tensor: Tensor) -> dict[str, list[int]]:
    """Returns where this process's shard begins in the full tensor, and the shape of that, as torch's metadata has it.

    FSDP2 shards as `torch.chunk` does: all ranks but the last ones get ceil(rows / ranks) rows. Raises CheckpointError
    if a tensor is sharded in another way.
    """
    offsets = [0] * tensor.ndim
    if is_sharded(tensor):
        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        cut = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
        if len(cut) > 1 or not all(placements[dim].is_shard(0) for dim in cut):
            raise CheckpointError(f"a tensor has placements {placements}; allowed: sharded along its first dimension.")
        for dim in cut:
            rows = math.ceil(len(tensor) / mesh.size(dim))
            offsets[0] = min(mesh.get_coordinate()[dim] * rows, len(tensor))
    return {OFFSETS: offsets, "shape": [*tensor.shape]}


def is_first_holder(tensor: Tensor) -> bool:
    """Returns True if this process is the first of those that hold the same shard: HSDP replicates shards."""
    coordinate = tensor.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    placements = tensor.placements  # type: ignore[attr-defined]
    return all(index == 0 for index, placement in zip(coordinate, placements, strict=True) if placement.is_replicate())


def file_name(kind: str, rank: int, num_ranks: int) -> str:
    """Returns the name of a rank's file; kind: model or training. A single process writes full tensors."""
    return f"{kind}.safetensors" if num_ranks == 1 else f"{kind}-{rank + 1:05d}-of-{num_ranks:05d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None = None) -> None:
    """Write one file; `info` is {name: `sharding_info` of the tensor}, or None if all tensors are full."""
    metadata = {"format": "pt"}  # required by transformers
    if info is not None:
        metadata[SHARDING_INFO] = json.dumps({name: info[name] for name in tensors})
    save_file(dict(tensors), path, metadata=metadata)


class _Shard(NamedTuple):
    offsets: list[int]
    shape: list[int]  # of the full tensor
    size: list[int]
    file: Any
    key: str


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a checkpoint by their path in its state. A tensor is read when it is looked up.

    `same_as` is {further name of a tensor: name it is stored under}. Raises ValueError if a file cannot be opened, or
    shards of a tensor are missing or overlap.
    """

    def __init__(
        self, folder: Path, files: Iterable[str], same_as: Mapping[str, str] | None = None, like: Like | None = None
    ) -> None:
        self._like, self._shards = like, dict[str, list[_Shard]]()
        for file in files:
            try:
                handle: Any = safe_open(folder / file, "pt")
            except SafetensorError as error:
                raise ValueError(f"{file} is not a safetensors file: {error}") from error
            info = json.loads((handle.metadata() or {}).get(SHARDING_INFO, "{}"))
            for key in handle.keys():  # noqa: SIM118
                size = handle.get_slice(key).get_shape()
                region = info.get(key, {OFFSETS: [0] * len(size), "shape": size})
                shard = _Shard(region[OFFSETS], region["shape"], size, handle, key)
                name = key if file.startswith("training") else f"{WEIGHTS}{key}"
                self._shards.setdefault(name, []).append(shard)
        for name, shards in self._shards.items():
            shards.sort(key=lambda shard: shard.offsets)
            shape, end, is_whole = shards[0].shape, 0, True
            for shard in shards:
                rows = shard.size[0] if shard.size else 1
                expected = ([end, *[0] * len(shape[1:])], [rows, *shape[1:]]) if shape else ([], [])
                is_whole &= shard.shape == shape and (shard.offsets, shard.size) == expected
                end += rows
            if not is_whole or end != (shape[0] if shape else 1):
                raise ValueError(f"shards of {name} are missing or overlap")
        for name, stored_as in (same_as or {}).items():
            self._shards[name] = self._shards[stored_as]

    def __getitem__(self, name: str) -> Tensor:
        like = None if self._like is None else self._like(name, self.shape(name))
        if like is None:
            return self.read(name)
        from torch.distributed.tensor import DTensor  # takes half a second to import

        here, mesh, placements = local(like), like.device_mesh, like.placements  # type: ignore[attr-defined]
        begin = sharding_info(like)[OFFSETS][0]
        shard = self.read(name, begin, begin + len(here)).to(here.device)
        return DTensor.from_local(shard, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a full tensor."""
        return tuple(self._shards[name][0].shape)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Read rows of a tensor from all shards that have some of them; by default all rows."""
        shards, pieces = self._shards[name], []
        if len(shards) == 1 and end is None:
            return shards[0].file.get_tensor(shards[0].key)  # type: ignore[no-any-return]
        for (offset, *_), shape, (rows, *_), file, key in shards:
            start, stop = (min(max(edge - offset, 0), rows) for edge in (begin, shape[0] if end is None else end))
            pieces.append(file.get_slice(key)[start:stop])
        return torch.cat(pieces)
