"""Runs on streams: the same curve in any layout, and after a crash."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fundamentallm import Config, DataConfig, LoggingCallback, ModelConfig, Trainer, TrainingConfig
from fundamentallm.errors import ConfigError
from fundamentallm.train import make_trainer
from tests.integration.runs import (
    KillAfter,
    KilledError,
    PartlyIgnored,
    assert_same_weights,
    lines,
    on_processes,
    prose,
    timeless,
    weights,
)
from tests.integration.test_training_loop import Bigram

STEPS = 9


class Samples(IterableDataset[tuple[Tensor, Tensor]]):
    """Samples of unlike numbers of targets, without a state. With `shards`, each process gets others."""

    def __init__(self, shards: bool = False) -> None:
        self.shards = shards

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        first = dist.get_rank() if self.shards else 0
        samples = PartlyIgnored(30)
        for index in range(first, len(samples), 1 + self.shards):
            inputs, targets = samples[index]
            inputs[0] = torch.randint(20, ())
            yield inputs, targets


def train(folder: Path | str, *callbacks: Any, dataset: Any = None, **training: Any) -> Trainer:
    torch.manual_seed(0)
    settings = {"max_steps": STEPS, "learning_rate": 0.05, "log_every_n_steps": 1, "save_every_n_steps": 2}
    config = Config(output_dir=str(folder), training=TrainingConfig(**{**settings, **training}))
    log = LoggingCallback(Path(folder) / "metrics.jsonl")
    loader = DataLoader(dataset or Samples(), batch_size=7)
    trainer = Trainer(Bigram(), config, loader, callbacks=[log, *callbacks])
    trainer.train()
    return trainer


def assert_same_curve(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert [line.get("tokens") for line in one] == [line.get("tokens") for line in other]
    for first, second in zip(one, other, strict=True):
        for key in first.keys() & {"train_loss", "val_loss", "grad_norm", "epoch"}:
            assert first[key] == pytest.approx(second[key], rel=1e-5)


def killed_and_resumed(world: int, folder: Path, micro_batch_size: int | None = None) -> Trainer:
    with pytest.raises(KilledError):
        train(folder, KillAfter(5), micro_batch_size=micro_batch_size)
    trainer = train(folder, micro_batch_size=micro_batch_size)
    assert trainer.accelerator.num_processes == world
    assert trainer.resumed_from is not None
    return trainer


def test_stream_without_a_state_resumes_to_the_bit_in_any_layout(tmp_path: Path) -> None:
    whole, resumed = train(tmp_path / "whole"), killed_and_resumed(1, tmp_path / "one")
    assert whole.epochs_done > 1
    assert_same_weights(weights(whole), weights(resumed))
    assert timeless(lines(tmp_path / "whole")) == timeless(lines(tmp_path / "one"))
    on_processes(2, killed_and_resumed, tmp_path / "two", 2)
    assert_same_curve(lines(tmp_path / "whole"), lines(tmp_path / "two"))


def refused(world: int, folder: str) -> None:
    with pytest.raises(ConfigError) as error:
        train(folder, dataset=Samples(shards=True))
    assert error.value.problems[0].setting == "train_loader"
    assert dist.get_world_size() == world


def test_stream_that_shards_itself_is_refused(tmp_path: Path) -> None:
    on_processes(2, refused, str(tmp_path))


def test_stream_is_refused_by_its_length(tmp_path: Path) -> None:
    for name, value in (("max_steps", None), ("max_epochs", 2)):
        with pytest.raises(ConfigError) as error:
            train(tmp_path, **{name: value})
        assert error.value.problems[0].setting == f"training.{name}"


def test_stream_with_another_beginning_is_not_resumed(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ConfigError) as error:
        train(tmp_path, seed=1, resume_changes=["training.seed"], max_steps=12)
    assert "data.sampler" in [problem.setting for problem in error.value.problems]


# ---- from the config ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    documents = [text for text in prose(20_000).split("\n\n") if text.strip()]
    for shard in range(3):
        rows = [json.dumps({"text": text}) for text in documents[shard::3]]
        (folder / f"{shard}.jsonl").write_text("\n".join(rows))
    (folder / "validation.txt").write_text(prose(3_000))
    return folder


def streamed(source: Path, output: Path | str, *callbacks: Any, data: Any = (), **training: Any) -> Trainer:
    defaults = {"batch_size": 8, "max_steps": 12, "learning_rate": 1e-2, "log_every_n_steps": 1}
    settings: dict[str, Any] = {
        **{"source": str(source / "*.jsonl"), "streaming": True, "tokenizer": "byte", "sequence_length": 32},
        **{"end_of_text": "<|endoftext|>", "cache_dir": str(source / "cache"), "shuffle_buffer": 20},
        **{"validation_tokens": 300},
        **dict(data),
    }
    config = Config(
        str(output), ModelConfig(d_model=16, num_heads=2, num_layers=1), DataConfig(**settings),
        TrainingConfig(**{**defaults, "save_every_n_steps": 2, "eval_every_n_steps": 4, **training}), sample_tokens=0,
    )  # fmt: skip
    trainer = make_trainer(config)
    for callback in callbacks:
        trainer.callbacks.add(callback)
    trainer.train()
    return trainer


def streamed_on(world: int, folder: Path, output: Path) -> None:
    trainer = streamed(folder, output, micro_batch_size=3)
    assert trainer.accelerator.num_processes == world


def test_streamed_text_resumes_and_has_one_curve_in_any_layout(folder: Path, tmp_path: Path) -> None:
    whole = streamed(folder, tmp_path / "whole")
    with pytest.raises(KilledError):
        streamed(folder, tmp_path / "killed", KillAfter(7))
    resumed = streamed(folder, tmp_path / "killed")
    assert resumed.resumed_from is not None
    assert_same_weights(weights(whole), weights(resumed))
    assert timeless(lines(tmp_path / "whole")) == timeless(lines(tmp_path / "killed"))
    on_processes(2, streamed_on, folder, tmp_path / "two")
    assert_same_curve(lines(tmp_path / "whole"), lines(tmp_path / "two"))


def test_streamed_text_that_changed_is_not_resumed(folder: Path, tmp_path: Path) -> None:
    streamed(folder, tmp_path, max_steps=2)
    with pytest.raises(ConfigError) as error:
        streamed(folder, tmp_path, data={"source": str(folder / "[01].jsonl")}, max_steps=2)
    assert "data.content" in [problem.setting for problem in error.value.problems]


@pytest.mark.parametrize("streaming", [True, False])
def test_validation_source_is_what_is_validated_on(folder: Path, tmp_path: Path, streaming: bool) -> None:
    source = str(folder / "validation.txt")
    unset = {"validation_tokens": None, "shuffle_buffer": None}
    data = {**unset, "validation_source": source, "streaming": streaming}
    trainer = streamed(folder, tmp_path, data=data, max_steps=2)
    assert trainer.val_loader is not None
    held: Any = trainer.val_loader.dataset
    assert held.tokenizer.decode(held.tokens[:-1].tolist()) == prose(3_000)
    if not streaming:
        documents = sum(len(path.read_text().splitlines()) for path in folder.glob("*.jsonl"))
        ids: Any = trainer.train_loader.dataset.tokens  # type: ignore[attr-defined]
        assert int((ids == held.end_of_text).sum()) == documents
