"""Samples and profiles of real runs: they show what happened and do not change it."""

import json
from pathlib import Path
from typing import Any

import pytest

from fundamentallm import Callback, ConfigError, ProfilerCallback, SampleCallback, Trainer
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


def test_samples_come_once_and_callbacks_do_not_change_the_run(tmp_path: Path) -> None:
    def callback() -> SampleCallback:
        return SampleCallback(["The ", "A"], 8)

    plain, whole = inspected(tmp_path / "plain"), inspected(tmp_path / "whole", callback(), ProfilerCallback(2))
    plain.train()
    whole.train()
    assert_same_weights(weights(whole), weights(plain))
    assert timeless(lines(whole.output_dir)) == timeless(lines(plain.output_dir))
    with pytest.raises(KilledError):  # after the samples of step 6, which the checkpoint of step 4 does not know
        inspected(tmp_path / "parts", callback(), KillAfter(7)).train()
    assert [sample["step"] for sample in samples(tmp_path / "parts")] == [3, 3, 6, 6]
    inspected(tmp_path / "parts", callback()).train()
    assert samples(tmp_path / "parts") == samples(tmp_path / "whole")
    assert [(sample["step"], sample["prompt"]) for sample in samples(tmp_path / "whole")] == [
        (step, prompt) for step in (3, 6, 9, 12) for prompt in ("The ", "A")
    ]


def test_samples_that_cannot_be_made_are_refused_at_the_start(tmp_path: Path) -> None:
    trainer = inspected(tmp_path, SampleCallback(["\N{SNOWMAN}"]))
    with pytest.raises(ConfigError, match="\N{SNOWMAN}"):
        trainer.train()
    trainer.val_loader = None
    with pytest.raises(ConfigError, match="val_loader") as error:
        trainer.train()
    assert error.value.problems[0].setting == "callbacks"
    assert trainer.global_step == 0


# ---- traces ------------------------------------------------------------------------------------------------


def test_profiler_traces_the_chosen_steps_over_a_restart(tmp_path: Path) -> None:
    inspected(tmp_path, ProfilerCallback(4, 4), StopAt(5)).train()
    inspected(tmp_path, ProfilerCallback(4, 4)).train()
    written = sorted((tmp_path / "traces").glob("*.json"))
    names = ["step_00000004-00000005.rank0.json", "step_00000006-00000007.rank0.json"]
    assert [path.name for path in written] == names
    for path in written:
        events = json.loads(path.read_text())["traceEvents"]
        assert sum(str(event.get("name")).startswith("Optimizer.step") for event in events) == 2
        assert "aten::mm" in path.with_suffix(".txt").read_text()


# ---- sharded models ----------------------------------------------------------------------------------------


def _sample(count: int, folder: Path) -> None:
    settings = {"max_steps": 5, "log_every_n_steps": 2, "eval_every_n_steps": 3}
    config = make_config(folder, checkpoint_dir=str(folder / "checkpoints"), **settings)
    trainer = make_trainer(config, accelerator=sharded_accelerator() if count > 1 else None)
    trainer.callbacks.add(SampleCallback(["The "], 4, temperature=0))
    trainer.train()
    assert trainer.accelerator.num_processes == count


def test_samples_of_a_sharded_model_are_those_of_a_whole_one(tmp_path: Path) -> None:
    on_processes(1, _sample, tmp_path / "whole")
    on_processes(2, _sample, tmp_path / "sharded")
    assert samples(tmp_path / "sharded") == samples(tmp_path / "whole")


@pytest.mark.parametrize("name", ["first_step", "num_steps"])
def test_profiler_of_no_step_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ProfilerCallback(**{name: 0})
    assert [problem.setting for problem in caught.value.problems] == [name]
