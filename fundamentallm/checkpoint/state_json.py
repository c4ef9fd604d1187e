"""Conversion of a state to JSON and named tensors, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fundamentallm.errors import CheckpointError

# JSON has no tensors, tuples or non-finite numbers. Each is stored as an object with one of these keys.
_TENSOR, _TUPLE, _FLOAT = "__tensor__", "__tuple__", "__float__"

MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Exceptions of code that reads a state of an unexpected form. A stranger's checkpoint may contain anything."""


def encode(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """Returns `value` as JSON and adds its tensors to `tensors` by their path, escaped as in RFC 6901."""
    where = "/".join(key.replace("~", "~0").replace("/", "~1") for key in path)
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_conj() or value.is_neg():
            raise CheckpointError(f"{where} is a {value.layout} tensor or a lazy view; allowed: dense tensors.")
        name = "~" if where == "__metadata__" else where  # safetensors reserves this name
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT: repr(float(value))}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key in (_TENSOR, _TUPLE, _FLOAT):
                raise CheckpointError(f"{where or 'the state'} has the key {key!r}; allowed: text, not a reserved key.")
        return {key: encode(item, (*path, key), tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [encode(item, (*path, str(index)), tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__name__}; allowed: tensors and JSON (text, numbers, "
        "true, false, null, lists and dicts). Convert it before saving."
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Reverses `encode`."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(decode(item, tensors) for item in value[_TUPLE])
    if _FLOAT in value:
        return float(value[_FLOAT])
    return {key: decode(item, tensors) for key, item in value.items()}


def copy_to_cpu(
    tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copy tensors to dense CPU memory, each to its own, as safetensors wants them.

    Args:
        tensors: by name.
        buffers: memory by name, used if shape and type match: allocating new memory takes as long as copying.

    Returns:
        (copies by name, {name: name of the same tensor}). A tied weight is copied once, under its first name.
    """
    first_name: dict[Any, str] = {}
    copies: dict[str, Tensor] = {}
    same_as: dict[str, str] = {}
    for name, tensor in tensors.items():
        identity = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and identity in first_name:
            same_as[name] = first_name[identity]
            continue
        first_name[identity] = name
        buffer = buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
        copies[name] = buffer.copy_(tensor)
    return copies, same_as
