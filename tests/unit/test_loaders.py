"""Loaders: which are accepted, and what they load for each step."""

import itertools
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from tokenizers import Tokenizer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler as Weighted,
)
from torch.utils.data.distributed import DistributedSampler

from fundamentallm.config.schema import Config, DataConfig, TrainingConfig
from fundamentallm.data.corpus import load_corpus
from fundamentallm.data.datasets import TokenDataset
from fundamentallm.data.loaders import create_dataloaders, device_batches, step_sampler
from fundamentallm.data.sampler import StepSampler
from fundamentallm.data.tokenizers import create_tokenizer
from fundamentallm.errors import ConfigError
from tests.conftest import problem_of

NUMBERS = list(range(10))


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return itertools.count()


class Negated(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        return (-batch for batch in super().__iter__())


class Sharding(DistributedSampler):
    """Another order than torch's."""


@pytest.mark.parametrize(
    ("loader", "named"),
    [
        (DataLoader(Endless()), "a stream"),
        (DataLoader(NUMBERS, batch_size=None), "batch_size=None"),
        (DataLoader([]), "0 samples"),
        (DataLoader(NUMBERS, batch_size=11, drop_last=True), "10 samples"),
        (NUMBERS, "list"),
        (skip_first_batches(DataLoader(NUMBERS, batch_size=2), 1), "skip_first_batches"),
        (Negated(NUMBERS), "Negated"),
        (DataLoader(NUMBERS, sampler=Sharding(NUMBERS, num_replicas=2, rank=0)), "gives each process a share"),
    ],
)
def test_step_sampler_refuses_an_order_that_cannot_resume(loader: object, named: str) -> None:
    problem = problem_of(step_sampler, "val_loader", loader, 0)
    assert problem.value is loader
    assert named in problem


class Shuffling:
    """A sampler of the user's. `draw` returns a number below n."""

    def __init__(self, draw: Any, **attributes: Any) -> None:
        self.draw = draw
        self.__dict__.update(attributes)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(NUMBERS, key=lambda _: self.draw(self)))


class ByEpoch(Shuffling):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(NUMBERS[self.epoch :] + NUMBERS[: self.epoch])


class Buckets:
    """Batches of unlike sizes, in an order that a generator draws."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def __iter__(self) -> Iterator[list[int]]:
        batches = [[0, 1, 2], [3], [4, 5], [6, 7, 8, 9]]
        return iter([batches[i] for i in torch.randperm(4, generator=self.generator).tolist()])


def torch_draw(sampler: Any) -> float:
    return float(torch.rand((), generator=sampler.generator))


SEEDED = [
    lambda: {"sampler": Weighted([1.0] * 5 + [9.0] * 5, 10)},
    lambda: {"sampler": RandomSampler(NUMBERS, replacement=True)},
    lambda: {"sampler": SubsetRandomSampler([1, 3, 5, 7, 9])},
    lambda: {"sampler": Shuffling(torch_draw, generator=torch.Generator())},
    lambda: {"sampler": Shuffling(lambda s: s.rng.random(), rng=np.random.default_rng(3))},
    lambda: {"sampler": Shuffling(lambda s: s.rng.random(), rng=random.Random(3))},
    lambda: {"sampler": ByEpoch(None)},
    lambda: {"batch_sampler": BatchSampler(Weighted([1.0] * 10, 10), 3, True)},
    lambda: {"batch_sampler": Buckets()},
]


@pytest.mark.parametrize("make", SEEDED)
def test_step_sampler_lists_an_order_that_follows_from_a_seed(make: Any) -> None:
    """The same on any number of processes, after a resume, and whatever was drawn before; another in each epoch."""

    def sampler(index: int = 0, count: int = 1, seed: int = 5, **arguments: Any) -> StepSampler:
        torch.rand(index + 1)
        options = make()
        loader = DataLoader(NUMBERS, **options, **({} if "batch_sampler" in options else {"batch_size": 3}))
        return step_sampler("train_loader", loader, seed, process_index=index, num_processes=count, **arguments)

    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    whole = sampler()
    torch.set_rng_state(state[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == state[1:]
    steps = 3 * whole.steps_per_epoch
    batches = [whole.batch(step) for step in range(steps)]
    assert [sampler().batch(step) for step in range(steps - 1, -1, -1)] == batches[::-1]
    for count in (2, 3):
        shares = [sampler(index, count, micro_batch_size=1) for index in range(count)]
        for step, batch in enumerate(batches):
            parts = [share.rank_batch(step) for share in shares]
            assert [i for part in parts for i in part.indices[: part.rows]] == batch
            assert len({part.micro_batches for part in parts}) == 1
    epochs = [batches[start : start + whole.steps_per_epoch] for start in range(0, steps, whole.steps_per_epoch)]
    assert epochs[0] != epochs[1]
    changed = sampler(seed=6)
    assert isinstance(whole.order.sampler, ByEpoch) or [changed.batch(step) for step in range(steps)] != batches
    assert whole.samples_seen(whole.steps_per_epoch) == sum(map(len, epochs[0]))


def test_step_sampler_takes_a_sequential_part_of_the_data() -> None:
    loader = DataLoader(NUMBERS, batch_size=2, sampler=SequentialSampler(range(4)))
    sampler = step_sampler("train_loader", loader, 0)
    assert [sampler.batch(step) for step in range(3)] == [[0, 1], [2, 3], [0, 1]]


def test_step_sampler_refuses_an_order_that_follows_from_nothing() -> None:
    draws: list[Any] = [lambda _: float(torch.rand(())), lambda _: random.random(), lambda _: np.random.random()]
    for sampler in (*map(Shuffling, draws), iter(NUMBERS), itertools.count(), [3, 10]):
        problem = problem_of(step_sampler, "train_loader", DataLoader(NUMBERS, sampler=sampler, batch_size=2), 0)
        assert problem.value is sampler
    changing = ByEpoch(None)
    changing.__class__ = type("Growing", (ByEpoch,), {"__iter__": lambda self: iter(NUMBERS[: 4 + self.epoch])})
    made = step_sampler("train_loader", DataLoader(NUMBERS, sampler=changing, batch_size=2), 0)
    assert problem_of(made.batch, 2).setting == "sampler"


@pytest.mark.parametrize(("shuffle", "drop_last"), itertools.product([False, True], repeat=2))
def test_step_sampler_follows_the_settings_of_any_loader(shuffle: bool, drop_last: bool) -> None:
    """A plain one, one that accelerate has prepared, a DistributedSampler, and torchdata's loader."""
    options: dict[str, Any] = {"batch_size": 4, "drop_last": drop_last}
    loader = DataLoader(NUMBERS, shuffle=shuffle, **options)
    distributed = DistributedSampler(NUMBERS, num_replicas=2, rank=1, shuffle=shuffle)
    loaders = [
        loader,
        Accelerator(cpu=True).prepare(DataLoader(NUMBERS, shuffle=shuffle, **options)),
        prepare_data_loader(loader, num_processes=2, process_index=1, put_on_device=False, use_seedable_sampler=True),
        DataLoader(NUMBERS, sampler=distributed, **options),
    ]
    if find_spec("torchdata"):
        from torchdata.stateful_dataloader import StatefulDataLoader

        loaders.append(StatefulDataLoader(NUMBERS, shuffle=shuffle, **options))
    expected = StepSampler(10, 4, 5 if shuffle else None, drop_last=drop_last)
    for each in loaders:
        ours = step_sampler("train_loader", each, 5)
        assert [ours.batch(step) for step in range(6)] == [expected.batch(step) for step in range(6)]


