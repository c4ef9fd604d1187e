"""Pieces of tensors are read back whole and in any slice, and nothing that is not all there passes for a tensor."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import get_total_norm

from fundamentallm.checkpoint.tensor_files import (
    OFFSETS,
    PLACES,
    Place,
    TensorFiles,
    consolidate,
    file_name,
    write_tensors,
)
from fundamentallm.distributed.dtensor import total_norm

WHOLE = torch.arange(7 * 5 * 3).view(7, 5, 3).float()


def write(folder: Path, number: int, pieces: dict[str, tuple[Tensor, Place]], count: int = 3) -> str:
    name = file_name("model", (number, count))
    tensors = {key: tensor.contiguous() for key, (tensor, _) in pieces.items()}
    write_tensors(folder / name, tensors, {key: place for key, (_, place) in pieces.items()})
    return name


def sliced(tensor: Tensor, bounds: list[int], dim: int) -> list[tuple[Tensor, Place]]:
    """Slices of a tensor along a dimension."""
    pieces = []
    for begin, end in zip([0, *bounds], [*bounds, tensor.shape[dim]], strict=True):
        offsets = [0] * tensor.ndim
        offsets[dim] = begin
        pieces.append((tensor.narrow(dim, begin, end - begin), Place(tuple(tensor.shape), tuple(offsets))))
    return pieces


def opened(folder: Path, stack: ExitStack, **options: Any) -> TensorFiles:
    return TensorFiles(folder, sorted(path.name for path in folder.iterdir()), "model/", stack, **options)


@pytest.mark.parametrize("dtypes", [[], [torch.float32], [torch.float32] * 3, [torch.float32, torch.bfloat16]])
def test_the_norm_is_torchs(dtypes: list[torch.dtype]) -> None:
    tensors = [torch.full((2, 3 + i), 1.5 + i, dtype=dtype) for i, dtype in enumerate(dtypes)]
    assert torch.equal(total_norm(tensors), get_total_norm(tensors))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_slices_are_read_back_whole_and_in_any_box(tmp_path: Path, dim: int) -> None:
    for number, piece in enumerate(sliced(WHOLE, [1, 2], dim)):
        others = {"scalar": (torch.tensor(3.0), Place((), ()))} if number == 0 else {}
        write(tmp_path, number, {"w": piece, **others})
    (tmp_path / "state.json").write_text("{}")
    with ExitStack() as stack:
        files = opened(tmp_path, stack, same_as={"model/tied": "model/w"})
        assert set(files) == {"model/w", "model/scalar", "model/tied"}
        assert torch.equal(files["model/w"], WHOLE)
        assert torch.equal(files["model/tied"], WHOLE)
        assert files["model/scalar"].item() == 3
        assert (files.shapes["model/w"], files.dtype("model/w"), files.num_bytes("model/w")) == ((7, 5, 3), "F32", 420)
        for offsets, size in (
            ((2, 1, 0), (4, 3, 2)),
            ((0, 0, 0), (1, 1, 1)),
            ((6, 4, 2), (1, 1, 1)),
            ((3, 0, 0), (0, 5, 3)),
        ):
            box = tuple(slice(o, o + s) for o, s in zip(offsets, size, strict=True))
            assert torch.equal(files._box("model/w", offsets, size), WHOLE[box])


@given(
    places=st.lists(st.tuples(st.integers(-2, 8), st.integers(0, 8), st.integers(-1, 2)), min_size=1, max_size=4),
    shape=st.sampled_from([[7, 2], [7], [14], [], [7, 2, 1], [8, 2], [7, 3]]),
)
def test_pieces_that_are_not_the_whole_are_no_tensor(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int, int]], shape: list[int]
) -> None:
    """Whatever the metadata say: either all of it, exactly once, or an error; never memory that was not read."""
    folder, whole = tmp_path_factory.mktemp("pieces"), torch.arange(14.0).view(7, 2)
    intervals = []
    for number, (begin, length, column) in enumerate(places):
        piece = whole[max(begin, 0) : max(begin, 0) + length].contiguous()
        intervals.append((begin, begin + len(piece)))
        place = {"w": {OFFSETS: [begin, column], "shape": shape}}
        save_file({"w": piece}, folder / file_name("model", (number, 4)), {PLACES: json.dumps(place)})
    intervals.sort()
    covers = [begin for begin, _ in intervals] == [0, *(end for _, end in intervals)][:-1] and intervals[-1][1] == 7
    good = (
        covers
        and shape == [7, 2]
        and all(column == 0 for _, _, column in places)
        and all(begin < end for begin, end in intervals)
    )
    with ExitStack() as stack:
        if good:
            assert torch.equal(opened(folder, stack)["model/w"], whole)
        else:
            with pytest.raises(ValueError, match="pieces of model/w are not"):
                opened(folder, stack)


@pytest.mark.parametrize("metadata", ["{", '{"w": {}}', '{"w": {"shape": 3, "saved_offsets": 1}}'])
def test_metadata_of_another_form_are_an_error(tmp_path: Path, metadata: str) -> None:
    save_file({"w": WHOLE}, tmp_path / file_name("model", (0, 2)), {PLACES: metadata})
    with ExitStack() as stack, pytest.raises((ValueError, KeyError, TypeError)):
        opened(tmp_path, stack)


def test_one_file_for_transformers(tmp_path: Path) -> None:
    narrow = (WHOLE / 7).bfloat16()
    tensors = {"w": WHOLE, "narrow": narrow, "flag": torch.tensor([True, False, True]), "s": torch.tensor(2)}
    for number, (w, n) in enumerate(zip(sliced(WHOLE, [3], 0), sliced(narrow, [3], 0), strict=True)):
        rest = {
            key: (tensors[key], Place(tuple(tensors[key].shape), (0,) * tensors[key].ndim)) for key in ("flag", "s")
        }
        write(tmp_path, number, {"w": w, "narrow": n, **(rest if number == 0 else {})}, count=2)
    with ExitStack() as stack:
        files = opened(tmp_path, stack)
        consolidate(files, {f"model/{name}": name for name in tensors}, tmp_path / "out.safetensors")
    loaded = load_file(tmp_path / "out.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_reader_reads_the_slices(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    for number, piece in enumerate(sliced(WHOLE, [2, 4], 0)):
        write(tmp_path, number, {"w": piece})
    read = {"w": torch.empty_like(WHOLE)}
    dcp.load(read, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert torch.equal(read["w"], WHOLE)
