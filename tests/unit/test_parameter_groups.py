"""Parameters that are frozen or trained at a rate or decay of their own, and how such a run goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fundamentallm import ConfigError, ModelConfig, Trainer, TrainingConfig, Transformer
from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.checkpoint.reading import load_checkpoint
from fundamentallm.config.schema import OPTIMIZER_NAMES
from fundamentallm.training.optimizers import freeze, make_optimizer
from tests.integration.runs import StopAt, assert_same_weights, make_config, make_trainer, on_processes, weights

ENTRIES: list[dict[str, Any]] = [
    {"pattern": "*.embed_tokens.*", "frozen": True},
    {"pattern": "*.layers.0.*", "learning_rate_scale": 0.5, "weight_decay": 0.3},
    {"pattern": "*norm.weight", "weight_decay": 0.2},  # those of layer 0 are taken already
]


def model() -> Transformer:
    return Transformer(ModelConfig(vocab_size=11, d_model=16, num_heads=2, num_layers=2))


def expected(name: str, p: nn.Parameter) -> tuple[float, float] | None:
    """(learning rate, decay) of a parameter; None: it is frozen."""
    if "embed_tokens" in name:
        return None
    if ".layers.0." in name:
        return 0.05, 0.3
    return 0.1, (0.2 if name.endswith("norm.weight") else 0.1 if p.ndim == 2 else 0.0)


@pytest.mark.parametrize("kind", OPTIMIZER_NAMES)
def test_each_parameter_has_the_rate_and_decay_of_the_first_entry_that_names_it(kind: str) -> None:
    made = model()
    freeze(made, ENTRIES)
    config = TrainingConfig(optimizer=kind, learning_rate=0.1, weight_decay=0.1, parameter_groups=ENTRIES)
    optimizer = make_optimizer(config, made)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert {name: found.get(id(p)) for name, p in made.named_parameters()} == {
        name: expected(name, p) for name, p in made.named_parameters()
    }
    assert optimizer.param_groups[0]["lr"] == 0.1  # which log lines show
    if kind == "muon":
        assert all(p.ndim == 2 for group in optimizer.param_groups if group["muon"] for p in group["params"])


def test_a_tied_parameter_is_meant_by_each_of_its_names() -> None:
    made = Transformer(ModelConfig(vocab_size=11, d_model=16, num_heads=2, num_layers=1, tie_embeddings=True))
    freeze(made, [{"pattern": "lm_head.weight", "frozen": True}])
    assert not made.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize(
    ("pattern", "fact"),
    [("lm_head.weigth", "'lm_head.weight'"), ("*.bias", "model.embed_tokens.weight"), ("*.layers.0.self_attn.*", "")],
)
def test_freeze_refuses_an_entry_that_matches_nothing_new(pattern: str, fact: str) -> None:
    with pytest.raises(ConfigError) as caught:
        freeze(model(), [*ENTRIES, {"pattern": pattern}])
    (problem,) = caught.value.problems
    assert (problem.setting, problem.value) == ("training.parameter_groups[3].pattern", pattern)
    assert fact in problem.advice


def run(folder: Path, stop_at: int | None = None, **training: Any) -> Trainer:
    settings = {"optimizer": "muon", "parameter_groups": ENTRIES, "weight_decay": 0.1, "warmup_steps": 3, **training}
    trainer = make_trainer(make_config(folder, **settings), callbacks=[StopAt(stop_at)] if stop_at else [])
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return run(tmp_path_factory.mktemp("whole"))


def test_a_run_with_groups_resumes_to_the_bit(whole: Trainer, tmp_path: Path) -> None:
    run(tmp_path, stop_at=5)
    again = run(tmp_path)
    assert_same_weights(weights(again), weights(whole))
    assert [group["lr"] for group in again.optimizer.param_groups] == [
        group["lr"] for group in whole.optimizer.param_groups
    ]


def test_the_schedule_scales_each_group_from_its_own_peak_and_the_frozen_stay(whole: Trainer) -> None:
    fresh = make_trainer(make_config("unused", parameter_groups=ENTRIES))
    frozen, trained = "model.embed_tokens.weight", "lm_head.weight"
    assert torch.equal(whole.model.state_dict()[frozen], fresh.model.state_dict()[frozen])
    assert not torch.equal(whole.model.state_dict()[trained], fresh.model.state_dict()[trained])
    assert {round(group["lr"] / group["initial_lr"], 6) for group in whole.optimizer.param_groups} == {0.1}
    assert whole.metrics.get_history()["learning_rate"][2] == 1e-2  # the peak that the config says


def _on_two(count: int, folder: Path) -> None:
    """DistributedDataParallel would wait for the gradient of what was frozen too late."""
    assert run(folder).accelerator.num_processes == count


def test_on_several_processes_the_run_is_the_same(whole: Trainer, tmp_path: Path) -> None:
    on_processes(2, _on_two, tmp_path)
    saved = load_checkpoint(CheckpointManager(tmp_path / "checkpoints").get_latest() or Path())
    expected = whole.metrics.get_history()["train_loss"]
    assert saved["metrics_state_dict"]["train_loss"].tolist() == pytest.approx(expected, rel=1e-4)
