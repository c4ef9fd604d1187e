"""Shards of tensors are read in full, or those of a process, and incomplete shards are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from hypothesis import given, strategies as st
from safetensors.torch import save_file

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.checkpoint.reading import load_checkpoint, open_files, read_tensor
from fundamentallm.checkpoint.snapshot import OFFSETS, SHARDING_INFO, write_tensors
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import CheckpointError


@given(
    regions=st.lists(st.tuples(st.integers(-2, 8), st.integers(0, 8), st.integers(-1, 2)), min_size=1, max_size=4),
    shape=st.sampled_from([[7, 2], [7], [14], [], [7, 2, 1], [8, 2], [7, 3]]),
)
def test_tensor_files_refuse_shards_that_miss_or_overlap(
    tmp_path_factory: pytest.TempPathFactory, regions: list[tuple[int, int, int]], shape: list[int]
) -> None:
    """Whatever the metadata says: every element exactly once, or an error, and never uninitialized memory."""
    folder, full = tmp_path_factory.mktemp("shards"), torch.arange(14.0).view(7, 2)
    intervals = []
    for rank, (begin, length, column) in enumerate(regions):
        shard = full[max(begin, 0) : max(begin, 0) + length].contiguous()
        intervals.append((begin, begin + len(shard)))
        info = {"w": {OFFSETS: [begin, column], "shape": shape}}
        save_file({"w": shard}, folder / f"model-{rank}.safetensors", {SHARDING_INFO: json.dumps(info)})
    intervals.sort()
    follow = [begin for begin, _ in intervals] == [0, *(end for _, end in intervals)][:-1] and intervals[-1][1] == 7
    names = sorted(path.name for path in folder.iterdir())
    is_good = follow and shape == [7, 2] and all(column == 0 for _, _, column in regions)
    if is_good:
        assert torch.equal(read_tensor("w", open_files(folder, names)["model_state_dict/w"]), full)
    else:
        with pytest.raises(ValueError, match="model_state_dict/w"):
            open_files(folder, names)


def save_and_load_uneven_shards(folder: str) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = torch.distributed.init_device_mesh("cpu", (3,))
    placements = {"rows": Shard(0), "one": Shard(0), "copied": Replicate()}
    full = {name: torch.arange(10.0).view(5, 2) if name != "one" else torch.ones(1) for name in placements}
    tensors = {name: distribute_tensor(full[name], mesh, [placement]) for name, placement in placements.items()}
    manager = CheckpointManager(folder, group=HostGroup())
    path = manager.save({"w": tensors})
    saved = load_checkpoint(path)["w"]
    assert all(torch.equal(saved[name], full[name]) for name in full)
    sharded: dict[str, Any] = load_checkpoint(path, lambda name, shape: tensors[name.removeprefix("w/")])["w"]
    assert all(torch.equal(sharded[name].to_local(), tensors[name].to_local()) for name in full)
    with pytest.raises(CheckpointError, match="first dimension"):
        manager.save({"w": distribute_tensor(full["rows"], mesh, [Shard(1)])}, "columns")


def test_load_checkpoint_of_uneven_shards_is_exact(tmp_path: Path) -> None:
    """Five rows cannot be divided by three, and of one row two processes hold nothing."""
    debug_launcher(save_and_load_uneven_shards, (str(tmp_path),), num_processes=3)
    assert len(list(tmp_path.glob("checkpoint/training-*-of-00003.safetensors"))) == 3


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_write_tensors_is_read_by_torchs_reader(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    full = torch.arange(7 * 5 * 3).view(7, 5, 3).float()
    for rank, shard in enumerate(full.split([2, 2, 3])):
        info = {"w": {OFFSETS: [2 * rank, 0, 0], "shape": [7, 5, 3]}}
        write_tensors(tmp_path / f"model-{rank}.safetensors", {"w": shard.clone()}, info)
    read = {"w": torch.empty_like(full)}
    dcp.load(read, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert torch.equal(read["w"], full)
