"""The memory that `fundamentallm estimate` predicts is close to what torch allocates in real runs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from fundamentallm import Config, DataConfig, ModelConfig, Trainer, TrainingConfig, Transformer
from fundamentallm.commands.estimate import count, memory
from tests.integration.runs import on_processes, sharded_accelerator

SMALL = {"vocab_size": 100, "d_model": 64, "num_heads": 4, "num_layers": 4}
BROAD = {"vocab_size": 6000, "d_model": 64, "num_heads": 4, "num_layers": 2}
HEAVY = {"vocab_size": 100, "d_model": 256, "num_heads": 4, "num_layers": 3}


def config_of(model: dict[str, Any], sequence_length: int = 64, **training: Any) -> Config:
    data, settings = DataConfig(sequence_length=sequence_length), {"max_steps": 2, **training}
    return Config(model=ModelConfig(**model), data=data, training=TrainingConfig(**settings)).resolved()


def measured_peak(config: Config, folder: Path) -> int:
    """Largest number of bytes that torch's CPU allocator has given to a run of a few steps at once."""
    model, length = Transformer(config.model), config.data.sequence_length
    tokens = torch.randint(config.model.vocab_size or 0, (64, length))
    loader = DataLoader(TensorDataset(tokens, tokens), batch_size=config.training.batch_size)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    training = dataclasses.replace(config.training, checkpoint_dir=None)  # saving would copy the state
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        Trainer(model, training, loader, callbacks=[]).train()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak + weights  # from before the profile


def cpu_extra(config: Config) -> int:
    """Bytes that torch's CPU kernels keep and its GPU kernels do not: the quotients of the norms, in float32."""
    model, rows = config.model, config.training.micro_batch_size or config.training.batch_size or 0
    keys = (model.num_kv_heads or model.num_heads) * (model.d_model // model.num_heads)
    of_block = 2 * model.d_model + (model.d_model + keys) * model.qk_norm
    blocks = 1 if config.training.activation_checkpointing else model.num_layers
    return 4 * rows * config.data.sequence_length * (blocks * of_block + model.d_model)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (SMALL, {"batch_size": 6, "micro_batch_size": 2}),
        (SMALL, {"batch_size": 4, "mixed_precision": "bf16"}),
        (SMALL, {"batch_size": 16, "activation_checkpointing": True}),
        (SMALL | {"num_kv_heads": 2, "qk_norm": False}, {"batch_size": 4}),
        (BROAD, {"batch_size": 32}),  # in chunks of the vocabulary
        (HEAVY, {"batch_size": 1, "sequence_length": 32}),
    ],
    ids=["micro-batches", "bf16", "recomputed", "grouped", "chunks", "heavy"],
)
def test_memory_is_close_to_what_torch_allocates(
    model: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of(model, **settings)
    estimate = memory(config, count(config)).peak + cpu_extra(config)
    assert estimate == pytest.approx(measured_peak(config, tmp_path), rel=0.15)


def _state_under_fsdp2(_: int) -> None:
    config = config_of(SMALL | {"d_model": 128}, batch_size=4)
    model = Transformer(config.model)
    tokens = torch.randint(100, (64, 64))
    loader = DataLoader(TensorDataset(tokens, tokens), batch_size=4)
    training = dataclasses.replace(config.training, checkpoint_dir=None)
    trainer = Trainer(model, training, loader, callbacks=[], accelerator=sharded_accelerator())
    trainer.train()
    local = [parameter.to_local() for parameter in trainer.model.parameters()]
    moments = [
        value.to_local() if hasattr(value, "to_local") else value
        for state in trainer.optimizer.state.values()
        for value in state.values()
    ]
    estimate = memory(config, count(config), 2, "fsdp2")
    assert sum(tensor.nbytes for tensor in local) == pytest.approx(estimate.weights, rel=0.01)
    assert sum(tensor.nbytes for tensor in moments) == pytest.approx(estimate.optimizer, rel=0.01)


def test_state_under_fsdp2_has_the_estimated_size() -> None:
    on_processes(2, _state_under_fsdp2)
