"""What a checkpoint stores: a state as JSON and named tensors, copied to memory, so that training can continue."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from fundamentallm.checkpoint.manifest import MANIFEST, NAME, STATE, TENSORS
from fundamentallm.distributed.dtensor import full, is_sharded, local
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import CheckpointError

MODEL_KEY, OPTIMIZER_KEY = "model_state_dict", "optimizer_state_dict"
AVERAGE_KEY, ADAPTER_KEY = "average_state_dict", "adapter_state_dict"
WEIGHTS = f"{MODEL_KEY}/"
"""Prefix of the weights' paths in the state. In model.safetensors they have the names of transformers instead."""
SHARDING_INFO, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Names in the metadata of a file with shards, those of torch.distributed.checkpoint's Hugging Face storage. That does
not write them, because it verifies nothing, and needs the optimizer's state to exist before it is loaded."""

# JSON has no tensors, tuples, non-finite numbers, or dicts whose keys are not text. Each is stored as an object with
# one of these keys.
_TENSOR, _TUPLE, _FLOAT, _DICT, _COUNTER = _RESERVED = "__tensor__", "__tuple__", "__float__", "__dict__", "__counter__"
_ORDER = "order"
"""Dimensions of a tensor by descending stride. An optimizer may compute other bits from another memory layout."""


