"""Conversion of a state to JSON and named tensors, and back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fundamentallm.distributed.dtensor import is_sharded
from fundamentallm.errors import CheckpointError

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