@pytest.mark.parametrize(("batch_size", "later", "wrong"), [(11, [], [11]), (4, [12, 10, 13], [12, 13])])
def test_step_sampler_refuses_batches_larger_than_the_data(batch_size: int, later: list[int], wrong: list[int]) -> None:
    loader = DataLoader(NUMBERS, batch_size=batch_size)
    assert step_sampler("val_loader", loader, 0).batch(0) == NUMBERS[:batch_size]
    schedule = list(enumerate(later, start=5))
    with pytest.raises(ConfigError) as error:
        step_sampler("train_loader", loader, 0, schedule=schedule)
    setting = "training.batch_size_schedule" if later else "training.batch_size"
    assert [(problem.setting, problem.value) for problem in error.value.problems] == [(setting, size) for size in wrong]
    assert all("at most 10" in problem.allowed for problem in error.value.problems)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_device_batches_continue_across_epochs(num_workers: int) -> None:
    dataset, order = TokenDataset(np.arange(200), 7), StepSampler(29, 4, 1)
    loader = DataLoader(dataset, batch_size=4, shuffle=True, num_workers=num_workers)  # torch's default collate_fn
    sampler = step_sampler("train_loader", loader, seed=1)
    before = torch.get_rng_state()
    batches = [batch.content for batch in device_batches(loader, sampler, 5, 20, torch.device("cpu"))]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(batches) == 15
    for step, batch in enumerate(batches, start=5):
        assert torch.equal(torch.stack([*batch]), torch.stack(dataset.__getitems__(order.rank_batch(step).indices)))


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


def test_create_dataloaders_ignores_the_tokenizers_truncation(text: str, tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(max_length=100)
    train_loader, val_loader = create_dataloaders(text, tokenizer, make_config(train_split=1.0))
    assert len(train_loader.dataset.tokens) == len(text)
    assert val_loader is None


def test_create_dataloaders_refuses_what_the_vocabulary_lacks(text: str, tokenizer: Tokenizer) -> None:
    assert problem_of(create_dataloaders, text + "漢", tokenizer, make_config()).value == ["漢"]
    assert problem_of(create_dataloaders, text, None, make_config()).setting == "tokenizer"
    largest = tokenizer.get_vocab_size() - 1
    create_dataloaders([0] * 300 + [largest], tokenizer, make_config())
    for wrong in (-1, largest + 1):
        problem = problem_of(create_dataloaders, [0] * 300 + [wrong], tokenizer, make_config())
        assert wrong in problem.value
        assert f"0 to {largest}" in problem.allowed


@pytest.mark.parametrize("tokens", [[[1, 2]] * 200, [0.5] * 200, []])
def test_create_dataloaders_refuses_other_than_1d_integers(tokens: list) -> None:
    assert problem_of(create_dataloaders, tokens, None, make_config()).allowed == "1-D integers"
