"""Compiled runs are the uncompiled ones, in every layout, and resume to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from accelerate import Accelerator
from torch._dynamo.utils import counters

from fundamentallm import LoggingCallback, ModelConfig, Trainer, Transformer, create_loss
from fundamentallm.distributed.prepare import compile_in_place, prepare_model
from fundamentallm.errors import ConfigError
from fundamentallm.inference.generation import generate
from fundamentallm.models.with_loss import ModelWithLoss
from fundamentallm.training.optimizers import create_optimizer
from tests.conftest import reset_accelerate
from tests.integration.runs import (
    StopAt,
    assert_same_weights,
    lines,
    make_config,
    make_trainer,
    on_processes,
    sharded_accelerator,
    timeless,
    weights,
)

UNEVEN: dict[str, Any] = {"batch_size": 22, "micro_batch_size": 4, "max_steps": 6, "eval_every_n_steps": 3}
"""Micro-batches of 4 and of 3 rows, were they not filled up, and an epoch's last batch of 16 at step 4."""
CHARACTERS = 1_500


@pytest.fixture(autouse=True)
def _own_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled kernels in a folder that goes, by this process alone; nothing of what others have compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    # Not for vectors: which of them the processor has is found out by compiling, a fifth of the time.
    with torch._inductor.config.patch({"compile_threads": 1, "cpp.simdlen": 1}):
        yield
    torch._dynamo.reset()


def accelerator_for(backend: str, is_sharded: bool) -> Accelerator:
    """As `dynamo_backend` in the accelerate config makes it."""
    accelerator = sharded_accelerator() if is_sharded else Accelerator(cpu=True)
    accelerator.state.dynamo_plugin = type(accelerator.state.dynamo_plugin)(backend=backend)
    return accelerator


def run(_: int, folder: str, backend: str, is_sharded: bool, training: dict[str, Any], dropout: float = 0.0) -> None:
    counters.clear()
    trainer = make_trainer(
        make_config(folder, dropout, **training), CHARACTERS, accelerator=accelerator_for(backend, is_sharded)
    )
    trainer.train()
    assert trainer.config.training.compile is (backend != "no")
    assert type(trainer.accelerator.unwrap_model(trainer.model_with_loss)) is ModelWithLoss  # by nobody else
    if backend != "no":
        # One for the steps and one for validation: not for other sizes, not for each of the blocks.
        assert counters["stats"]["unique_graphs"] == 2
        before = sum(counters["stats"].values())
        list(generate(trainer.model, [1, 2], 3, 16))
        assert sum(counters["stats"].values()) == before


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("plain")
    on_processes(1, run, str(folder), "no", False, UNEVEN)
    return lines(folder)


@pytest.mark.parametrize(
    ("processes", "is_sharded", "training"),
    [
        (1, False, {}),
        (2, False, {"activation_checkpointing": True}),
        (2, True, {"activation_checkpointing": True}),
    ],
)
def test_a_compiled_run_is_the_plain_one_in_every_layout(
    tmp_path: Path, plain: list[dict[str, Any]], processes: int, is_sharded: bool, training: dict[str, Any]
) -> None:
    on_processes(processes, run, str(tmp_path / "compiled"), "aot_eager", is_sharded, UNEVEN | training)
    compiled = lines(tmp_path / "compiled")
    assert len(compiled) == len(plain) == 9
    for expected, got in zip(timeless(plain), timeless(compiled), strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_stopped_compiled_run_goes_on_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By inductor, which draws dropout masks of its own; in bf16."""

    def trainer_in(folder: Path, *callbacks: Any, **training: Any) -> Trainer:
        reset_accelerate()
        settings = {
            "compile": True,
            "mixed_precision": "bf16",
            "eval_every_n_epochs": None,
            **UNEVEN,
            "eval_every_n_steps": None,
            **training,
        }
        config = make_config(folder, dropout=0.1, **settings)
        config = dataclasses.replace(
            config,
            model=ModelConfig(d_model=8, num_heads=1, num_layers=1, dropout=0.1, qk_norm=False),
            data=dataclasses.replace(config.data, train_split=1.0),
        )
        return make_trainer(config, CHARACTERS, callbacks=[LoggingCallback(folder / "metrics.jsonl"), *callbacks])

    whole = trainer_in(tmp_path / "whole")
    whole.train()
    said = capsys.readouterr().out
    assert said.count("the first step took ") == 1
    assert said.index("the first step took ") < said.index("step 1/")
    assert not any("_orig_mod" in name for name in weights(whole))
    trainer_in(tmp_path / "broken", StopAt(3)).train()
    torch._dynamo.reset()  # what a process that begins has not got either
    broken = trainer_in(tmp_path / "broken")
    broken.train()
    assert_same_weights(weights(whole), weights(broken))
    assert timeless(lines(tmp_path / "whole")) == timeless(lines(tmp_path / "broken"))
    plain = trainer_in(tmp_path / "broken", compile=False, max_steps=7, resume_changes=["training.max_steps"])
    plain.train()
    assert "training.compile True -> False" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["cross_entropy", "label_smoothing", "focal", "z_loss"])
@pytest.mark.parametrize(("vocabulary", "recomputes"), [(20, False), (1500, True)])
def test_nothing_breaks_the_graph_of_model_and_loss(loss: str, vocabulary: int, recomputes: bool) -> None:
    model = Transformer(ModelConfig(vocab_size=vocabulary, d_model=8, num_heads=2, num_kv_heads=1, num_layers=1))
    if recomputes:
        model.gradient_checkpointing_enable()
    whole = ModelWithLoss(model, create_loss(loss))
    ids = torch.randint(vocabulary, (40, 16))  # more than a chunk
    expected = whole((ids, ids))
    whole.compile(backend="eager", fullgraph=True)
    assert whole((ids, ids)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_compile_in_place_compiles_each_shape_and_sets_no_global_limit() -> None:
    # By torch's defaults, all shapes from the second on would share a graph, and the ninth function would have none.
    limits = torch.compiler.config.recompile_limit, torch.compiler.config.fail_on_recompile_limit_hit

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    layer = Layer()
    compile_in_place(accelerator_for("eager", False), [layer])
    counters.clear()
    for rows in range(2, 14):
        layer(torch.ones(rows, 3))
    assert counters["stats"]["unique_graphs"] == 12
    assert limits == (torch.compiler.config.recompile_limit, torch.compiler.config.fail_on_recompile_limit_hit)


def test_contradicting_settings_are_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, compile=False)
    with pytest.raises(ConfigError) as caught:
        make_trainer(config, accelerator=accelerator_for("aot_eager", False))
    (problem,) = caught.value.problems
    assert (problem.setting, problem.value) == ("training.compile", False)
    assert "'aot_eager'" in problem.reason


def without_blocks(_: int) -> None:
    model = torch.nn.Linear(2, 2)
    with_loss, optimizer = ModelWithLoss(model, torch.nn.Identity()), create_optimizer(model, "adamw", 0.1)
    with pytest.raises(ConfigError, match="_no_split_modules"):
        prepare_model(accelerator_for("eager", True), with_loss, optimizer, compiles=True)


def test_a_sharded_model_has_to_say_what_its_blocks_are() -> None:
    on_processes(2, without_blocks)
