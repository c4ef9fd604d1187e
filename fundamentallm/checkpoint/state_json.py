"""Any state as JSON and named tensors, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fundamentallm.errors import CheckpointError

# JSON has no tensors, tuples or non-finite numbers: each is an object with one of these keys.
_TENSOR, _TUPLE, _FLOAT = "__tensor__", "__tuple__", "__float__"

MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What reading a state of another form than ours runs into; a stranger's checkpoint may hold anything."""


def encode(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; its tensors go to `tensors` under their path, escaped as in RFC 6901."""
    where = "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_conj() or value.is_neg():
            raise CheckpointError(f"{where} is a {value.layout} tensor or a lazy view; allowed: dense tensors.")
        name = "~" if where == "__metadata__" else where  # a name that safetensors keeps for itself
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT: repr(float(value))}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key in (_TENSOR, _TUPLE, _FLOAT):
                raise CheckpointError(
                    f"{where or 'the state'} has the key {key!r}; allowed: text other than our marks."
                )
        return {key: encode(item, (*path, key), tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [encode(item, (*path, str(index)), tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__name__}; allowed: tensors, and what JSON can hold "
        "(text, numbers, true, false, null, lists and dicts of these). Convert it before saving."
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode` took apart, put together again."""
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


def unshare(
    tensors: dict[str, Tensor], copy: bool = False, buffers: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors fit for safetensors (on the CPU, dense, own memory), and {name: name of the same tensor}.

    A tied weight is stored once: under its first name. With `copy`, no memory is shared with `tensors`; copies go to
    the `buffers` of their name where they fit, since new memory takes as long to get as to fill.
    """
    first_name: dict[Any, str] = {}
    stored: dict[str, Tensor] = {}
    same_as: dict[str, str] = {}
    storages = set()
    for name, tensor in tensors.items():
        identity = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and identity in first_name:
            same_as[name] = first_name[identity]
            continue
        first_name[identity] = name
        buffer = buffers.get(name) if copy and buffers else None
        if buffer is not None and (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype):
            stored[name] = buffer.copy_(tensor)
            continue
        given, tensor = tensor, tensor.cpu().contiguous()
        # A view into a larger storage must not drag the rest along, nor share it with its siblings.
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.numel() * tensor.element_size() and storage.data_ptr() not in storages
        is_copy = tensor.data_ptr() != given.data_ptr()
        stored[name] = tensor if alone and (is_copy or not copy) else tensor.clone()
        storages.add(storage.data_ptr())
    return stored, same_as
