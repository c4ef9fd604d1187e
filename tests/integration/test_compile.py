"""Compiled runs are the uncompiled ones, in every layout, and resume to the bit."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from accelerate import Accelerator
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from fundamentallm import ModelConfig, Trainer, Transformer, create_loss
from fundamentallm.distributed.prepare import compile_in_place, prepare_model
from fundamentallm.errors import ConfigError
from fundamentallm.models.with_loss import ModelWithLoss
from fundamentallm.training.callbacks.observing import continuation
from fundamentallm.training.optimizers import create_optimizer
from tests.conftest import reset_accelerate
from tests.integration.runs import (
    PartlyIgnored,
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
    fast = {"compile_threads": 1, "cpp.simdlen": 1}
    with torch._inductor.config.patch(fast):
        yield
    torch._dynamo.reset()


def accelerator_for(backend: str, is_sharded: bool) -> Accelerator:
    """As `dynamo_backend` in the accelerate config makes it."""
    accelerator = sharded_accelerator() if is_sharded else Accelerator(cpu=True)
    accelerator.state.dynamo_plugin = type(accelerator.state.dynamo_plugin)(backend=backend)
    return accelerator


def run(_: int, folder: str, backend: str, is_sharded: bool, training: dict[str, Any]) -> None:
    counters.clear()
    trainer = make_trainer(
        make_config(folder, **training), CHARACTERS, accelerator=accelerator_for(backend, is_sharded)
    )
    trainer.train()
    assert trainer.config.training.compile is (backend != "no")
    assert {name.split(".")[0] for name in trainer.model.state_dict()} == {"model", "lm_head"}
    assert type(trainer.accelerator.unwrap_model(trainer.model_with_loss)) is ModelWithLoss  # by nobody else
    if backend != "no":
        # One for the steps and one for validation: not for other sizes, not for each of the blocks.
        assert counters["stats"]["unique_graphs"] == 2
        before = sum(counters["stats"].values())
        continuation(trainer, None, 3)
        assert sum(counters["stats"].values()) == before


def test_a_compiled_run_is_the_plain_one_whole_and_sharded(tmp_path: Path) -> None:
    on_processes(1, run, str(tmp_path / "plain"), "no", False, UNEVEN)
    for is_sharded in (False, True):
        folder = str(tmp_path / f"sharded is {is_sharded}")
        on_processes(2, run, folder, "eager", is_sharded, UNEVEN | {"activation_checkpointing": True})
        assert len(lines(folder)) == 9
        for expected, got in zip(timeless(lines(tmp_path / "plain")), timeless(lines(folder)), strict=True):
            assert got == pytest.approx(expected, rel=1e-5)


class Small(torch.nn.Sequential):
    """As few kernels as possible."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Embedding(20, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 20))


def test_a_stopped_compiled_run_goes_on_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By inductor, which draws dropout masks of its own."""

    def trainer_in(folder: Path, **training: Any) -> Trainer:
        reset_accelerate()
        torch.manual_seed(0)
        settings = UNEVEN | {"compile": True, "save_every_n_steps": 3} | training
        config = make_config(folder, **settings).resolved()
        return Trainer(Small(), config, DataLoader(PartlyIgnored(38), 22), callbacks=[])

    whole = trainer_in(tmp_path / "whole")
    history = whole.train()
    assert not any("_orig_mod" in name for name in weights(whole))
    shutil.copytree(tmp_path / "whole/checkpoints/step_00000003", tmp_path / "broken/checkpoints/step_00000003")
    torch._dynamo.reset()  # what a process that begins has not got either
    broken = trainer_in(tmp_path / "broken")
    assert broken.train()["train_loss"] == history["train_loss"]
    assert_same_weights(weights(whole), weights(broken))
    plain = trainer_in(tmp_path / "broken", compile=False, max_steps=7, resume_changes=["training.max_steps"])
    plain.train()
    assert "training.compile True -> False" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("loss", "vocabulary", "recomputes"),
    [
        *(("cross_entropy", 20, False), ("cross_entropy", 1500, True), ("label_smoothing", 1500, False)),
        *(("focal", 20, True), ("z_loss", 1500, False)),
    ],
)
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


def without_blocks(_: int) -> None:
    model = torch.nn.Linear(2, 2)
    with_loss, optimizer = ModelWithLoss(model, torch.nn.Identity()), create_optimizer(model, "adamw", 0.1)
    with pytest.raises(ConfigError, match="_no_split_modules"):
        prepare_model(accelerator_for("eager", True), with_loss, optimizer, compiles=True)


def test_a_sharded_model_has_to_say_what_its_blocks_are() -> None:
    on_processes(2, without_blocks)
