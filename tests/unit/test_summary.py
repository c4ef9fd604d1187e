"""The repr of configs, trainers and checkpoint managers, which a notebook shows."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import fundamentallm
from fundamentallm import CheckpointManager, Config, DataConfig, TrainingConfig
from tests.integration.runs import make_config, make_trainer

configs = st.builds(
    Config,
    data=st.builds(DataConfig, sequence_length=st.integers(1, 999), train_split=st.sampled_from([0.9, 1])),
    training=st.builds(TrainingConfig, max_steps=st.none() | st.integers(1, 9), optimizer=st.sampled_from(["sgd"])),
    callbacks=st.lists(st.sampled_from(["samples", "profiler"]), max_size=2),
)


@given(configs)
def test_config_repr_is_code_that_makes_an_equal_config(config: Config) -> None:
    assert eval(repr(config), {name: getattr(fundamentallm, name) for name in fundamentallm.__all__}) == config


def test_config_repr_leaves_defaults_out() -> None:
    assert repr(Config(training=TrainingConfig(max_steps=3))) == "Config(training=TrainingConfig(max_steps=3))"


def test_trainer_repr_shows_progress_and_settings(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path, optimizer="muon"))
    shown = repr(trainer)
    assert shown.startswith("Trainer at step 0 of 12, epoch 0\n")
    assert "latest     nothing" in shown
    trainer.train()
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    shown = repr(trainer)
    assert shown.startswith("Trainer at step 12 of 12")
    assert f"Transformer, {parameters:,} parameters, precision no" in shown
    assert f"{len(trainer.train_loader.dataset)} samples, 8 in a step; validation" in shown
    assert "Muon, cosine, learning rate 0.001" in shown
    train_loss, val_loss = (trainer.history[name][-1] for name in ("train_loss", "val_loss"))
    assert f"train_loss {train_loss:.4g}, val_loss {val_loss:.4g}" in shown
    assert repr(CheckpointManager(trainer.config.training.checkpoint_dir)).endswith("keep_last_n=3): step_00000012")
