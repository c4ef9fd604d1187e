"""A checkpoint in memory, copied from the state so that training can continue while it is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fundamentallm.checkpoint.manifest import MANIFEST, NAME, STATE, TENSORS
from fundamentallm.checkpoint.state_json import copy_to_cpu, encode
from fundamentallm.checkpoint.tensor_files import MODEL_KEY as MODEL_KEY
from fundamentallm.checkpoint.tensor_files import WEIGHTS, file_name, is_first_holder, sharding_info
from fundamentallm.distributed.dtensor import full, is_sharded, local
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import CheckpointError

OPTIMIZER_KEY, AVERAGE_KEY, ADAPTER_KEY = "optimizer_state_dict", "average_state_dict", "adapter_state_dict"


def plan(checkpoint: Mapping[str, Any], names: Iterable[str]) -> tuple[str, dict[str, Tensor]]:
    """Returns a state without its tensors, as JSON, and its tensors, weights first. Copies no tensor.

    Raises CheckpointError if one of `names` would leave the directory, or a value cannot be stored.
    """
    for text in names:
        if not NAME.fullmatch(text) or text in (STATE, MANIFEST) or TENSORS.fullmatch(text):
            raise CheckpointError(f"the name is {text!r}; allowed: letters, digits, '_', '-' and '.', not first.")
    tensors: dict[str, Tensor] = {}
    state = encode(checkpoint, (), tensors)
    for dtype, path in {tensor.dtype: path for path, tensor in tensors.items()}.items():
        try:
            save({"": torch.empty(0, dtype=dtype)})
        except KeyError as error:
            raise CheckpointError(f"{path} is of {dtype}, which safetensors cannot store; convert it.") from error
    # A tensor that appears twice is stored under its first name, which has to be the one in the model's file.
    weights_first = dict(sorted(tensors.items(), key=lambda item: not item[0].startswith(WEIGHTS)))
    return json.dumps(state, indent=1, allow_nan=False), weights_first


class Snapshot:
    """What one process writes of a checkpoint: a copy of the state, as JSON, and as tensors on the CPU.

    See `CheckpointManager.save`. Each process of the group takes its shards of sharded tensors, and rank 0 everything
    else too. Copies go to the memory in `buffers` that fits, which are those of an earlier snapshot. Raises
    as `plan` does.
    """

    def __init__(
        self,
        checkpoint: Mapping[str, Any],
        name: str,
        is_best: bool,
        files: Mapping[str, str],
        group: HostGroup,
        buffers: Mapping[str, Tensor],
    ) -> None:
        rank, num_ranks = group.rank, group.size
        state, tensors = plan(checkpoint, (name, *files))
        # An adapter is stored under peft's names, which peft reads unsharded. It is small, so rank 0 writes all of it.
        names = checkpoint.get(ADAPTER_KEY, {}).get("names", {})
        adapter = {f"{WEIGHTS}{own}": f"{WEIGHTS}{peft}" for own, peft in names.items()}
        tensors = {adapter.get(path, path): full(t) if path in adapter else t for path, t in tensors.items()}
        mine = {path: local(t) for path, t in tensors.items() if _is_written_by(rank, num_ranks, path, t)}
        self.copies, same_as = copy_to_cpu(mine, buffers)  # by their path in the state
        model = "adapter_model.safetensors" if adapter else file_name("model", rank, num_ranks)
        training, exported = file_name("training", rank, num_ranks), {*adapter.values()}
        by_file: dict[str, dict[str, Tensor]] = {model: {}, training: {}}
        info = {}  # where shards lie, by name in the file
        for path, tensor in self.copies.items():
            is_model = path in exported if adapter else path.startswith(WEIGHTS)
            stored_as = path.removeprefix(WEIGHTS) if is_model else path
            by_file[model if is_model else training][stored_as] = tensor
            info[stored_as] = sharding_info(tensors[path])
        # Rank 0 writes both files even if they are empty, because each kind is always there.
        self.tensors = {file: content for file, content in by_file.items() if content or rank == 0}
        self.info = info if num_ranks > 1 else None
        self.name = name
        self.about = {"step": checkpoint.get("progress_state_dict", {}).get("step"), "is_best": is_best}
        self.texts = {**files, STATE: f'{{"state": {state},\n"same_as": {json.dumps(same_as | adapter)}}}'}

    @property
    def is_finite(self) -> bool:
        """True if weights and optimizer state have no NaN or infinity. Minus infinity counts as finite (masks)."""
        for path, tensor in self.copies.items():
            if path.startswith((WEIGHTS, f"{OPTIMIZER_KEY}/")) and tensor.is_floating_point() and tensor.numel():
                wide = tensor if tensor.element_size() > 1 else tensor.float()  # float8 has no amax
                if not bool(wide.amax() < float("inf")):  # False for NaN too
                    return False
        return True


def _is_written_by(rank: int, num_ranks: int, name: str, tensor: Tensor) -> bool:
    if not is_sharded(tensor):
        return rank == 0
    if num_ranks == 1 and tensor.device_mesh.size() > 1:  # type: ignore[attr-defined]
        raise CheckpointError(f"{name} is sharded; all processes that hold shards of it have to save together.")
    return is_first_holder(tensor)
