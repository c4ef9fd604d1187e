"""The repr of configs and checkpoint managers, which a notebook shows."""

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


def test_checkpoint_manager_repr_names_the_newest(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path, max_steps=1))
    trainer.train()
    assert repr(CheckpointManager(trainer.config.training.checkpoint_dir)).endswith("keep_last_n=3): step_00000001")
