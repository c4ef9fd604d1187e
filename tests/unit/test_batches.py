"""Batches of any nesting: moved, cut into rows, and padding that has no targets."""

import dataclasses
from collections import UserDict, defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from fundamentallm.config.schema import IGNORE_INDEX
from fundamentallm.distributed.batches import StepBatch, take_rows, tensors, to_device
from fundamentallm.errors import ConfigError

X = torch.arange(12).reshape(4, 3)


class Named(NamedTuple):
    ids: torch.Tensor
    names: list[str]


@dataclasses.dataclass(frozen=True)
class Data:
    ids: torch.Tensor
    length: int
    doubled: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "doubled", 2 * self.ids)


class Encoding(UserDict):
    """As BatchEncoding: a mapping that is no dict, with something beside its entries; as ModelOutput without update."""

    note = "kept"
    update: Any = None

    def __init__(self, **entries: Any) -> None:
        self.data = entries


NESTINGS: list[tuple[Any, Any]] = [
    (X, lambda b: b),
    ((X, X), lambda b: b[1]),
    ([X, [X, {"deep": X}]], lambda b: b[1][1]["deep"]),
    (
        {"x": X, "names": ["a", "b", "c", "d"], "scale": torch.tensor(2.0), "none": None, "text": "all"},
        lambda b: b["x"],
    ),
    (Encoding(x=X), lambda b: b["x"]),
    (defaultdict(list, x=X), lambda b: b["x"]),
    (Named(X, ["a", "b", "c", "d"]), lambda b: b.ids),
    (Data(X, 7), lambda b: b.ids),
    ({"x": X, "array": np.arange(4)}, lambda b: b["x"]),
]


@pytest.mark.parametrize(("batch", "tensor"), NESTINGS)
def test_batches_of_any_nesting_keep_their_type(batch: Any, tensor: Any) -> None:
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    assert tensor(moved).is_meta
    assert not tensor(batch).is_meta  # the user's own is left alone
    rows = take_rows(batch, 4, slice(1, 3))
    assert type(rows) is type(batch)
    assert torch.equal(tensor(rows), X[1:3])
    assert torch.equal(tensor(take_rows(batch, 4, [3, 3, 0])), X[[3, 3, 0]])


def test_take_rows_takes_entries_of_samples_along() -> None:
    rows = take_rows(NESTINGS[3][0], 4, slice(1, 3))
    assert (rows["names"], rows["scale"].item(), rows["none"], rows["text"]) == (["b", "c"], 2.0, None, "all")
    assert take_rows(Named(X, list("abcd")), 4, slice(3, 4)).names == ["d"]
    assert take_rows({"x": X, "array": np.arange(4)}, 4, [2])["array"].tolist() == [2]
    assert torch.equal(take_rows(Data(X, 7), 4, slice(2)).doubled, 2 * X[:2])


def test_take_rows_tells_columns_from_samples() -> None:
    """If there are as many samples as entries."""
    ids, lengths, targets = torch.zeros(2, 5), torch.tensor([5, 3]), torch.tensor([0, 1])
    [one, length], target = take_rows([[ids, lengths], targets], 2, slice(1, 2))
    assert (one.shape, length.item(), target.item()) == ((1, 5), 3, 1)
    # transformers' detection models take a list of a tensor, or of a mapping, for each sample
    batch = {"x": ids, "classes": [targets, targets], "texts": ["a", "b"]}
    rows = take_rows(batch, 2, slice(1, 2))
    assert (len(rows["classes"]), rows["texts"]) == (1, ["b"])


@pytest.mark.parametrize("entry", [torch.zeros(3, 2), np.zeros(5), torch.nn.Linear(2, 2)])
def test_take_rows_refuses_what_has_no_rows(entry: Any) -> None:
    batch = {"x": X, "entry": {"deep": entry}}
    with pytest.raises(ConfigError) as error:
        take_rows(batch, 4, slice(2))
    assert error.value.problems[0].setting == "batch['entry']['deep']"
    assert "drop_last" in error.value.problems[0].advice
    assert next(StepBatch(batch, 4, 4, 1).micro_batches()).content is batch  # computed at once, it is not cut


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_micro_batches_cut_as_tensor_split(count: int) -> None:
    pieces = list(StepBatch((X, X), 4, 4, count).micro_batches())
    for (content, rows), expected in zip(pieces, X.tensor_split(count), strict=True):
        assert torch.equal(content[0], expected)
        assert rows == len(expected)


INTEGERS = torch.ones(4, 3, dtype=torch.int64)
MASKED, CUT = "masked", "cut"


@pytest.mark.parametrize(
    ("batch", "done"),
    [
        ((X, INTEGERS), MASKED),
        ((X, INTEGERS[:, 0]), MASKED),
        ({"labels": INTEGERS}, MASKED),
        ({"labels": INTEGERS[:, 0]}, CUT),  # may be numbers to predict
        ((X, INTEGERS.float()), CUT),
        ({"labels": INTEGERS.float()}, CUT),
        ({"x": X}, CUT),
        (X, CUT),
    ],
)
def test_padding_has_no_targets(batch: Any, done: str) -> None:
    """Four rows in two micro-batches, three of them this process's own."""
    first, second = StepBatch(batch, 4, 3, 2).micro_batches()
    assert (first.rows, second.rows) == (2, 1)
    for tensor in tensors(second.content):
        assert len(tensor) == (2 if done == MASKED else 1)
    if done == MASKED:
        *_, targets = tensors(second.content)
        assert targets[1].eq(IGNORE_INDEX).all()
        assert targets[0].ne(IGNORE_INDEX).all()
    _, trimmed = StepBatch(batch, 4, 3, 2).micro_batches(trims=True)
    assert [len(tensor) for tensor in tensors(trimmed.content)] == [1] * len(list(tensors(batch)))


def test_micro_batch_of_padding_keeps_its_targets() -> None:
    """A mean over no target would be 0 / 0, so its loss is multiplied by zero instead."""
    batch = StepBatch((X, INTEGERS), 4, 2, 2)
    assert [rows for _, rows in batch.micro_batches()] == [2, 0]
    assert torch.equal(list(batch.micro_batches())[1].content[1], INTEGERS[2:])
    assert len(batch.own[0]) == 2
    assert len(StepBatch((X, INTEGERS), 4, 0, 2).own[0]) == 1
