"""Validation metrics of the user's: each row counted once, in every layout, and good for stopping and for the best."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fundamentallm import ConfigError, ModelConfig, Trainer, TrainingConfig, Transformer
from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.config.schema import IGNORE_INDEX, LARGE_VOCABULARY
from fundamentallm.data.loaders import step_sampler
from tests.integration.runs import PartlyIgnored, make_config, make_trainer, on_processes, sharded_accelerator

HERE = "tests.integration.test_validation_metrics"
SAMPLES = 11
"""Of the validation data: the last batch has fewer than there are processes."""


def accuracy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    counted = targets != IGNORE_INDEX
    return ((logits.argmax(-1) == targets) & counted).sum(), counted.sum()


def rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Something of each row, also of those without any target, over one for each batch that is not empty."""
    return targets.float().sum(), 1 / 1000 * len(targets) if len(targets) else 1


def made(folder: Path, accelerator: Any = None, vocabulary: int = 20, **training: Any) -> Trainer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=vocabulary, d_model=16, num_heads=2, num_layers=1))
    config = TrainingConfig(
        max_steps=3,
        checkpoint_dir=str(folder),
        validation_metrics=[f"{HERE}:accuracy"],
        log_every_n_steps=1,
        **training,
    )
    loaders = [DataLoader(PartlyIgnored(size), batch_size=5) for size in (20, SAMPLES)]
    return Trainer(model, config, *loaders, callbacks=[], validation_metrics={"rows": rows}, accelerator=accelerator)


def expected(trainer: Trainer) -> dict[str, float]:
    """From all rows at once, without any of the trainer's code."""
    samples = [PartlyIgnored(SAMPLES)[i] for i in range(SAMPLES)]
    inputs, targets = torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])
    with torch.no_grad():
        total, count = accuracy(trainer.model(inputs), targets)
    return {"val_accuracy": float(total / count), "val_rows": float(targets.float().sum() / (SAMPLES / 1000))}


@pytest.mark.parametrize(("micro", "vocabulary"), [(None, 20), (2, LARGE_VOCABULARY)])
def test_they_are_logged_beside_the_loss(tmp_path: Path, micro: int | None, vocabulary: int) -> None:
    trainer = made(tmp_path, vocabulary=vocabulary, micro_batch_size=micro)
    trainer.train()
    found = trainer.validate()
    assert found == {name: trainer.metrics.get_latest(name) for name in found}
    for name, value in expected(trainer).items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert list(found) == ["val_loss", "val_perplexity", "val_rows", "val_accuracy"]


def test_rows_that_only_fill_a_micro_batch_up_do_not_count(tmp_path: Path) -> None:
    """As where the model is compiled for one shape: 5, 5 and 1 rows in micro-batches of 3."""
    trainer = made(tmp_path)
    assert isinstance(trainer.val_loader, DataLoader)
    samples = trainer.val_samples[""] = step_sampler("val_loader", trainer.val_loader, 0, micro_batch_size=3, pad=True)
    assert [len(samples.rank_batch(step).indices) for step in range(3)] == [6, 6, 3]
    found = trainer.validate()
    assert {name: found[name] for name in ("val_accuracy", "val_rows")} == pytest.approx(expected(trainer), rel=1e-5)


def _on_several(count: int, folder: Path, wanted: dict[str, float]) -> None:
    for name, accelerator in (("ddp", None), ("fsdp2", sharded_accelerator)):
        trainer = made(folder / name, accelerator and accelerator(), micro_batch_size=1)
        trainer.train()
        assert trainer.accelerator.num_processes == count
        found = trainer.validate()
        assert {key: pytest.approx(value, rel=1e-5) for key, value in wanted.items()} == {
            key: found[key] for key in wanted
        }


def test_each_row_is_counted_once_on_several_processes(tmp_path: Path) -> None:
    trainer = made(tmp_path / "one")
    trainer.train()
    on_processes(3, _on_several, tmp_path, expected(trainer))


def test_one_of_them_decides_about_the_best_and_about_stopping(tmp_path: Path) -> None:
    watched = {"early_stopping_metric": "val_accuracy", "early_stopping_mode": "max", "early_stopping_patience": 1}
    config = make_config(tmp_path, **watched, validation_metrics=[f"{HERE}:accuracy"], eval_every_n_steps=1)
    trainer = make_trainer(config, callbacks=None)
    trainer.train()
    history = trainer.metrics.get_history()["val_accuracy"]
    stopped = next((i for i in range(1, len(history)) if history[i] <= max(history[:i])), len(history) - 1)
    assert len(history) == stopped + 1 < 12
    best = CheckpointManager(trainer.config.training.checkpoint_dir or "").get_best()
    assert best is not None
    assert best.name == f"step_{history.index(max(history)) + 1:08d}"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"validation_metrics": {"loss": rows}}, "there is a val_loss already"),
        ({"validation_metrics": {"accuracy": rows}}, "there is a val_accuracy already"),
        ({"validation_metrics": {"three": 3}}, "a int"),
        ({}, "early_stopping_metric is 'val_acuracy'; allowed: .*val_accuracy. Did you mean 'val_accuracy'?"),
    ],
)
def test_names_that_are_taken_or_unknown_are_refused(tmp_path: Path, arguments: Any, problem: str) -> None:
    config = make_config(
        tmp_path,
        validation_metrics=[f"{HERE}:accuracy"],
        early_stopping_metric="val_loss" if arguments else "val_acuracy",
    )
    with pytest.raises(ConfigError, match=problem):
        make_trainer(config, **arguments)


@pytest.mark.parametrize("wrong", [lambda x, y: x.sum(), lambda x, y: (x.sum(), y), lambda x, y: (1, 2, 3)])
def test_what_is_no_sum_and_count_is_refused(tmp_path: Path, wrong: Any) -> None:
    trainer = make_trainer(make_config(tmp_path), validation_metrics={"mine": wrong})
    with pytest.raises(ConfigError, match="val_mine"):
        trainer.validate()
