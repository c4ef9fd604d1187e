"""Tensors in safetensors files: whole ones, and of sharded ones what each process holds.

    model.safetensors                    whole tensors; opens in transformers as it is
    model-00002-of-00004.safetensors     what the second of four processes held, under the tensors' own names
    training.safetensors, training-00002-of-00004.safetensors      likewise, for all that is no weight

Where a piece belongs stands in its file's metadata, in the form of torch.distributed.checkpoint's Hugging Face
storage, which can therefore read the weights too. (It is not what writes them: it checks nothing, wants the
optimizer's state made before it is loaded, and keeps no account of which files belong together.)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fundamentallm.checkpoint.manifest import TENSORS
from fundamentallm.distributed.dtensor import is_sharded, local

PLACES, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # torch's names
Like = Callable[[str, tuple[int, ...]], "Tensor | None"]
"""Of a stored tensor's name and shape: the sharded tensor whose part of it is wanted; None: the whole is."""


class Place(NamedTuple):
    """Where a piece belongs: the shape of the whole tensor, and the indices in it of the piece's first element."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]


def place_of(tensor: Tensor) -> Place:
    """Where what this process holds of `tensor` belongs."""
    if not is_sharded(tensor):
        return Place(tuple(tensor.shape), (0,) * tensor.ndim)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    return Place(tuple(tensor.shape), tuple(offsets))


def is_first_holder(tensor: Tensor) -> bool:
    """Whether no process before this one in its mesh holds the same piece of a sharded tensor."""
    coordinate = tensor.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    return not any(
        index and placement.is_replicate()
        for index, placement in zip(coordinate, tensor.placements, strict=True)  # type: ignore[attr-defined]
    )


def file_name(kind: str, part: tuple[int, int] | None) -> str:
    """The file of whole tensors, or of the pieces of process `part[0]` of `part[1]`; kind: model or training."""
    return f"{kind}.safetensors" if part is None else f"{kind}-{part[0] + 1:05d}-of-{part[1]:05d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], places: Mapping[str, Place] | None = None) -> None:
    """Write one file; `places`: of pieces, each tensor's; None: all are whole."""
    metadata = {"format": "pt"}  # transformers asks for it
    if places is not None:
        metadata[PLACES] = json.dumps(
            {name: {OFFSETS: places[name].offsets, "shape": places[name].shape} for name in tensors}
        )
    save_file(dict(tensors), path, metadata=metadata)


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a checkpoint by their path in its state; each is read when it is asked for.

    Args:
        folder: of the checkpoint.
        files: names of its files; those that hold no tensors are left alone.
        prefix: put before the names of the weights.
        stack: closes the files.
        same_as: further names of tensors, each with the one it is stored under.
        like: which tensors to read a part of only; None: none.

    Raises:
        ValueError: if a file cannot be opened, or the pieces of a tensor are not all there.
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
        self._like, self._same_as = like, same_as or {}
        self._pieces: dict[str, list[tuple[Any, str, tuple[int, ...], tuple[int, ...]]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            if match := TENSORS.fullmatch(file):
                handle = stack.enter_context(_opened(folder / file))
                places = json.loads((handle.metadata() or {}).get(PLACES, "{}"))
                for key in handle.keys():  # noqa: SIM118
                    name = f"{prefix}{key}" if match[1] == "model" else key
                    size = tuple(handle.get_slice(key).get_shape())
                    shape = tuple(places[key]["shape"]) if key in places else size
                    offsets = tuple(places[key][OFFSETS]) if key in places else (0,) * len(size)
                    self._pieces.setdefault(name, []).append((handle, key, offsets, size))
                    if self.shapes.setdefault(name, shape) != shape:
                        raise ValueError(f"the pieces of {name} are not of one tensor")
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[2])
            if not _is_whole(self.shapes[name], [(offsets, size) for _, _, offsets, size in pieces]):
                raise ValueError(f"the pieces of {name} are not all there")

    def dtype(self, name: str) -> str:
        """As safetensors calls it, such as F32."""
        handle, key, _, _ = self._pieces[name][0]
        return str(handle.get_slice(key).get_dtype())

    def num_bytes(self, name: str) -> int:
        """Of the whole tensor."""
        bits = re.search(r"\d+", self.dtype(name))  # F32, BF16, F8_E4M3; a BOOL is a byte
        return math.prod(self.shapes[name]) * (int(bits[0]) if bits else 8) // 8

    def __getitem__(self, name: str) -> Tensor:
        name = self._same_as.get(name, name)
        shape = self.shapes[name]
        like = None if self._like is None else self._like(name, shape)
        return self._box(name, (0,) * len(shape), shape) if like is None else self._part(name, like)

    def __iter__(self) -> Iterator[str]:
        yield from self._pieces
        yield from (name for name, stored_as in self._same_as.items() if stored_as in self._pieces)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _part(self, name: str, like: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        here, mesh, placements = local(like), like.device_mesh, like.placements  # type: ignore[attr-defined]
        part = self._box(name, place_of(like).offsets, tuple(here.shape)).to(here.device)
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())

    def _box(self, name: str, offsets: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The elements of a tensor from `offsets` on."""
        pieces = self._pieces[name]
        handle, key, _, _ = pieces[0]
        if len(pieces) == 1 and size == self.shapes[name]:
            return handle.get_tensor(key)  # type: ignore[no-any-return]
        box = torch.empty(size, dtype=handle.get_slice(key)[:0].dtype)
        for handle, key, first, length in pieces:
            starts = [max(o, f) for o, f in zip(offsets, first, strict=True)]
            ends = [min(o + s, f + n) for o, s, f, n in zip(offsets, size, first, length, strict=True)]
            if all(start < end for start, end in zip(starts, ends, strict=True)):
                there = tuple(slice(s - f, e - f) for s, e, f in zip(starts, ends, first, strict=True))
                here = tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, offsets, strict=True))
                box[here] = handle.get_slice(key)[there]
        return box


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path.name} is no file of tensors: {error}") from error


def _is_whole(shape: tuple[int, ...], pieces: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether (offsets, size) of pieces, in order, make up the whole: one piece, or slices along one dimension."""
    if pieces == [((0,) * len(shape), shape)]:
        return True
    if any(len(offsets) != len(shape) or len(size) != len(shape) for offsets, size in pieces):
        return False
    along = next((dim for dim in range(len(shape)) if pieces[0][1][dim] != shape[dim]), 0)
    end = 0
    for offsets, size in pieces:
        if not shape or size[along] < 1:
            return False
        if offsets != (*(0,) * along, end, *(0,) * (len(shape) - along - 1)):
            return False
        if size != (*shape[:along], size[along], *shape[along + 1 :]):
            return False
        end += size[along]
    return end == shape[along]


def consolidate(source: TensorFiles, names: Mapping[str, str], path: Path) -> None:
    """Write tensors into one file that opens in transformers, one of them in memory at a time.

    Args:
        source: of the tensors.
        names: {name in the source: name in the file}.
        path: of the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, stored_as in names.items():
        begin, end = end, end + source.num_bytes(name)
        header[stored_as] = {
            "dtype": source.dtype(name),
            "shape": source.shapes[name],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    # safetensors' own writer wants all of them in memory. The format: the header's length, the header, the tensors.
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(source[name].reshape(-1).view(torch.uint8).numpy().data)
