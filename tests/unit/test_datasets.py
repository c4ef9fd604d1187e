"""TokenDataset: windows that make every token but the first a target exactly once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fundamentallm.config import IGNORE_INDEX
from fundamentallm.data.datasets import TokenDataset
from fundamentallm.data.loaders import as_is
from fundamentallm.errors import ConfigError


def datasets_of_all_sizes(length: int) -> Iterator[tuple[int, TokenDataset]]:
    """Up to five samples, with every possible length of the last; a token is its position."""
    for count in range(length + 1, 5 * length + 2):
        yield count, TokenDataset(np.arange(count), length)


@pytest.mark.parametrize("length", range(1, 8))
def test_every_token_but_the_first_is_a_target_exactly_once_after_its_predecessor(length: int) -> None:
    for count, dataset in datasets_of_all_sizes(length):
        inputs, targets = dataset.__getitems__(range(len(dataset)))
        kept = targets != IGNORE_INDEX
        assert targets[kept].tolist() == list(range(1, count))
        assert torch.equal(inputs[kept], targets[kept] - 1)


@pytest.mark.parametrize("length", range(1, 8))
def test_only_the_start_of_the_last_window_is_masked(length: int) -> None:
    for count, dataset in datasets_of_all_sizes(length):
        _, targets = dataset.__getitems__(range(len(dataset)))
        masked = targets == IGNORE_INDEX
        assert not masked[:-1].any()
        repeated = length * len(dataset) - (count - 1)
        assert masked[-1].tolist() == [True] * repeated + [False] * (length - repeated)


@pytest.mark.parametrize("length", range(1, 8))
def test_inputs_are_whole_windows_and_never_masked_also_in_a_batch_of_one(length: int) -> None:
    for count, dataset in datasets_of_all_sizes(length):
        for index in range(len(dataset)):
            start = min(index * length, count - 1 - length)
            assert dataset[index][0].tolist() == list(range(start, start + length))


@pytest.mark.parametrize("indices", [[0], [4], [4, 0, 2], [1, 1, 4, 4], [0, 1, 2, 3, 4]])
def test_a_batch_is_its_items_stacked(indices: list[int]) -> None:
    dataset = TokenDataset(np.random.default_rng(0).integers(0, 50, 33), 7)
    assert len(dataset) == 5
    items = [dataset[index] for index in indices]
    inputs, targets = dataset.__getitems__(indices)
    assert torch.equal(inputs, torch.stack([item[0] for item in items]))
    assert torch.equal(targets, torch.stack([item[1] for item in items]))


def test_an_index_counts_from_the_end_if_negative_and_is_refused_outside() -> None:
    dataset = TokenDataset(np.arange(24), 7)
    for index in range(len(dataset)):
        for ours, same in zip(dataset[index - len(dataset)], dataset[index], strict=True):
            assert torch.equal(ours, same)
    for outside in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError, match=str(outside)):
            dataset[outside]


def test_plain_iteration_ends_after_the_last_sample() -> None:
    dataset = TokenDataset(np.arange(24), 7)
    assert len(list(itertools.islice(dataset, 100))) == len(dataset)


def test_too_few_tokens_are_refused_with_both_counts() -> None:
    assert len(TokenDataset(np.arange(8), 7)) == 1
    with pytest.raises(ConfigError, match=r"has 7 tokens.*= 8\."):
        TokenDataset(np.arange(7), 7)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32, np.int64])
def test_any_integers_from_memory_or_a_read_only_file_give_int64(dtype: type, tmp_path: Path) -> None:
    tokens = np.arange(50, 150).astype(dtype)
    tokens.tofile(tmp_path / "tokens.bin")
    for source in (tokens, np.memmap(tmp_path / "tokens.bin", dtype, mode="r")):
        inputs, targets = TokenDataset(source, 9)[2]
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == list(range(68, 77))
        assert targets.tolist() == list(range(69, 78))


def test_writing_into_a_batch_leaves_the_tokens_alone() -> None:
    tokens = np.arange(40)
    inputs, targets = TokenDataset(tokens, 9).__getitems__([0, 4])
    inputs.fill_(7)
    targets.fill_(7)
    assert np.array_equal(tokens, np.arange(40))


def test_a_loader_gives_the_batches_as_they_are() -> None:
    dataset = TokenDataset(np.arange(40), 9)
    batches = list(DataLoader(dataset, batch_size=2, collate_fn=as_is))
    assert [len(inputs) for inputs, _ in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([targets for _, targets in batches]), dataset.__getitems__(range(5))[1])
