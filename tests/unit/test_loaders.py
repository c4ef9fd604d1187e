"""Which samples a step trains on: a pure function of seed and place, the same on any number of processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data import WeightedRandomSampler as Weighted

from fundamentallm.config.schema import IGNORE_INDEX, Config, DataConfig, TrainingConfig
from fundamentallm.data import loaders
from fundamentallm.data.corpus import load_corpus
from fundamentallm.data.datasets import TokenDataset
from fundamentallm.data.loaders import as_is, create_dataloaders, device_batches, load, step_sampler
from fundamentallm.data.sampler import POSITIONS_AT_ONCE, Start, StepSampler, derive_seed, permute
from fundamentallm.data.tokenizers import create_tokenizer
from fundamentallm.errors import ConfigError

SHAPES = [(10, 10), (10, 3), (10, 4), (1, 4), (3, 8), (31, 6), (64, 16), (2 * POSITIONS_AT_ONCE + 7, 4000)]
"""(samples, batch size): batches that fit, that leave one sample or more over, and blocks that they cross."""

shapes = pytest.mark.parametrize(("samples", "batch_size"), SHAPES)
shuffles = pytest.mark.parametrize("seed", [None, 3])


def test_permute_is_a_bijection_of_every_size() -> None:
    for size in range(1, 301):
        assert np.array_equal(np.sort(permute(np.arange(size), size, seed=size)), np.arange(size))


@pytest.mark.parametrize("size", [2**12, 2**16 + 1, 99_991, 2**18 - 1])
def test_permute_is_a_bijection_of_large_sizes(size: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed=1)), np.arange(size))


def test_permute_reaches_far_beyond_what_fits_in_memory() -> None:
    size = 2**40 + 1
    places = permute(np.arange(1000), size, seed=1)
    assert len(set(places.tolist())) == 1000
    assert places.max() < size
    assert places.min() >= 0
    assert places.max() > size // 2


def test_permute_takes_each_position_to_the_same_place_however_they_are_asked_for() -> None:
    whole = permute(np.arange(1000), 1000, seed=1)
    for asked in (np.arange(1000)[::-1], np.array([999, 0, 5, 5]), np.arange(250, 750)):
        assert np.array_equal(permute(asked, 1000, seed=1), whole[asked])


def test_permute_leaves_no_trace_of_the_order_nor_of_another_seeds() -> None:
    orders = [np.arange(5000), *(permute(np.arange(5000), 5000, seed) for seed in range(5))]
    for one, other in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.06
        assert (one == other).sum() < 10


def test_derived_seeds_are_apart_and_fit_torch() -> None:
    parts = [(seed, epoch) for seed in range(30) for epoch in range(30)] + [(1,), (1, 1, 1), (11, 1, 1)]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


@shapes
@shuffles
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("micro", [None, 1, 2])
def test_the_shares_of_all_processes_make_the_batch(
    samples: int, batch_size: int, seed: int | None, processes: int, micro: int | None
) -> None:
    samplers = [StepSampler(samples, batch_size, seed, i, processes, micro) for i in range(processes)]
    for step in range(2 * samplers[0].steps_per_epoch):
        batch = samplers[0].batch(step)
        shares = [sampler.rank_batch(step) for sampler in samplers]
        assert [index for share in shares for index in share.indices[: share.rows]] == batch
        rows = [share.rows for share in shares]
        assert max(rows) - min(rows) <= 1


@shapes
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("micro", [None, 1, 2])
def test_every_process_has_the_same_number_of_micro_batches_and_a_row_for_each(
    samples: int, batch_size: int, processes: int, micro: int | None
) -> None:
    samplers = [StepSampler(samples, batch_size, 0, i, processes, micro) for i in range(processes)]
    for step in range(samplers[0].steps_per_epoch):
        shares = [sampler.rank_batch(step) for sampler in samplers]
        (count,) = {share.micro_batches for share in shares}
        most = max(share.rows for share in shares)
        assert (count - 1) * (micro or batch_size) < most <= count * (micro or batch_size)
        for share in shares:
            assert len(share.indices) == max(share.rows, count)
            assert set(share.indices[share.rows :]) <= {samplers[0].batch(step)[0]}


@shapes
@shuffles
def test_an_epoch_covers_every_sample_exactly_once(samples: int, batch_size: int, seed: int | None) -> None:
    sampler = StepSampler(samples, batch_size, seed)
    for epoch in range(3):
        first = epoch * sampler.steps_per_epoch
        batches = [sampler.batch(first + step) for step in range(sampler.steps_per_epoch)]
        assert sorted(itertools.chain(*batches)) == list(range(samples))
        assert {len(batch) for batch in batches[:-1]} <= {batch_size}


@pytest.mark.parametrize(("samples", "batch_size"), [(10, 3), (10, 5), (31, 6)])
@shuffles
def test_drop_last_leaves_out_the_short_batch_and_nothing_else(samples: int, batch_size: int, seed: int | None) -> None:
    whole, dropped = (StepSampler(samples, batch_size, seed, drop_last=drop) for drop in (False, True))
    steps = samples // batch_size
    assert dropped.steps_per_epoch == steps
    for epoch, step in itertools.product(range(2), range(steps)):
        assert dropped.batch(epoch * steps + step) == whole.batch(epoch * whole.steps_per_epoch + step)
        assert len(dropped.batch(step)) == batch_size


@shapes
@pytest.mark.parametrize("drop_last", [False, True])
def test_samples_before_a_step_is_what_the_batches_before_it_hold(
    samples: int, batch_size: int, drop_last: bool
) -> None:
    if drop_last and samples < batch_size:
        samples = batch_size
    sampler, held = StepSampler(samples, batch_size, 0, drop_last=drop_last), 0
    for step in range(3 * sampler.steps_per_epoch):
        assert sampler.samples_before(step) == held
        held += len(sampler.batch(step))


@shapes
def test_a_batch_does_not_depend_on_what_was_asked_before(samples: int, batch_size: int) -> None:
    sampler = StepSampler(samples, batch_size, 7)
    steps = range(3 * sampler.steps_per_epoch)
    in_order = [sampler.batch(step) for step in steps]
    assert [sampler.batch(step) for step in reversed(steps)] == in_order[::-1]
    assert [StepSampler(samples, batch_size, 7).batch(step) for step in steps] == in_order


@given(
    samples=st.integers(1, 40), first=st.integers(1, 12), second=st.integers(1, 12), step=st.integers(0, 30),
    drop_last=st.booleans(),
)  # fmt: skip
def test_batches_that_start_anywhere_go_on_from_there(
    samples: int, first: int, second: int, step: int, drop_last: bool
) -> None:
    """After a change of batch size in the middle of an epoch, its samples are still seen once, and all counts agree."""
    if drop_last:
        samples = max(samples, first, second)
    before = StepSampler(samples, first, 7, drop_last=drop_last)
    after = StepSampler(samples, second, 7, drop_last=drop_last)
    epoch, place = before.place(step)
    after.start = Start(step, epoch, place, before.samples_before(step))

    held = before.samples_before(step)
    rest_of_epoch, last = [], step
    while after.place(last)[0] == epoch:
        assert after.place(last) == (epoch, place + len(rest_of_epoch))
        assert after.samples_before(last) == held + len(rest_of_epoch)
        rest_of_epoch += after.batch(last)
        last += 1
    order = StepSampler(samples, samples, 7).batch(epoch)
    left_out = (samples - place) % second if drop_last else 0
    assert rest_of_epoch == order[place : samples - left_out]

    assert after.place(last) == (epoch + 1, 0)
    assert after.steps_before_epoch(epoch + 1) == last
    assert after.samples_before(last) == held + len(rest_of_epoch)
    assert after.epochs_before(last) == epoch + 1
    assert after.steps_before_epoch(epoch + 3) == last + 2 * after.steps_per_epoch
    fresh = StepSampler(samples, second, 7, drop_last=drop_last)
    for further in range(2 * after.steps_per_epoch):
        assert after.batch(last + further) == fresh.batch(fresh.steps_before_epoch(epoch + 1) + further)
        assert after.samples_before(last + further + 1) - after.samples_before(last + further) == len(
            after.batch(last + further)
        )


@shapes
def test_a_start_between_two_epochs_changes_no_batch(samples: int, batch_size: int) -> None:
    whole, started = StepSampler(samples, batch_size, 7), StepSampler(samples, batch_size, 7)
    steps = whole.steps_per_epoch
    started.start = Start(2 * steps, 2, 0, whole.samples_before(2 * steps))
    for step in range(2 * steps, 4 * steps):
        assert started.batch(step) == whole.batch(step)
        assert started.place(step) == whole.place(step)
        assert started.samples_before(step) == whole.samples_before(step)
        assert started.epochs_before(step) == whole.epochs_before(step)
    for epoch in (3, 4):
        assert started.steps_before_epoch(epoch) == whole.steps_before_epoch(epoch) == epoch * steps


def test_order_differs_between_epochs_and_between_seeds() -> None:
    orders = [StepSampler(100, 100, seed).batch(epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_without_a_seed_the_order_is_the_datasets() -> None:
    sampler = StepSampler(10, 4, None)
    assert [sampler.batch(step) for step in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]


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
def test_a_loader_whose_order_cannot_be_resumed_is_refused_by_name(loader: object, named: str) -> None:
    with pytest.raises(ConfigError, match=f"val_loader .*{named}"):
        step_sampler("val_loader", loader, 0, 0, 1)


@pytest.mark.parametrize(("shuffle", "drop_last"), itertools.product([False, True], repeat=2))
def test_a_step_sampler_runs_through_a_loader_as_the_loader_says(shuffle: bool, drop_last: bool) -> None:
    loader = DataLoader(NUMBERS, batch_size=4, shuffle=shuffle, drop_last=drop_last)
    ours = step_sampler("train_loader", loader, 5, 1, 2, 1)
    same = StepSampler(10, 4, 5 if shuffle else None, 1, 2, 1, drop_last)
    assert ours.steps_per_epoch == len(loader)
    for step in range(2 * len(loader)):
        assert ours.rank_batch(step) == same.rank_batch(step)


def step_batches(num_workers: int, start: int = 0) -> list[torch.Tensor]:
    dataset = TokenDataset(np.arange(200), 7)
    loader = DataLoader(dataset, batch_size=4, shuffle=True, num_workers=num_workers, collate_fn=as_is)
    sampler = step_sampler("train_loader", loader, seed=1, process_index=0, num_processes=1)
    batches = device_batches(loader, sampler, start, 20, torch.device("cpu"))
    return [torch.stack((batch.inputs, batch.targets)) for batch in batches]


@pytest.mark.parametrize("tokens_at_once", [2**12, 60, 1])
def test_device_batches_are_the_shares_of_their_steps_over_the_epochs_ends(
    tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "GATHERED_AT_ONCE", tokens_at_once)
    dataset, sampler = TokenDataset(np.arange(200), 7), StepSampler(29, 4, 1)
    assert len(dataset) == 29
    batches = step_batches(0, start=5)
    assert len(batches) == 15
    for step, batch in enumerate(batches, start=5):
        assert torch.equal(batch, torch.stack(dataset.__getitems__(sampler.rank_batch(step).indices)))


def test_worker_processes_change_no_batch() -> None:
    for ours, same in zip(step_batches(2), step_batches(0), strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_iterating_draws_nothing_from_the_global_generator(num_workers: int) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    step_batches(num_workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plain_loader_over_windows_of_tokens_gives_them_as_ours_does() -> None:
    dataset, sampler = TokenDataset(np.arange(40), 4), StepSampler(10, 3, 0)
    batches = [
        list(load(DataLoader(dataset, batch_size=3, **options), (sampler.rank_batch(step).indices for step in range(4))))
        for options in ({}, {"collate_fn": as_is})
    ]
    for plain, ours in zip(*batches, strict=True):
        assert plain[0].shape == (len(plain[1]), 4)
        torch.testing.assert_close(plain, ours)


def in_brackets(items: list[int]) -> list[str]:
    return [f"<{item}>" for item in items]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_collated_as_the_users_loader_does(num_workers: int) -> None:
    loader = DataLoader(NUMBERS, batch_size=4, collate_fn=in_brackets, num_workers=num_workers)
    assert list(load(loader, iter([[4, 5, 7], [8, 9]]))) == [["<4>", "<5>", "<7>"], ["<8>", "<9>"]]


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("micro", [None, 1, 2])
def test_device_batches_of_all_processes_have_each_sample_of_a_step_unmasked_once(
    processes: int, micro: int | None
) -> None:
    dataset = TokenDataset(np.arange(29 * 7 + 1), 7)
    loader = DataLoader(dataset, batch_size=4, collate_fn=as_is)
    samplers = [StepSampler(len(dataset), 4, 0, index, processes, micro) for index in range(processes)]
    device = torch.device("cpu")
    batches = [list(device_batches(loader, sampler, 3, 12, device)) for sampler in samplers]
    for step, parts in enumerate(zip(*batches, strict=True), start=3):
        whole_inputs, whole_targets = dataset.__getitems__(samplers[0].batch(step))
        kept = [(batch.targets != IGNORE_INDEX).all(dim=1) for batch in parts]
        assert torch.equal(torch.cat([part[0][rows] for part, rows in zip(parts, kept, strict=True)]), whole_inputs)
        assert torch.equal(torch.cat([part[1][rows] for part, rows in zip(parts, kept, strict=True)]), whole_targets)
        for inputs, targets, count, rows in parts:
            assert inputs.min() >= 0
            assert (targets != IGNORE_INDEX).sum(dim=1).tolist() == [7] * rows + [0] * (len(inputs) - rows)
            assert count == samplers[0].rank_batch(step).micro_batches <= len(inputs)


@pytest.mark.parametrize("item", [1, (1, 2), torch.ones(3), (torch.ones(3),) * 3])
def test_a_loader_that_does_not_give_inputs_and_targets_is_refused(item: object) -> None:
    loader = DataLoader([item] * 4, batch_size=2, collate_fn=lambda items: items[0])
    with pytest.raises(ConfigError, match=type(item).__name__):
        list(device_batches(loader, StepSampler(4, 2, None), 0, 2, torch.device("cpu")))


def make_config(**data: object) -> Config:
    return Config(data=DataConfig(**{"sequence_length": 16} | data), training=TrainingConfig(batch_size=4))


@pytest.fixture
def tokenizer(text: str) -> Tokenizer:
    return create_tokenizer("char", text)


def tokens_of(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    cut = int(len(text) * 0.9)
    return tokenizer.encode(text[:cut]).ids, tokenizer.encode(text[cut:]).ids


@pytest.mark.parametrize("form", ["text", "array", "tensor", "list", "corpus"])
def test_every_form_of_data_gives_the_same_loaders(form: str, text: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
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


def test_loaders_of_a_corpus_carry_its_tokenizer(text: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    corpus = load_corpus(DataConfig(source=str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "cache")), False)
    train_loader, _ = create_dataloaders(corpus, None, make_config())
    assert train_loader.dataset.tokenizer is corpus.tokenizer


@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("piece", ["a", "é", "漢a"])
def test_bytes_of_the_targets_are_all_bytes_but_the_first(piece: str, as_tokens: bool) -> None:
    validation = piece * 40
    tokenizer = create_tokenizer("byte")
    train = "x" * (len(validation.encode()) if as_tokens else len(validation))
    data = tokenizer.encode(train + validation).ids if as_tokens else train + validation
    _, val_loader = create_dataloaders(data, tokenizer, make_config(train_split=0.5))
    assert val_loader is not None
    assert len(val_loader.dataset.tokens) == len(validation.encode())
    assert val_loader.dataset.num_bytes == len(validation.encode()) - 1


def test_bytes_of_tokens_without_a_tokenizer_are_unknown() -> None:
    _, val_loader = create_dataloaders(list(range(500)), None, make_config())
    assert val_loader is not None
    assert val_loader.dataset.num_bytes is None


def test_carriage_returns_of_a_text_are_kept() -> None:
    text = "a\r\nb\rc\n" * 30
    tokenizer = create_tokenizer("byte")
    train_loader, _ = create_dataloaders(text, tokenizer, make_config(train_split=1.0))
    assert tokenizer.decode(train_loader.dataset.tokens.tolist()) == text


def test_a_tokenizer_set_to_truncate_still_gives_the_whole_text(text: str, tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(max_length=100)
    train_loader, _ = create_dataloaders(text, tokenizer, make_config(train_split=1.0))
    assert len(train_loader.dataset.tokens) == len(text)


@pytest.mark.parametrize("data", ["text", [1] * 200], ids=["text", "tokens"])
def test_a_split_of_one_gives_no_validation(data: object, text: str, tokenizer: Tokenizer) -> None:
    loaders = create_dataloaders(text if data == "text" else data, tokenizer, make_config(train_split=1.0))
    assert loaders[1] is None


def test_the_default_batch_size_is_that_of_the_command_line(text: str, tokenizer: Tokenizer) -> None:
    train_loader, _ = create_dataloaders(text, tokenizer, Config())
    assert train_loader.batch_size == Config().resolved().training.batch_size


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_a_token_outside_the_vocabulary_is_refused_with_the_range(wrong: int, tokenizer: Tokenizer) -> None:
    largest = tokenizer.get_vocab_size() - 1
    create_dataloaders([0] * 300 + [largest], tokenizer, make_config())
    with pytest.raises(ConfigError, match=rf"{wrong}.*0 to {largest}"):
        create_dataloaders([0] * 300 + [wrong], tokenizer, make_config())
    with pytest.raises(ConfigError, match=rf"0 to {largest}"):
        create_dataloaders([0] * 300 + [largest + 1], tokenizer, make_config())


@pytest.mark.parametrize("tokens", [[[1, 2]] * 200, [0.5] * 200, []])
def test_tokens_that_are_not_a_line_of_integers_are_refused(tokens: list) -> None:
    with pytest.raises(ConfigError, match="1-D integers"):
        create_dataloaders(tokens, None, make_config())


def test_a_text_needs_a_tokenizer(text: str) -> None:
    with pytest.raises(ConfigError, match="tokenizer is None"):
        create_dataloaders(text, None, make_config())


def test_unknown_characters_of_a_text_are_refused_by_name(text: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="漢"):
        create_dataloaders(text + "漢", tokenizer, make_config())


@pytest.mark.parametrize(("count", "train_split"), [(160, 0.9), (160, 0.1), (16, 1.0), (0, 0.5)])
def test_a_part_too_short_for_one_sample_is_refused(count: int, train_split: float, tokenizer: Tokenizer) -> None:
    for data in (np.zeros(count, np.int64), "a" * count):
        with pytest.raises(ConfigError, match="= 17"):
            create_dataloaders(data, tokenizer, make_config(train_split=train_split))


@pytest.mark.parametrize(("size", "batch", "micro"), [(44, 22, 4), (44, 9, 8), (7, 32, None), (10, 4, 3), (13, 5, 1)])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_even_micro_batches_have_one_size_and_the_same_samples(
    size: int, batch: int, micro: int | None, processes: int
) -> None:
    even = [StepSampler(size, batch, 3, i, processes, micro, pad=True) for i in range(processes)]
    plain = [StepSampler(size, batch, 3, i, processes, micro) for i in range(processes)]
    largest = -(-min(size, batch) // processes)
    parts = -(-largest // (micro or largest))
    for step in range(2 * plain[0].steps_per_epoch):
        for one, other in zip(even, plain, strict=True):
            indices, rows, micro_batches = one.rank_batch(step)
            assert indices[:rows] == other.rank_batch(step).indices[:rows]
            assert len(indices) == micro_batches * -(-largest // parts)
            assert micro_batches <= parts
