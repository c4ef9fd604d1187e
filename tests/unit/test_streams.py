"""Streams are read by position, resume exactly, and refuse what would repeat or lose samples."""

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from fundamentallm import Config, DataConfig, ModelConfig
from fundamentallm.config.files import file_problems
from fundamentallm.data.loaders import step_sampler, stream_loaders
from fundamentallm.data.streams import Stream, TextStream
from fundamentallm.errors import ConfigError

END, LENGTH = "<|endoftext|>", 8


class Numbers(IterableDataset[Tensor]):
    """Counts, without a state; with noise, adds what the global generator draws."""

    def __init__(self, size: int = 20, noise: bool = False) -> None:
        self.size, self.noise, self.epochs = size, noise, list[int]()

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(self.size):
            yield torch.tensor(number) + (torch.randint(1000, ()) if self.noise else 0)


class Stateful(Numbers):
    """Has a state: the object itself, which changes while it is read."""

    def __init__(self, size: int = 20) -> None:
        super().__init__(size)
        self.state = {"next": 0}

    def __iter__(self) -> Iterator[Tensor]:
        while self.state["next"] < self.size:
            self.state["next"] += 1
            yield torch.tensor(self.state["next"] - 1)
        self.state["next"] = 0

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Once(Numbers):
    """Can be iterated once only."""

    def __init__(self) -> None:
        super().__init__()
        self.iterator = super().__iter__()

    def __iter__(self) -> Iterator[Tensor]:
        return self.iterator


def stream(dataset: Any) -> Stream:
    return Stream(dataset, default_collate, seed=3, is_main=False)


def numbers(samples: list[Any]) -> list[int]:
    return [int(sample["x"] if isinstance(sample, dict) else sample) for sample in samples]


@pytest.mark.parametrize("dataset", [Numbers(), Numbers(noise=True), Stateful()], ids=range(3))
@pytest.mark.parametrize("position", [1, 7, 20, 33])
def test_stream_restored_continues_with_the_next_sample(dataset: Any, position: int) -> None:
    whole = numbers(stream(copy.deepcopy(dataset)).read(0, 50))
    first, second = stream(copy.deepcopy(dataset)), stream(copy.deepcopy(dataset))
    first.read(0, position)
    second.load_state_dict(first.state_dict(position))
    assert numbers(second.read(position, 50)) == numbers(first.read(position, 50)) == whole[position:]
    assert first.epoch == second.epoch == 2


def test_stream_sets_epochs_and_leaves_the_global_generators_alone() -> None:
    dataset, before = Numbers(4, noise=True), torch.get_rng_state()
    one = stream(dataset)
    assert torch.equal(torch.get_rng_state(), before)
    one.read(0, 10)
    assert dataset.epochs == [0, 1, 2]


def test_step_sampler_reads_the_stream_of_a_stateful_loader() -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    sampler = step_sampler("train_loader", stateful.StatefulDataLoader(Numbers(), batch_size=7), 3)
    assert numbers(sampler.stream.read(0, 7)) == list(range(7))


def test_stream_that_has_read_ahead_saves_the_place_asked_for() -> None:
    one = stream(Stateful())
    one.read(0, 4), one.read(4, 8)
    state = one.state_dict(4)
    assert state["dataset"] == {"next": 4}
    assert numbers(one.read(4, 6)) == [4, 5]


def test_stream_that_can_be_read_once_loses_no_sample() -> None:
    assert numbers(stream(Once()).read(0, 20)) == list(range(20))
    for dataset in (Once(), Numbers(0)):
        with pytest.raises(ConfigError):
            stream(dataset).read(0, 21)
    rewound = stream(Once())
    rewound.read(4, 8)
    with pytest.raises(ConfigError):
        rewound.read(0, 4)


