"""Callbacks that look into a training: what they show is what happened, and the training does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fundamentallm import Callback, ConfigError, ProfilerCallback, RatioCallback, SampleCallback, Trainer
from fundamentallm.training.callbacks.update_ratios import block_of
from tests.integration.runs import (
    KillAfter,
    KilledError,
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


def inspected(folder: Path, *callbacks: Callback, **training: Any) -> Trainer:
    """Twelve steps with dropout, validated at every third, saved at every fourth."""
    settings = {"eval_every_n_steps": 3, "save_every_n_steps": 4, "eval_every_n_epochs": None} | training
    config = make_config(folder, dropout=0.1, checkpoint_dir=str(folder / "checkpoints"), **settings)
    trainer = make_trainer(config)
    for callback in callbacks:
        trainer.callbacks.add(callback)
    return trainer


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The run that nobody looks into."""
    trainer = inspected(tmp_path_factory.mktemp("plain"))
    trainer.train()
    return trainer


def test_nobody_notices_being_looked_into(tmp_path: Path, plain: Trainer) -> None:
    looked_into = inspected(tmp_path, SampleCallback(["The "], 4), ProfilerCallback(2), RatioCallback())
    looked_into.train()
    assert_same_weights(weights(looked_into), weights(plain))
    ours = [{key: value for key, value in line.items() if "/" not in key} for line in lines(tmp_path)]
    assert timeless(ours) == timeless(lines(plain.output_dir))


# ---- samples -----------------------------------------------------------------------------------------------


def test_after_a_crash_there_is_each_sample_once(tmp_path: Path) -> None:
    def callback() -> SampleCallback:
        return SampleCallback(["The ", "A"], 8)

    inspected(tmp_path / "whole", callback()).train()
    with pytest.raises(KilledError):  # after the samples of step 6, which the checkpoint of step 4 does not know
        inspected(tmp_path / "parts", callback(), KillAfter(7)).train()
    assert [sample["step"] for sample in samples(tmp_path / "parts")] == [3, 3, 6, 6]
    inspected(tmp_path / "parts", callback()).train()
    assert samples(tmp_path / "parts") == samples(tmp_path / "whole")
    assert [(sample["step"], sample["prompt"]) for sample in samples(tmp_path / "whole")] == [
        (step, prompt) for step in (3, 6, 9, 12) for prompt in ("The ", "A")
    ]


def test_samples_that_cannot_be_made_are_told_before_the_first_step(tmp_path: Path) -> None:
    trainer = inspected(tmp_path, SampleCallback(["\N{SNOWMAN}"]))
    with pytest.raises(ConfigError, match="\N{SNOWMAN}"):
        trainer.train()
    trainer.val_loader = None
    with pytest.raises(ConfigError, match="there is no val_loader"):
        trainer.train()
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("make", "options", "problem"),
    [
        (SampleCallback, {"prompts": "Once"}, "prompts is 'Once'; allowed: a list of text or null"),
        (SampleCallback, {"num_tokens": "ten"}, "num_tokens is 'ten'; allowed: an integer or null"),
        (ProfilerCallback, {"num_steps": 0}, "num_steps is 0; allowed: an integer, at least 1"),
        (ProfilerCallback, {"first_step": "ten"}, "first_step is 'ten'; allowed: an integer, at least 1"),
    ],
)
def test_options_of_another_kind_are_refused(make: Any, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make(**options)


# ---- traces ------------------------------------------------------------------------------------------------


def test_the_chosen_steps_are_traced_and_those_left_when_a_stopped_run_goes_on(tmp_path: Path) -> None:
    inspected(tmp_path, ProfilerCallback(4, 4), StopAt(5)).train()
    inspected(tmp_path, ProfilerCallback(4, 4)).train()
    inspected(tmp_path, ProfilerCallback(4, 4), max_steps=14, resume_changes=["training.max_steps"]).train()
    written = sorted((tmp_path / "traces").glob("*.json"))
    names = ["step_00000004-00000005.rank0.json", "step_00000007-00000007.rank0.json"]
    assert [path.name for path in written] == names
    for path, steps in zip(written, (2, 1), strict=True):
        events = json.loads(path.read_text())["traceEvents"]
        assert sum(str(event.get("name")).startswith("Optimizer.step") for event in events) == steps
        assert "aten::mm" in path.with_suffix(".txt").read_text()


# ---- ratios ------------------------------------------------------------------------------------------------


def _look_into(count: int, folder: Path) -> None:
    settings = {"max_steps": 5, "log_every_n_steps": 2, "optimizer": "muon", "eval_every_n_steps": 3}
    config = make_config(folder, checkpoint_dir=str(folder / "checkpoints"), **settings)
    trainer = make_trainer(config, accelerator=sharded_accelerator() if count > 1 else None)
    for callback in (RatioCallback(), SampleCallback(["The "], 4, temperature=0)):
        trainer.callbacks.add(callback)
    trainer.train()
    assert trainer.accelerator.num_processes == count


def test_ratios_are_those_of_the_weights_before_and_after(tmp_path: Path) -> None:
    plain = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "gradient_clip_norm": 0.1}
    trainer = inspected(tmp_path, RatioCallback(), max_steps=1, learning_rate=0.05, **plain)
    before = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}
    trainer.train()
    line = lines(tmp_path)[0]
    blocks = {block_of(name) for name in before}
    assert blocks == {"model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"}
    after = {name: tensor.detach() for name, tensor in trainer.model.named_parameters()}
    for block in blocks:
        names = [name for name in before if block_of(name) == block]
        old = torch.cat([before[name].flatten() for name in names]).norm()
        moved = torch.cat([(after[name] - before[name]).flatten() for name in names]).norm()
        assert line[f"update_ratio/{block}"] == pytest.approx(float(moved / old), rel=1e-4)
        # Plain gradient descent moves weights by the gradient, clipped, times the learning rate.
        assert line[f"grad_norm/{block}"] == pytest.approx(
            float(moved) / trainer.metrics.metrics["learning_rate"][0], rel=1e-3
        )


def test_ratios_are_measured_at_log_lines_only(tmp_path: Path) -> None:
    looks: list[int] = []

    class Count(RatioCallback):
        def _look(self, trainer: Trainer) -> None:
            super()._look(trainer)
            looks.append(len(self._before))

    inspected(tmp_path, Count(), max_steps=5, log_every_n_steps=2).train()
    assert looks == [0, 5, 0, 5, 5]


def test_a_sharded_model_shows_what_a_whole_one_does(tmp_path: Path) -> None:
    on_processes(1, _look_into, tmp_path / "whole")
    on_processes(2, _look_into, tmp_path / "sharded")
    assert samples(tmp_path / "sharded") == samples(tmp_path / "whole")
    for one, two in zip(lines(tmp_path / "whole"), lines(tmp_path / "sharded"), strict=True):
        assert one.keys() == two.keys()
        for name in (name for name in one if "/" in name):
            assert two[name] == pytest.approx(one[name], rel=1e-3)
