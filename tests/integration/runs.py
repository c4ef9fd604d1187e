"""Small real runs for the integration tests."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which a trainer imports as it goes: once here, rather than in every process that is forked
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState, debug_launcher
from accelerate.parallelism_config import ParallelismConfig
from torch import Tensor

from fundamentallm import (
    Callback,
    Config,
    DataConfig,
    LoggingCallback,
    ModelConfig,
    Trainer,
    TrainingConfig,
    Transformer,
    create_dataloaders,
    create_tokenizer,
)
from fundamentallm.config.schema import IGNORE_INDEX
from fundamentallm.training.metrics import MEASURED
from tests.conftest import reset_accelerate

SEQUENCE = 16


def prose(characters: int = 6_000) -> str:
    """English prose that every CPython carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())[:characters]


class PartlyIgnored(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Random tokens whose samples have from none to all of their targets ignored."""

    def __init__(self, size: int = 44, vocabulary: int = 20) -> None:
        generator = torch.Generator().manual_seed(7)
        self.tokens = torch.randint(vocabulary, (size, SEQUENCE + 1), generator=generator)
        self.ignored = torch.randint(SEQUENCE + 1, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        targets = self.tokens[index, 1:].clone()
        targets[: self.ignored[index]] = IGNORE_INDEX
        return self.tokens[index, :-1], targets


class Counting(PartlyIgnored):
    """Notes which samples are asked for."""

    def __init__(self, size: int = 44) -> None:
        super().__init__(size)
        self.asked: list[int] = []

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.asked.append(index)
        return super().__getitem__(index)


class StopAt(Callback):
    """Asks for a stop at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        if trainer.global_step == self.step:
            trainer.request_stop("half-way")


class KilledError(Exception):
    """What `KillAfter` raises."""


class KillAfter(Callback):
    """Ends a run as a crash would: a step's line and validation have been handed on, and nothing more is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, trainer: Trainer) -> None:
        if trainer.global_step == self.step:
            raise KilledError


def make_config(folder: Path | str, dropout: float = 0.0, **training: Any) -> Config:
    """A tiny model on a little prose, logged at every step."""
    defaults: dict[str, Any] = {"batch_size": 8, "learning_rate": 1e-2, "log_every_n_steps": 1, "max_steps": 12}
    return Config(
        output_dir=str(folder),
        model=ModelConfig(d_model=16, num_heads=2, num_kv_heads=1, num_layers=2, dropout=dropout),
        data=DataConfig(sequence_length=SEQUENCE),
        training=TrainingConfig(**{**defaults, **training}),
    )


def make_trainer(config: Config, characters: int = 6_000, tokenizer_spec: str = "char", **arguments: Any) -> Trainer:
    """A Trainer as `fundamentallm.train` makes it, with lines in metrics.jsonl and no bar."""
    text = prose(characters)
    tokenizer = create_tokenizer(tokenizer_spec, text)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.get_vocab_size()))
    train_loader, val_loader = create_dataloaders(text, tokenizer, config)
    torch.manual_seed(config.training.seed)
    arguments.setdefault("callbacks", [LoggingCallback(Path(config.output_dir) / "metrics.jsonl")])
    return Trainer(Transformer(config.model), config, train_loader, val_loader, **arguments)


def sharded_accelerator(replicate: int = 1, precision: str | None = None) -> Accelerator:
    """accelerate's own FSDP2 path on gloo, over all processes, or over those of each of `replicate` groups (HSDP).

    accelerate 1.15 takes FSDP2 for plain data parallelism on a CPU; told otherwise once it is made, it runs it.
    """
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if replicate > 1:
        sizes = {"dp_replicate_size": replicate, "dp_shard_size": accelerator.num_processes // replicate}
        accelerator.state.parallelism_config = ParallelismConfig(**sizes)
        accelerator.state.device_mesh = accelerator.state.parallelism_config.get_device_mesh("cpu")
    return accelerator


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of the model's weights."""
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal to the bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


def lines(folder: Path | str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def timeless(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines without what depends on the clock and the machine."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in metrics]


def on_processes(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function` on `count` real processes in one gloo group, or here where `count` is 1."""
    reset_accelerate()
    if count == 1:
        function(1, *arguments)
    else:
        debug_launcher(function, (count, *arguments), num_processes=count)
