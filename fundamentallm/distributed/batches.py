"""Batches: whatever a `collate_fn` returns, moved to a device and cut into rows."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import honor_type, send_to_device
from torch import Tensor

from fundamentallm.config.schema import IGNORE_INDEX
from fundamentallm.errors import ConfigError, Problem

LABELS = "labels"
"""Key of the targets in a mapping, as transformers names it."""


def _rebuild(batch: Any, function: Callable[[Any, str], Any]) -> Any:
    """Returns a copy of a container with `function` applied to (entry, name). Other objects are returned as they are.

    accelerate's `recursively_apply` knows no dataclasses, and makes mappings by constructors that may want more.
    """
    if isinstance(batch, Mapping):
        entries = {key: function(value, f"[{key!r}]") for key, value in batch.items()}
        if not isinstance(batch, MutableMapping):
            return type(batch)(entries)  # type: ignore[call-arg]
        mapping = copy.copy(batch)
        for key, value in entries.items():
            mapping[key] = value
        return mapping
    if callable(getattr(batch, "to", None)):  # a packed sequence is a named tuple, and has no rows
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        result = copy.copy(batch)
        for field in dataclasses.fields(batch):
            # A frozen dataclass has no other way.
            object.__setattr__(result, field.name, function(getattr(batch, field.name), f".{field.name}"))
        return result
    if isinstance(batch, (tuple, list)):
        return honor_type(batch, (function(entry, f"[{index}]") for index, entry in enumerate(batch)))
    return batch


def to_device(batch: Any, device: torch.device) -> Any:
    """Returns a batch with its tensors on a device, without waiting for it. Other entries are passed through."""
    result = _rebuild(batch, lambda entry, _: to_device(entry, device))
    return send_to_device(batch, device, non_blocking=True) if result is batch else result


def tensors(batch: Any) -> list[Tensor]:
    """Returns all tensors of a batch."""
    found = [batch] if isinstance(batch, Tensor) else []
    _rebuild(batch, lambda entry, _: found.extend(tensors(entry)))
    return found


def take_rows(batch: Any, rows: int, index: slice | list[int], name: str = "") -> Any:
    """Returns the rows `index` of a batch of `rows` samples.

    Tensors and arrays are cut along their first dimension, and so are lists of one entry for each sample. Scalars and
    other objects are the same in each row.

    Raises:
        ConfigError: if a tensor does not have one row for each sample.
    """
    if isinstance(batch, (Tensor, np.ndarray)):
        if batch.ndim and len(batch) != rows:
            raise _not_by_rows(name, f"of shape {tuple(batch.shape)}", rows)
        return batch[index] if batch.ndim else batch
    if isinstance(batch, (tuple, list)) and len(batch) == rows and not _has_columns(batch, rows, name):
        return honor_type(batch, (batch[i] for i in np.arange(rows)[index]))
    result = _rebuild(batch, lambda entry, key: take_rows(entry, rows, index, name + key))
    if result is batch and hasattr(batch, "to"):
        raise _not_by_rows(name, f"a {type(batch).__name__}", rows)
    return result


def _has_columns(batch: Any, rows: int, name: str) -> bool:
    """Returns whether a sequence as long as the batch holds columns, such as (inputs, targets) of two samples.

    Inside a batch (`name` is not empty), tensors of unlike shapes are samples: they could not be stacked.
    """
    found = tensors(batch)
    if hasattr(batch, "_fields") or not found:
        return hasattr(batch, "_fields")
    is_cut = all(tensor.ndim and len(tensor) == rows for tensor in found)
    is_records = all(isinstance(entry, Mapping) for entry in batch)
    return is_cut and not is_records and (not name or len({tensor.shape for tensor in found}) == 1)


def _not_by_rows(name: str, what: str, rows: int) -> ConfigError:
    advice = (
        "Return one row for each sample, or compute each batch at once: set training.micro_batch_size to null, and "
        "give the loader drop_last=True and a batch size of at least the number of processes."
    )
    reason = f"which cannot be cut into rows of {rows} samples"
    return ConfigError(Problem(f"batch{name}", what, advice=advice, reason=reason))


class MicroBatch(NamedTuple):
    """Rows of a batch that are computed at once."""

    content: Any
    rows: int
    """Number of its own samples, which come first. The others are padding without targets; if there is no sample of its
    own, all have targets, and the loss must be multiplied by zero."""


class StepBatch(NamedTuple):
    """What a process computes in an optimizer step, on its device."""

    content: Any
    size: int
    """Number of samples, with padding."""
    rows: int
    """Number of its own samples. Those after them are padding."""
    num_micro_batches: int

    @property
    def own(self) -> Any:
        """The batch without padding; one sample of padding if there is nothing else."""
        if self.rows == self.size:
            return self.content
        return take_rows(self.content, self.size, slice(max(self.rows, 1)))

    def micro_batches(self, trims: bool = False) -> Iterator[MicroBatch]:
        """Yield the micro-batches. Sizes differ by one at most, as those of `tensor_split`.

        Args:
            trims: whether to cut padding off, instead of masking its targets. A micro-batch keeps at least one row.
        """
        quotient, remainder = divmod(self.size, self.num_micro_batches)
        end = 0
        for number in range(self.num_micro_batches):
            start, end = end, end + quotient + (number < remainder)
            own = min(max(self.rows - start, 0), end - start)
            if own == end - start == self.size:
                yield MicroBatch(self.content, own)
                continue
            content = take_rows(self.content, self.size, slice(start, end))
            if 0 < own < end - start:
                masked = None if trims else _masked(content, own)
                content = take_rows(content, end - start, slice(own)) if masked is None else masked
            yield MicroBatch(content, own)


def _masked(batch: Any, rows: int) -> Any | None:
    """Returns a batch whose targets are ignored from a row on, or None if they cannot be.

    A single label of a mapping may be a number to predict, for which -100 is a value like others.
    """
    is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    labels = batch[1] if is_pair else batch.get(LABELS) if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or (labels.ndim < 2 and not is_pair):
        return None
    masked = labels.clone()
    masked[rows:] = IGNORE_INDEX
    return _rebuild(batch, lambda entry, _: masked if entry is labels else entry)
