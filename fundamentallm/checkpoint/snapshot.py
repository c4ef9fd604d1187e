"""A state as JSON and named tensors, and a copy of it in memory, so that training can continue while it is written."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fundamentallm.checkpoint.manifest import MANIFEST, NAME, STATE, TENSORS
from fundamentallm.checkpoint.tensor_files import (
    MODEL_KEY as MODEL_KEY,
    WEIGHTS,
    file_name,
    is_first_holder,
    sharding_info,
)
from fundamentallm.distributed.dtensor import full, is_sharded, local
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import CheckpointError

OPTIMIZER_KEY, AVERAGE_KEY, ADAPTER_KEY = "optimizer_state_dict", "average_state_dict", "adapter_state_dict"

# JSON has no tensors, tuples, non-finite numbers, or dicts whose keys are not text. Each is stored as an object with
# one of these keys.
_TENSOR, _TUPLE, _FLOAT, _DICT, _COUNTER = _RESERVED = (
    "__tensor__", "__tuple__", "__float__", "__dict__", "__counter__"
)  # fmt: skip
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
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__name__}; allowed: tensors and JSON (text, numbers, "
        "true, false, null, lists, and dicts whose keys are not tensors). Convert it before saving."
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Reverses `encode`."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        tensor = tensors[value[_TENSOR]]
        order = value.get(_ORDER)
        if order is None or is_sharded(tensor):
            return tensor
        back = [order.index(dim) for dim in range(tensor.ndim)]
        return tensor.permute(order).contiguous().permute(back)
    if _TUPLE in value:
        return tuple(decode(item, tensors) for item in value[_TUPLE])
    if _FLOAT in value:
        return float(value[_FLOAT])
    for name, kind in ((_DICT, dict), (_COUNTER, Counter)):
        if name in value:
            return kind({decode(key, tensors): decode(item, tensors) for key, item in value[name]})
    return {key: decode(item, tensors) for key, item in value.items()}


def copy_to_cpu(
    tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copy tensors to dense CPU memory, each to its own, as safetensors wants them.

    Memory in `buffers` is used if it fits: allocating new memory takes as long as copying.
    Returns (copies by name, {name: name of the same tensor}). A tied weight is copied once, under its first name.
    """
    first_name: dict[Any, str] = {}
    copies: dict[str, Tensor] = {}
    same_as: dict[str, str] = {}
    for name, tensor in tensors.items():
        identity = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and first_name.setdefault(identity, name) != name:
            same_as[name] = first_name[identity]
            continue
        buffer = buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
        copies[name] = buffer.copy_(tensor)
    return copies, same_as


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
        json_text = f'{{"state": {state},\n"same_as": {json.dumps(same_as | adapter)}}}'
        self.texts = {**files, STATE: json_text} if rank == 0 else {}

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
