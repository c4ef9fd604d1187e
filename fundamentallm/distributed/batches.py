"""Batches: whatever a `collate_fn` returns, moved to a device and cut into rows."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import honor_type, send_to_device
from torch import Tensor

from fundamentallm.config.schema import IGNORE_INDEX
from fundamentallm.errors import ConfigError, Problem

LABELS = "labels"  # key of the targets in a mapping, as transformers names it


def _entries(batch: Any) -> dict[Any, Any]:
    """Returns the entries of a mapping, of a list or tuple by index, or of a dataclass by field; otherwise none."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if hasattr(batch, "to"):  # a tensor, or a packed sequence, which is a named tuple and has no rows
        return {}
    if isinstance(batch, (tuple, list)):
        return dict(enumerate(batch))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch) if field.init}
    return {}


def _rebuilt(batch: Any, entries: dict[Any, Any]) -> Any:
    # accelerate's `recursively_apply` knows no dataclasses, and its copy of a mapping keeps nothing but the entries.
    if isinstance(batch, Mapping):
        result: Any = copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
        for key, entry in entries.items():  # transformers' ModelOutput has no update()
            result[key] = entry
        return result
    if isinstance(batch, (tuple, list)):
        return honor_type(batch, entries.values())
    return dataclasses.replace(batch, **entries)


def to_device(batch: Any, device: torch.device) -> Any:
    """Returns a batch with its tensors on a device, without waiting for it. Other entries are passed through."""
    if entries := _entries(batch):
        return _rebuilt(batch, {key: to_device(entry, device) for key, entry in entries.items()})
    return send_to_device(batch, device, non_blocking=True)


def tensors(batch: Any) -> list[Tensor]:
    """Returns all tensors of a batch."""
    if isinstance(batch, Tensor):
        return [batch]
    return [tensor for entry in _entries(batch).values() for tensor in tensors(entry)]


def take_rows(batch: Any, rows: int, index: slice | list[int], name: str = "batch", in_mapping: bool = False) -> Any:
    """Returns the rows `index` of a batch of `rows` samples. Raises ConfigError if a tensor has not one for each.

    Tensors and arrays are cut along their first dimension. A list is cut if it has an entry for each sample: in a
    mapping, where columns have names, or without tensors. Scalars and other objects are the same in each row.
    """
    if isinstance(batch, (Tensor, np.ndarray)):
        if batch.ndim and len(batch) != rows:
            raise _not_by_rows(name, f"of shape {tuple(batch.shape)}", rows)
        return batch[index] if batch.ndim else batch
    is_list = isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields") and len(batch) == rows
    if is_list and (in_mapping or not tensors(batch)):
        return honor_type(batch, (batch[row] for row in np.arange(rows)[index]))
    if entries := _entries(batch):
        is_mapping = isinstance(batch, Mapping)
        cut = {key: take_rows(entry, rows, index, f"{name}[{key!r}]", is_mapping) for key, entry in entries.items()}
        return _rebuilt(batch, cut)
    if hasattr(batch, "to"):
        raise _not_by_rows(name, f"a {type(batch).__name__}", rows)
    return batch


def _not_by_rows(name: str, what: str, rows: int) -> ConfigError:
    advice = "Return a row for each sample, or compute batches at once: no training.micro_batch_size, drop_last=True."
    return ConfigError(Problem(name, what, "", advice, f"which cannot be cut into rows of {rows} samples"))


class MicroBatch(NamedTuple):
    """Rows of a batch that are computed at once."""

    content: Any
    rows: int
    """Number of its own samples, which come first. The others are padding without targets, but with targets if there is
    no sample of its own: then the loss must be multiplied by zero."""


class StepBatch(NamedTuple):
    """What a process computes in an optimizer step, on its device."""

    content: Any
    size: int  # number of samples, with padding
    rows: int  # number of its own samples; those after them are padding
    num_micro_batches: int

    @property
    def own(self) -> Any:
        """The batch without padding; one sample of padding if there is nothing else."""
        if self.rows == self.size:
            return self.content
        return take_rows(self.content, self.size, slice(max(self.rows, 1)))

    def micro_batches(self, trims: bool = False) -> Iterator[MicroBatch]:
        """Yield the micro-batches; sizes differ by one at most. `trims`: cut padding off instead of masking it."""
        quotient, remainder = divmod(self.size, self.num_micro_batches)
        end = 0
        for number in range(self.num_micro_batches):
            start, end = end, end + quotient + (number < remainder)
            own, content = min(max(self.rows - start, 0), end - start), self.content
            if end - start < self.size:
                content = take_rows(content, self.size, slice(start, end))
            if 0 < own < end - start:
                masked = None if trims else _masked(content, own)
                content = take_rows(content, end - start, slice(own)) if masked is None else masked
            yield MicroBatch(content, own)


def _masked(batch: Any, rows: int) -> Any | None:
    """Returns a batch whose targets are ignored from a row on, or None if they cannot be."""
    is_mapping, entries = isinstance(batch, Mapping), _entries(batch)
    key: Any = LABELS if is_mapping else 1
    labels = entries.get(key)
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    # A single label of a mapping may be a number to predict, for which -100 is a value like others.
    if labels.ndim < 2 if is_mapping else len(entries) != 2:
        return None
    masked = labels.clone()
    masked[rows:] = IGNORE_INDEX
    return _rebuilt(batch, entries | {key: masked})