@pytest.mark.parametrize(
    ("name", "options"),
    [("train_loader", {"num_workers": 2}), ("train_loader", {"batch_size": None}), ("val_loader", {})],
)
def test_step_sampler_refuses_a_stream_that(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        step_sampler(name, DataLoader(Numbers(), **({"batch_size": 4} | options)), 0)


def test_stream_of_datasets_resumes_by_its_state_unless_it_has_a_buffer(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for shard in range(2):
        rows = datasets.Dataset.from_list([{"x": 100 * shard + row} for row in range(10)])
        rows.to_parquet(tmp_path / f"{shard}.parquet")
    files = sorted(map(str, tmp_path.glob("*.parquet")))

    def opened() -> Stream:
        return stream(datasets.load_dataset("parquet", data_files=files, split="train", streaming=True))

    whole, first, second = numbers(opened().read(0, 45)), opened(), opened()
    assert first.restores
    assert not stream(first.dataset.shuffle(seed=1, buffer_size=10).map(dict)).restores
    for position in (3, 12, 20, 27):
        first.read(0, position)
        second.load_state_dict(json.loads(json.dumps(first.state_dict(position))))
        assert numbers(second.read(position, 45)) == whole[position:]
        first, second = opened(), opened()


# ---- text -----------------------------------------------------------------------------------------------------


def write(folder: Path, suffix: str, count: int = 12) -> str:
    texts = [f"document {number} " + "abc" * (5 * number % 17) for number in range(count)]
    for number, text in enumerate(texts):
        if suffix == "txt":
            (folder / f"{number:02}.txt").write_text(text)
    if suffix == "jsonl":
        for shard in range(3):
            rows = [json.dumps({"text": text}) for text in texts[4 * shard : 4 * shard + 4]]
            (folder / f"{shard}.jsonl").write_text("\n".join(rows))
    return str(folder / f"*.{suffix}")


def config_of(source: str, **settings: Any) -> DataConfig:
    options: dict[str, Any] = {"tokenizer": "byte", "end_of_text": END, "sequence_length": LENGTH, "streaming": True}
    return DataConfig(source, **{**options, **settings})


def windows(one: Stream, start: int, stop: int) -> list[list[int]]:
    return [[*inputs.tolist(), int(targets[-1])] for inputs, targets in one.read(start, stop)]


@pytest.mark.parametrize(("suffix", "buffer"), [("txt", None), ("jsonl", 5)])
def test_text_stream_restored_continues_exactly(tmp_path: Path, suffix: str, buffer: int | None) -> None:
    config = config_of(write(tmp_path, suffix), shuffle_buffer=buffer)
    whole = windows(stream(TextStream(config, 0)), 0, 150)  # four passes
    for position in (1, 41, 110):
        first, second = stream(TextStream(config, 0)), stream(TextStream(config, 0))
        first.read(0, position)
        second.load_state_dict(copy.deepcopy(first.state_dict(position)))
        assert windows(second, position, 150) == whole[position:]
        assert windows(first, position, 150) == whole[position:]
        assert second.epoch == first.epoch


def test_text_stream_trains_on_every_token_once(tmp_path: Path) -> None:
    config = config_of(write(tmp_path, "jsonl"))
    dataset = TextStream(config, 0)
    found = list(dataset)
    tokens = np.concatenate([found[0][0][:1], *(targets for _, targets in found), dataset._rest[1:]])
    assert dataset.tokenizer is not None
    text = dataset.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    rows = [json.loads(line)["text"] for shard in range(3) for line in (tmp_path / f"{shard}.jsonl").open()]
    assert text == "".join(row + END for row in rows)


def test_text_stream_yields_each_window_once_through_a_buffer(tmp_path: Path) -> None:
    source = write(tmp_path, "jsonl")
    plain = windows(stream(TextStream(config_of(source), 0)), 0, 60)
    shuffled = windows(stream(TextStream(config_of(source, shuffle_buffer=7), 0)), 0, 53)
    assert shuffled != plain[:53]
    assert sorted(plain[:20]) != sorted(shuffled[:20])
    remaining = list(plain)
    for window in shuffled:
        remaining.remove(window)
    assert len(remaining) == 7


def test_text_stream_never_trains_on_held_out_tokens(tmp_path: Path) -> None:
    data = config_of(write(tmp_path, "jsonl"), validation_tokens=40)
    config = Config(str(tmp_path), ModelConfig(), data)
    train_loader, val_loader, _ = stream_loaders(config, show_progress=False)
    assert val_loader is not None
    held: Any = val_loader.dataset
    one = stream(train_loader.dataset)
    whole = windows(stream(TextStream(config_of(str(data.source)), 0)), 0, 30)
    text = [whole[0][0], *(token for window in whole for token in window[1:])]
    assert held.tokens.tolist() == text[:40]
    assert windows(one, 0, 2) == [text[40:49], text[48:57]]
    words = held.tokenizer.decode([token for window in windows(one, 2, 160) for token in window[1:]])
    assert "document 0 " not in words
    assert words.count("document 11 ") > 1


def test_text_stream_skips_and_reports_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good and long enough"}\n{"nothing": 1}\n{"text": "also good"}\n')
    said: list[str] = []
    config = config_of(str(tmp_path / "a.jsonl"), max_bad_rows=1)
    assert len([*TextStream(config, 0, said.append)]) == 3
    assert len(said) == 1
    with pytest.raises(ConfigError):
        list(TextStream(config_of(str(tmp_path / "a.jsonl")), 0))


def test_text_stream_smaller_than_its_buffer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        stream(TextStream(config_of(write(tmp_path, "jsonl"), shuffle_buffer=1000), 0))
    assert error.value.problems[0].setting == "data.shuffle_buffer"


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"prompt_field": "q"}, "prompt_field"),
        ({"num_workers": 2}, "num_workers"),
        ({"train_split": 0.5}, "train_split"),
        ({"source": {"a": 1.0, "b": 2.0}}, "source"),
        ({"validation_tokens": 8}, "validation_tokens"),
        ({"validation_tokens": 80, "validation_source": "a"}, "validation_tokens"),
        ({"shuffle_buffer": 0}, "shuffle_buffer"),
        ({"shuffle_buffer": 10, "streaming": False}, "shuffle_buffer"),
        ({"validation_tokens": 80, "streaming": False}, "validation_tokens"),
        ({"train_split": 0.5, "validation_source": "a", "streaming": False}, "train_split"),
    ],
)
def test_config_refuses_with_streaming(settings: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(**({"source": "a"} | settings))
    assert [problem.setting for problem in error.value.problems] == [wrong]


def test_stream_goes_back_to_the_start_after_a_later_save() -> None:
    for dataset in (Stateful(), Numbers()):
        moved = stream(dataset)
        moved.read(0, 9)
        moved.state_dict(9)
        moved.load_state_dict(stream(copy.deepcopy(dataset)).state_dict(0))
        assert numbers(moved.read(0, 30)) == [*range(20), *range(10)]


def test_config_refuses_what_a_stream_cannot_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        Config(data=config_of("a", tokenizer="char"))
    assert error.value.problems[0].setting == "data.tokenizer"
    np.save(tmp_path / "a.npy", np.arange(9))
    (tmp_path / "tokenizer.json").write_text("")
    data = config_of(str(tmp_path / "a.npy"), tokenizer=str(tmp_path / "tokenizer.json"))
    assert [problem.setting for problem in file_problems(Config(str(tmp_path), data=data))] == ["data.streaming"]


def test_smaller_shuffle_buffer_keeps_the_windows_of_the_larger(tmp_path: Path) -> None:
    source = write(tmp_path, "txt")
    first, smaller = (TextStream(config_of(source, shuffle_buffer=size), seed=1) for size in (8, 2))
    next(iter(first))
    smaller.load_state_dict(first.state_dict())
    held = {window.tobytes() for window in smaller._buffer[2:]}
    assert len([*itertools.islice(smaller, 20)]) == 20
    assert not held <= {window.tobytes() for window in smaller._buffer}
    with pytest.raises(ValueError, match="buffer"):
        TextStream(config_of(source), 1).load_state_dict(first.state_dict())
