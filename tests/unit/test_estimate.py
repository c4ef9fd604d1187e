"""`fundamentallm estimate` counts what the real model has, computes, keeps and saves."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fundamentallm import Config, DataConfig, ModelConfig, TrainingConfig, Transformer
from fundamentallm.__main__ import main
from fundamentallm.commands.estimate import WIDE, count, memory, tokens_of_run
from fundamentallm.data.corpus import load_corpus, vocabulary_size
from fundamentallm.models.with_loss import ModelWithLoss
from fundamentallm.training.loss import create_loss
from fundamentallm.training.optimizers import make_optimizer
from tests.integration.runs import make_config, make_trainer

ROOT = Path(__file__).parents[2]
SHAPE = {"vocab_size": 100, "d_model": 64, "num_heads": 4, "num_layers": 2}
GROUPED = {"num_kv_heads": 2, "qk_norm": False, "tie_embeddings": True}


def config_of(model: dict[str, Any], sequence_length: int = 64, **training: Any) -> Config:
    data = DataConfig(sequence_length=sequence_length)
    return Config(model=ModelConfig(**model), data=data, training=TrainingConfig(**training)).resolved()


@pytest.mark.parametrize("options", [{}, GROUPED])
def test_counts_equal_the_model(options: dict[str, Any]) -> None:
    config = config_of(SHAPE | options, parameter_groups=[{"pattern": "model.embed_tokens.*", "frozen": True}])
    by_name = {name: parameter.numel() for name, parameter in Transformer(config.model).named_parameters()}
    counts = count(config)
    assert counts.parameters == sum(by_name.values())
    assert counts.trained == counts.parameters - by_name["model.embed_tokens.weight"]
    assert counts.block == sum(n for name, n in by_name.items() if name.startswith("model.layers.0."))


def test_tokens_of_run_follow_the_batch_size_schedule() -> None:
    config = config_of(SHAPE, 24, batch_size=4, batch_size_schedule=[[5, 7], [9, 2]])
    assert [tokens_of_run(config, steps) for steps in (5, 6, 10)] == [20 * 24, 27 * 24, 50 * 24]


def test_packed_memory_has_the_mask_once() -> None:
    pairs = DataConfig(prompt_field="q", end_of_text="#", sequence_length=64)
    configs = [
        Config(
            "runs",
            ModelConfig(vocab_size=50, d_model=16, num_heads=2, num_layers=2),
            each,
            TrainingConfig(batch_size=4),
        )
        for each in (pairs, dataclasses.replace(pairs, packing=True))
    ]
    one, other = (memory(config, count(config)) for config in configs)
    assert other.activations - one.activations == 4 * 64 * 64 * WIDE


def test_memory_is_that_of_the_busiest_device() -> None:
    configs = [config_of(SHAPE, batch_size=size) for size in (3, 4)]
    three, four = (memory(config, count(config), devices=2).activations for config in configs)
    assert three == four


@pytest.mark.parametrize("options", [{}, GROUPED])
def test_flops_equal_the_count_of_torch(options: dict[str, Any]) -> None:
    config = config_of(SHAPE | options, 24, batch_size=3)
    inputs = torch.zeros(3, 24, dtype=torch.int64)
    # With attention as matrix products, since torch does not count its CPU kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        ModelWithLoss(Transformer(config.model), create_loss())((inputs, inputs)).backward()
    assert count(config).flops_per_token * inputs.numel() == counter.get_total_flops()


OPTIMIZERS: list[dict[str, Any]] = [
    *({"optimizer": name} for name in ("adamw", "adam", "sgd", "muon")),
    {"optimizer": "sgd", "momentum": 0.0},
    {"optimizer": "torch.optim:NAdam"},
]


@pytest.mark.parametrize("training", OPTIMIZERS, ids=str)
def test_optimizer_bytes_equal_the_state(training: dict[str, Any]) -> None:
    config = config_of(SHAPE | GROUPED, **training)
    model = Transformer(config.model)
    optimizer = make_optimizer(config.training, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
    estimated = count(config).optimizer_bytes
    assert held == estimated or (":" in config.training.optimizer and held == pytest.approx(estimated, rel=0.01))


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_checkpoint_bytes_equal_the_files(tmp_path: Path, ema_decay: float | None) -> None:
    config = make_config(tmp_path / "run", max_steps=1, checkpoint_dir=str(tmp_path / "saved"), ema_decay=ema_decay)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, d_model=128)).resolved()
    trainer = make_trainer(config)
    trainer.train()
    (saved,) = (tmp_path / "saved").glob("step_*")
    size = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    counts = count(dataclasses.replace(config, model=trainer.model.config))
    assert WIDE * counts.parameters + counts.optimizer_bytes == pytest.approx(size, rel=0.02)


# ---- the command ---------------------------------------------------------------------------------------------

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def estimate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["fundamentallm", "estimate", *arguments])
        code = main()
        return code, *capsys.readouterr()

    return run


def rows_of(text: str) -> list[tuple[str, str]]:
    """Returns the number of devices and the layout of each row."""
    return re.findall(r"^ *([\d,]+)  (ddp|fsdp2) ", text, re.MULTILINE)


def test_estimate_quickstart_writes_nothing(estimate: Command, tmp_path: Path) -> None:
    code, out, err = estimate("--config", "quickstart")
    assert (code, err) == (0, "")
    vocabulary = load_corpus(DataConfig()).tokenizer.get_vocab_size()
    counts = count(config_of({"vocab_size": vocabulary, "d_model": 128, "num_heads": 4, "num_layers": 4}))
    assert f"{counts.parameters:,}, of which" in out
    assert rows_of(out) == [("1", "ddp"), ("8", "ddp"), ("8", "fsdp2")]
    assert list(tmp_path.iterdir()) == []


def test_estimate_names_its_assumptions(estimate: Command) -> None:
    settings = ["--training.micro_batch_size=auto", "--training.batch_size_schedule=[[2, 64]]", "--model.vocab_size=99"]
    _, out, _ = estimate(*settings, "--training.optimizer=torch.optim:NAdam")
    assert all(f"\n{name} " in out for name in ("micro-batches", "batches", "optimizer"))


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:300", "tokenizer.json"])
def test_vocabulary_size_equals_the_tokenizer(
    tokenizer: str, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(text)
    if tokenizer == "tokenizer.json":
        made = load_corpus(DataConfig(source="text.txt", tokenizer="bpe:280")).tokenizer
        made.save(tokenizer)
    config = DataConfig(source="text.txt", tokenizer=tokenizer)
    assert vocabulary_size(config) == load_corpus(config).tokenizer.get_vocab_size()


def test_estimate_needs_the_text_for_char_vocabularies_only(estimate: Command) -> None:
    missing = ("--data.source", "elsewhere.txt")
    code, _, err = estimate(*missing)
    assert code == 2
    assert "data.source" in err
    assert "'elsewhere.txt'" in err
    assert estimate(*missing, "--model.vocab_size", "9")[0] == 0
    assert estimate(*missing, "--data.tokenizer", "bpe:5000")[0] == 0


def test_estimate_reports_every_mistake_at_once(estimate: Command) -> None:
    code, _, err = estimate("--devices", "0", "--gpu", "H900", "--training.batch_size", "0")
    assert code == 2
    assert all(f"{name} is " in err for name in ("--devices", "--gpu", "training.batch_size"))


def test_estimate_refuses_devices_without_a_sequence(estimate: Command) -> None:
    assert estimate("--devices", "4", "--training.batch_size", "4")[0] == 0
    assert estimate("--devices", "5", "--training.batch_size", "4")[0] == 2
