"""Loaders: which are accepted, and what they load for each step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data import WeightedRandomSampler as Weighted

from fundamentallm.config.schema import Config, DataConfig, TrainingConfig
from fundamentallm.data import loaders
from fundamentallm.data.corpus import load_corpus
from fundamentallm.data.datasets import TokenDataset
from fundamentallm.data.loaders import collate, create_dataloaders, device_batches, load, step_sampler
from fundamentallm.data.sampler import StepSampler
from fundamentallm.data.tokenizers import create_tokenizer
from fundamentallm.errors import ConfigError
from tests.conftest import problem_of

NUMBERS = list(range(10))


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return itertools.count()


class WithoutLength(Dataset):
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    ("loader", "named"),
    [
        (DataLoader(Endless()), "IterableDataset"),
        (DataLoader(NUMBERS, batch_sampler=BatchSampler(SequentialSampler(NUMBERS), 2, False)), "batch_sampler"),
        (DataLoader(NUMBERS, batch_size=None), "batch_size=None"),
        (DataLoader(NUMBERS, sampler=Weighted([1.0] * 10, 10)), "WeightedRandomSampler"),
        (DataLoader(NUMBERS, sampler=RandomSampler(NUMBERS, replacement=True)), "replacement"),
        (DataLoader(NUMBERS, sampler=RandomSampler(NUMBERS, num_samples=5)), "num_samples"),
        (DataLoader([]), "0 samples"),
        (DataLoader(NUMBERS, batch_size=11, drop_last=True), "10 samples"),
        (DataLoader(WithoutLength()), "__len__"),
        (NUMBERS, "list"),
    ],
)
def test_step_sampler_refuses_an_order_that_cannot_resume(loader: object, named: str) -> None:
    problem = problem_of(step_sampler, "val_loader", loader, 0, 0, 1)
    assert problem.value is loader
    assert named in problem


@pytest.mark.parametrize(("batch_size", "later", "wrong"), [(11, [], [11]), (4, [12, 10, 13], [12, 13]), (10, [], [])])
@pytest.mark.parametrize("drop_last", [False, True])
def test_step_sampler_refuses_batches_larger_than_the_data(
    batch_size: int, later: list[int], wrong: list[int], drop_last: bool
) -> None:
    loader = DataLoader(NUMBERS, batch_size=batch_size, drop_last=drop_last)
    schedule = list(enumerate(later, start=5))
    if not wrong:
        assert step_sampler("train_loader", loader, 0, 0, 1, schedule=schedule).batch(0) == NUMBERS
        return
    with pytest.raises(ConfigError) as error:
        step_sampler("train_loader", loader, 0, 0, 1, schedule=schedule)
    setting = "training.batch_size_schedule" if later else "training.batch_size"
    assert [(problem.setting, problem.value) for problem in error.value.problems] == [(setting, size) for size in wrong]
    assert all("at most 10" in problem.allowed for problem in error.value.problems)


def test_step_sampler_takes_a_larger_validation_batch() -> None:
    sampler = step_sampler("val_loader", DataLoader(NUMBERS, batch_size=99), 0, 0, 1)
    assert (sampler.steps_per_epoch, sampler.batch(0)) == (1, NUMBERS)


@pytest.mark.parametrize(("shuffle", "drop_last"), itertools.product([False, True], repeat=2))
def test_step_sampler_follows_the_loaders_settings(shuffle: bool, drop_last: bool) -> None:
    loader = DataLoader(NUMBERS, batch_size=4, shuffle=shuffle, drop_last=drop_last)
    ours = step_sampler("train_loader", loader, 5, 1, 2, 1)
    same = StepSampler(10, 4, 5 if shuffle else None, 1, 2, 1, drop_last)
    assert ours.steps_per_epoch == len(loader)
    for step in range(2 * len(loader)):
        assert ours.rank_batch(step) == same.rank_batch(step)


def step_batches(num_workers: int, start: int = 0) -> list[torch.Tensor]:
    dataset = TokenDataset(np.arange(200), 7)  # with torch's default collate_fn
    loader = DataLoader(dataset, batch_size=4, shuffle=True, num_workers=num_workers)
    sampler = step_sampler("train_loader", loader, seed=1, process_index=0, num_processes=1)
    batches = device_batches(loader, sampler, start, 20, torch.device("cpu"))
    return [torch.stack(tuple(batch.content)) for batch in batches]


@pytest.mark.parametrize("tokens_at_once", [2**12, 60, 1])
def test_device_batches_continue_across_epochs(tokens_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "GATHERED_AT_ONCE", tokens_at_once)
    dataset, sampler = TokenDataset(np.arange(200), 7), StepSampler(29, 4, 1)
    assert len(dataset) == 29
    batches = step_batches(0, start=5)
    assert len(batches) == 15
    for step, batch in enumerate(batches, start=5):
        assert torch.equal(batch, torch.stack(dataset.__getitems__(sampler.rank_batch(step).indices)))


def test_device_batches_are_the_same_with_workers() -> None:
    for ours, same in zip(step_batches(2), step_batches(0), strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_device_batches_leave_the_global_generator_alone(num_workers: int) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    step_batches(num_workers)
    assert torch.equal(torch.get_rng_state(), before)


def in_brackets(items: list[int]) -> list[str]:
    return [f"<{item}>" for item in items]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_load_collates_as_the_users_loader(num_workers: int) -> None:
    loader = DataLoader(NUMBERS, batch_size=4, collate_fn=in_brackets, num_workers=num_workers)
    assert list(load(loader, iter([[4, 5, 7], [8, 9]]))) == [["<4>", "<5>", "<7>"], ["<8>", "<9>"]]


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("micro", [None, 1, 2])
def test_device_batches_of_all_processes_cover_a_step_once(processes: int, micro: int | None) -> None:
    dataset = TokenDataset(np.arange(29 * 7 + 1), 7)
    loader = DataLoader(dataset, batch_size=4, collate_fn=collate)
    samplers = [StepSampler(len(dataset), 4, 0, index, processes, micro) for index in range(processes)]
    device = torch.device("cpu")
    batches = [list(device_batches(loader, sampler, 3, 12, device)) for sampler in samplers]
    for step, parts in enumerate(zip(*batches, strict=True), start=3):
        whole_inputs, whole_targets = dataset.__getitems__(samplers[0].batch(step))
        own = [batch.own for batch in parts if batch.rows]
        assert torch.equal(torch.cat([inputs for inputs, _ in own]), whole_inputs)
        assert torch.equal(torch.cat([targets for _, targets in own]), whole_targets)
        for batch in parts:
            micro_batches = list(batch.micro_batches())
            assert len(micro_batches) == samplers[0].rank_batch(step).micro_batches
            assert sum(rows for _, rows in micro_batches) == batch.rows
            assert all(len(content[0]) for content, _ in micro_batches)


def make_config(**data: object) -> Config:
    return Config(data=DataConfig(**{"sequence_length": 16} | data), training=TrainingConfig(batch_size=4))


@pytest.fixture
def tokenizer(text: str) -> Tokenizer:
    return create_tokenizer("char", text)


def tokens_of(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    cut = int(len(text) * 0.9)
    return tokenizer.encode(text[:cut]).ids, tokenizer.encode(text[cut:]).ids


@pytest.mark.parametrize("form", ["text", "array", "tensor", "list", "corpus"])
def test_create_dataloaders_takes_every_form_of_data(
    form: str, text: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    train, validation = tokens_of(text, tokenizer)
    data = text
    if form == "corpus":
        (tmp_path / "text.txt").write_text(text, encoding="utf-8", newline="")
        data = load_corpus(DataConfig(source=str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "cache")), False)
    elif form != "text":
        data = {"array": np.array, "tensor": torch.tensor, "list": list}[form](train + validation)
    train_loader, val_loader = create_dataloaders(data, tokenizer, make_config())
    assert val_loader is not None
    for loader, tokens in ((train_loader, train), (val_loader, validation)):
        assert loader.batch_size == 4
        assert loader.dataset.sequence_length == 16
        assert loader.dataset.tokens.tolist() == tokens
        assert loader.dataset.tokenizer is tokenizer
    assert val_loader.dataset.num_bytes == len(tokenizer.decode(validation[1:]).encode())
    assert isinstance(train_loader.sampler, RandomSampler)
    assert isinstance(val_loader.sampler, SequentialSampler)


@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("piece", ["a", "漢a\r\n"])
def test_num_bytes_are_all_bytes_but_the_first_tokens(piece: str, as_tokens: bool) -> None:
    validation = piece * 40
    tokenizer = create_tokenizer("byte")
    train = "x" * (len(validation.encode()) if as_tokens else len(validation))
    data = tokenizer.encode(train + validation).ids if as_tokens else train + validation
    _, val_loader = create_dataloaders(data, tokenizer, make_config(train_split=0.5))
    assert val_loader is not None
    assert tokenizer.decode(val_loader.dataset.tokens.tolist()) == validation
    assert val_loader.dataset.num_bytes == len(validation.encode()) - 1


def test_create_dataloaders_ignores_the_tokenizers_truncation(text: str, tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(max_length=100)
    train_loader, val_loader = create_dataloaders(text, tokenizer, make_config(train_split=1.0))
    assert len(train_loader.dataset.tokens) == len(text)
    assert val_loader is None


def test_create_dataloaders_refuses_tokens_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    largest = tokenizer.get_vocab_size() - 1
    create_dataloaders([0] * 300 + [largest], tokenizer, make_config())
    for wrong in (-1, largest + 1):
        problem = problem_of(create_dataloaders, [0] * 300 + [wrong], tokenizer, make_config())
        assert wrong in problem.value
        assert f"0 to {largest}" in problem.allowed


@pytest.mark.parametrize("tokens", [[[1, 2]] * 200, [0.5] * 200, []])
def test_create_dataloaders_refuses_other_than_1d_integers(tokens: list) -> None:
    assert problem_of(create_dataloaders, tokens, None, make_config()).allowed == "1-D integers"


def test_create_dataloaders_without_a_tokenizer_takes_tokens_only(text: str) -> None:
    _, val_loader = create_dataloaders(list(range(500)), None, make_config())
    assert val_loader.dataset.num_bytes is None
    assert problem_of(create_dataloaders, text, None, make_config()).setting == "tokenizer"


def test_create_dataloaders_names_unknown_characters(text: str, tokenizer: Tokenizer) -> None:
    assert problem_of(create_dataloaders, text + "漢", tokenizer, make_config()).value == ["漢"]


@pytest.mark.parametrize(("count", "train_split"), [(160, 0.9), (160, 0.1), (0, 0.5)])
def test_create_dataloaders_refuses_parts_below_one_sample(
    count: int, train_split: float, tokenizer: Tokenizer
) -> None:
    for data in (np.zeros(count, np.int64), "a" * count):
        problem = problem_of(create_dataloaders, data, tokenizer, make_config(train_split=train_split))
        assert (problem.setting, problem.value) == ("data.sequence_length", 16)