def encode(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """Returns `value` as JSON and adds its tensors to `tensors` by their path, escaped as in RFC 6901."""
    where = "/".join(key.replace("~", "~0").replace("/", "~1") for key in path)
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            raise CheckpointError(f"{where} is a {value.layout} tensor; allowed: dense tensors.")
        name = "~" if where == "__metadata__" else where  # safetensors reserves this name
        tensors[name] = value.detach()
        if is_sharded(value) or value.is_contiguous():
            return {_TENSOR: name}
        return {_TENSOR: name, _ORDER: sorted(range(value.ndim), key=value.stride, reverse=True)}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT: repr(float(value))}
    if isinstance(value, Mapping) and not any(isinstance(key, Tensor) for key in value):
        is_plain = all(isinstance(key, str) and key not in _RESERVED for key in value)
        if is_plain and not isinstance(value, Counter):
            return {key: encode(item, (*path, key), tensors) for key, item in value.items()}
        items = [[encode(part, (*path, repr(key)), tensors) for part in (key, item)] for key, item in value.items()]
        # A Counter is more than a dict to torch's MultiStepLR, which keeps its milestones in one.
        return {_COUNTER if isinstance(value, Counter) else _DICT: items}
    if isinstance(value, (list, tuple)):
        items = [encode(item, (*path, str(index)), tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    allowed = "tensors and JSON (text, numbers, true, false, null, lists, and dicts whose keys are not tensors)"
    raise CheckpointError(f"{where} is a {type(value).__module__}.{type(value).__name__}; allowed: {allowed}.")


def decode(value: Any, read: Callable[[str], Tensor]) -> Any:
    """Reverses `encode`; `read` returns a tensor by its path."""
    if isinstance(value, list):
        return [decode(item, read) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        tensor, order = read(value[_TENSOR]), value.get(_ORDER)
        if order is None or is_sharded(tensor):
            return tensor
        return tensor.permute(order).contiguous().permute([order.index(dim) for dim in range(tensor.ndim)])
    if _TUPLE in value:
        return tuple(decode(item, read) for item in value[_TUPLE])
    if _FLOAT in value:
        return float(value[_FLOAT])
    for name, kind in ((_DICT, dict), (_COUNTER, Counter)):
        if name in value:
            return kind({decode(key, read): decode(item, read) for key, item in value[name]})
    return {key: decode(item, read) for key, item in value.items()}


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
    """What one process writes of a checkpoint: a copy of the state, as JSON, and as tensors in dense CPU memory.

    See `CheckpointManager.save`. Each process of the group takes its shards of sharded tensors, and rank 0 everything
    else too. Memory in `buffers`, the copies of an earlier snapshot, is used if it fits: allocating new memory takes
    longer than copying. Raises as `plan` does.
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
        state, tensors = plan(checkpoint, (name, *files))
        # An adapter is stored under peft's names, which peft reads unsharded. It is small, so rank 0 writes all of it.
        names = checkpoint.get(ADAPTER_KEY, {}).get("names", {})
        adapter = {f"{WEIGHTS}{own}": f"{WEIGHTS}{peft}" for own, peft in names.items()}
        tensors = {adapter.get(path, path): full(t) if path in adapter else t for path, t in tensors.items()}
        suffix = "" if group.size == 1 else f"-{group.rank + 1:05d}-of-{group.size:05d}"
        model = "adapter_model.safetensors" if adapter else f"model{suffix}.safetensors"
        training, exported = f"training{suffix}.safetensors", {*adapter.values()}
        self.tensors: dict[str, dict[str, Tensor]] = {model: {}, training: {}}  # by file, and name in it
        self.info: dict[str, Any] = {}  # where shards lie, by name in the file; empty if all tensors are full
        self.copies: dict[str, Tensor] = {}  # by their path in the state
        first_path, same_as = dict[Any, str](), dict(adapter)
        for path, tensor in tensors.items():
            if not _is_written_by(group, path, tensor):
                continue
            mine = local(tensor)
            identity = (mine.data_ptr(), mine.device, mine.dtype, mine.shape, mine.stride())
            if mine.numel() and first_path.setdefault(identity, path) != path:  # a tied weight is stored once
                same_as[path] = first_path[identity]
                continue
            buffer = buffers.get(path)
            if buffer is None or (buffer.shape, buffer.dtype) != (mine.shape, mine.dtype):
                buffer = torch.empty(mine.shape, dtype=mine.dtype)
            self.copies[path] = buffer.copy_(mine)
            is_model = path in exported if adapter else path.startswith(WEIGHTS)
            stored_as = path.removeprefix(WEIGHTS) if is_model else path
            self.tensors[model if is_model else training][stored_as] = buffer
            if suffix:
                self.info[stored_as] = sharding_info(tensor)
        self.name, self.texts = name, {}
        self.about = {"step": checkpoint.get("progress_state_dict", {}).get("step"), "is_best": is_best}
        if group.rank == 0:
            self.texts = {**files, STATE: f'{{"state": {state},\n"same_as": {json.dumps(same_as)}}}'}
        else:  # rank 0 writes both files even if they are empty, because each kind is always there
            self.tensors = {file: content for file, content in self.tensors.items() if content}

    @property
    def is_finite(self) -> bool:
        """True if weights and optimizer state have no NaN or infinity. Minus infinity counts as finite (masks)."""
        for path, tensor in self.copies.items():
            if path.startswith((WEIGHTS, f"{OPTIMIZER_KEY}/")) and tensor.is_floating_point() and tensor.numel():
                wide = tensor if tensor.element_size() > 1 else tensor.float()  # float8 has no amax
                if not bool(wide.amax() < float("inf")):  # False for NaN too
                    return False
        return True


def sharding_info(tensor: Tensor) -> dict[str, list[int]]:
    """Returns where this process's shard begins in the full tensor, and the shape of that, as torch's metadata has it.

    FSDP2 shards as `torch.chunk` does: all ranks but the last ones get ceil(rows / ranks) rows. Raises CheckpointError
    if a tensor is sharded in another way than along its first dimension.
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


def _is_written_by(group: HostGroup, path: str, tensor: Tensor) -> bool:
    if not is_sharded(tensor):
        return group.rank == 0
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if group.size == 1 and mesh.size() > 1:
        raise CheckpointError(f"{path} is sharded; all processes that hold shards of it have to save together.")
    # Of those that hold the same shard, the first writes it: HSDP replicates shards.
    coordinates = zip(mesh.get_coordinate(), placements, strict=True)
    return all(index == 0 for index, placement in coordinates if placement.is_replicate())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None = None) -> None:
    """Write one file; `info` has the `sharding_info` of each tensor, or is None if all are full."""
    metadata = {"format": "pt"}  # required by transformers
    if info:
        metadata[SHARDING_INFO] = json.dumps({name: info[name] for name in tensors})
    save_file(dict(tensors), path, metadata=metadata)
