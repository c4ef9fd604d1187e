"""Stopped anywhere and resumed by the same command, a run ends as the uninterrupted one, to the bit."""

import contextlib
import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from fundamentallm import (
    Callback,
    CheckpointError,
    ConfigError,
    LoggingCallback,
    SaveBestCallback,
    Trainer,
    TrainingConfig,
)
from fundamentallm.config.files import file_problems
from fundamentallm.run.session import Stop
from tests.integration.runs import (
    KillAfter,
    KilledError,
    PartlyIgnored,
    StopAt,
    assert_same_weights,
    lines,
    make_config,
    make_trainer,
    on_processes,
    timeless,
    weights,
)
from tests.integration.test_training_loop import Bigram

# 6,000 characters, 90 % of them for training, in windows of 16 and batches of 64 make 6 steps an epoch.
SETTINGS: dict[str, Any] = {
    "dropout": 0.2, "batch_size": 64, "max_steps": 14, "max_epochs": None, "log_every_n_steps": 4,
    "eval_every_n_steps": 3, "warmup_steps": 3, "save_every_n_epochs": None,
}  # fmt: skip


class StopAtLog(Callback):
    """Asks for a stop at a log line, where all processes agree on it at once."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if trainer.global_step == self.step:
            trainer.request_stop("test")


def run(processes: int, folder: str, settings: dict[str, Any], stop_at: int | None = None) -> None:
    """Launches a run once; the step at which it ended is in a file beside it."""
    callbacks: list[Callback] = [LoggingCallback(Path(folder) / "metrics.jsonl"), SaveBestCallback()]
    if stop_at is not None:
        callbacks.append(StopAt(stop_at) if processes == 1 else StopAtLog(stop_at))
    trainer = make_trainer(make_config(folder, **{**SETTINGS, **settings}), callbacks=callbacks)
    assert trainer.accelerator.num_processes == processes
    assert trainer.steps_per_epoch == 6
    trainer.train()
    if trainer.is_main_process:
        (Path(folder) / "ended_at").write_text(str(trainer.global_step))


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "step_00000014" / "model.safetensors")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("processes", "settings", "stops"),
    [
        (1, {"optimizer": "adamw"}, (1, 6, 13)),
        (2, {"optimizer": "muon", "micro_batch_size": 20}, (4, 8)),
    ],
)
def test_resume_after_each_stop_ends_as_the_whole_run(
    tmp_path: Path, processes: int, settings: dict[str, Any], stops: tuple[int, ...]
) -> None:
    on_processes(processes, run, str(tmp_path / "whole"), settings)
    for stop_at in (*stops, None):
        on_processes(processes, run, str(tmp_path / "parts"), settings, stop_at)
        assert (tmp_path / "parts" / "ended_at").read_text() == str(stop_at or 14)
    assert_same_weights(final_weights(tmp_path / "parts"), final_weights(tmp_path / "whole"))
    assert timeless(lines(tmp_path / "parts")) == timeless(lines(tmp_path / "whole"))


def test_checkpoints_do_not_grow_and_the_history_is_resumed(tmp_path: Path) -> None:
    settings = {"eval_every_n_steps": 3, "save_every_n_steps": 3, "max_steps": 12, "keep_last_n": 9}
    whole = make_trainer(make_config(tmp_path / "whole", **settings))
    whole.train()
    parts = make_trainer(make_config(tmp_path / "parts", **settings))
    parts.callbacks.add(StopAt(7))
    parts.train()
    parts = make_trainer(make_config(tmp_path / "parts", **settings))
    parts.train()
    histories = [trainer.metrics.get_history() for trainer in (whole, parts)]
    assert [len(history.pop("tokens_per_second")) for history in histories] == [12, 12]
    assert histories[0] == histories[1]
    files = (tmp_path / "whole" / "checkpoints").glob("*/training.safetensors")
    assert len({file.stat().st_size for file in files}) == 1


@pytest.mark.parametrize("where", ["forward", "update", "validation"])
def test_train_again_after_an_exception_repeats_no_step(tmp_path: Path, where: str) -> None:
    """The same Trainer continues, as in a notebook."""
    config = make_config(tmp_path / "parts", dropout=0.2, save_every_n_steps=4, eval_every_n_steps=3)
    whole = make_trainer(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    whole.train()

    trainer = make_trainer(config)
    calls = iter(range(1, 100))

    def fail_once(*_: Any) -> None:
        is_now = trainer.global_step == (6 if where == "validation" else 5)
        if is_now and (where != "validation" or not trainer.model.training) and next(calls) == 1:
            raise KeyboardInterrupt

    if where in ("forward", "validation"):
        trainer.model.register_forward_pre_hook(fail_once)
    else:
        trainer.optimizer.register_step_post_hook(fail_once)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    if where == "update":
        for action in (trainer.train, trainer.save_checkpoint):
            with pytest.raises(CheckpointError, match="optimizer changed the weights"):
                action()
        assert trainer.checkpoint_manager is not None
        trainer.checkpoint_manager.wait()  # an interrupted train() does not
        newest = trainer.checkpoint_manager.get_latest()
        assert newest is not None
        trainer.load_checkpoint(newest)
        assert trainer.global_step == 4
    trainer.train()
    assert_same_weights(weights(trainer), weights(whole))
    for name in ("step", "train_loss", "val_loss"):
        torch.testing.assert_close(trainer.history[name], whole.history[name], rtol=0, atol=0, equal_nan=True)


def test_crash_after_a_repeated_validation_repeats_no_line(tmp_path: Path) -> None:
    """The newest checkpoint is still that of the interrupted validation when its lines have been written."""

    class StopInValidation(Callback):
        def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            if trainer.global_step == 3:
                trainer.stop_switch.request(Stop.SIGNAL, "test")

    class Crash(Callback):
        def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            raise RuntimeError("crash")

    config = make_config(tmp_path / "parts", max_steps=6, eval_every_n_steps=3)
    for callback in (StopInValidation(), Crash(), Crash()):
        trainer = make_trainer(config)
        trainer.callbacks.add(callback)
        with contextlib.suppress(RuntimeError):
            trainer.train()
        assert (trainer.global_step, trainer.validation_due) == (
            3,
            isinstance(callback, StopInValidation),
        )
    make_trainer(config).train()
    make_trainer(dataclasses.replace(config, output_dir=str(tmp_path / "whole"))).train()
    assert timeless(lines(tmp_path / "parts")) == timeless(lines(tmp_path / "whole"))


def test_train_of_a_finished_run_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(tmp_path)
    history = make_trainer(config).train()
    before = contents(tmp_path)
    capsys.readouterr()
    again = make_trainer(config)
    assert repr(dict(again.train())) == repr(dict(history))
    assert "finished, at step 12 of 12" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_resume_past_a_damaged_checkpoint_deletes_none(tmp_path: Path) -> None:
    make_trainer(make_config(tmp_path, save_every_n_steps=4)).train()
    (tmp_path / "checkpoints" / "step_00000012" / "training.safetensors").unlink()
    again = make_trainer(make_config(tmp_path, save_every_n_steps=4, keep_last_n=1))
    again.callbacks.add(KillAfter(8))
    with pytest.raises(KilledError):
        again.train()
    assert _steps(tmp_path) == [4, 8, 12]


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))


def test_resume_never_refuses_a_folder_in_use(tmp_path: Path) -> None:
    make_trainer(make_config(tmp_path)).train()
    before = contents(tmp_path)
    with pytest.raises(ConfigError) as error:
        make_trainer(make_config(tmp_path, resume="never")).train()
    assert (error.value.problems[0].setting, error.value.problems[0].value) == ("training.resume", "never")
    assert contents(tmp_path) == before


def test_resume_with_changed_settings_lists_them_all(tmp_path: Path) -> None:
    make_trainer(make_config(tmp_path, max_steps=4)).train()
    with pytest.raises(ConfigError) as error:
        make_trainer(make_config(tmp_path, max_steps=8, batch_size=9)).train()
    found = {problem.setting: (problem.value, problem.allowed) for problem in error.value.problems}
    assert found == {"training.max_steps": (8, "4"), "training.batch_size": (9, "8")}
    assert all(setting in error.value.problems[0].advice for setting in found)


def test_resume_with_another_model_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, max_steps=4)
    make_trainer(config).train()
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, d_ff=99))
    allowed = dataclasses.replace(wider, training=dataclasses.replace(wider.training, resume_changes=["model"]))
    for other in (wider, allowed):  # the weights have another shape, which no setting can allow
        with pytest.raises(ConfigError) as error:
            make_trainer(other).train()
        assert [(problem.setting, problem.value) for problem in error.value.problems] == [("model.d_ff", 99)]


def test_resume_needs_the_first_checkpoint_only_once(tmp_path: Path) -> None:
    make_trainer(make_config(tmp_path / "old")).train()
    origin = tmp_path / "old" / "checkpoints" / "step_00000012"
    options = {"resume": str(origin), "max_steps": 16, "resume_changes": ["training.max_steps"]}
    make_trainer(make_config(tmp_path / "new", **options), callbacks=[StopAt(14)]).train()
    shutil.rmtree(origin)
    again, other = (make_config(tmp_path / name, **options) for name in ("new", "other"))
    assert file_problems(again) == []
    trainer = make_trainer(again)
    trainer.train()
    assert trainer.global_step == 16
    assert [(problem.setting, problem.value) for problem in file_problems(other)] == [("training.resume", str(origin))]
    with pytest.raises(CheckpointError, match="there is no checkpoint directory here"):
        make_trainer(other).train()


def test_checkpoint_holds_everything_by_name_and_no_pickle(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path, max_steps=4))
    trainer.train()
    folder = tmp_path / "checkpoints" / "step_00000004"
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors", "training.safetensors", "state.json", "manifest.json", "config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert load_file(folder / "model.safetensors").keys() == dict(trainer.model.named_parameters()).keys()
    moments = {key for key in load_file(folder / "training.safetensors") if key.endswith("/exp_avg")}
    names = {f"optimizer_state_dict/state/{name}/exp_avg" for name, _ in trainer.model.named_parameters()}
    assert moments == names


def test_save_checkpoint_without_a_folder_is_refused() -> None:
    trainer = Trainer(Bigram(), TrainingConfig(), DataLoader(PartlyIgnored(), batch_size=8), callbacks=[])
    with pytest.raises(ConfigError, match="checkpoint_dir"):
        trainer.save_checkpoint("x")


def test_resume_repeats_draws_in_forward(tmp_path: Path) -> None:
    class LayerDrop(Bigram):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * random.random() * float(np.random.rand())

    ends = []
    for stops in ((), (3, None)):
        for stop in stops or (None,):
            torch.manual_seed(0)
            config = TrainingConfig(max_steps=6, checkpoint_dir=str(tmp_path / str(bool(stops))))
            callbacks = [StopAt(stop)] if stop else []
            trainer = Trainer(LayerDrop(), config, DataLoader(PartlyIgnored(), batch_size=8), callbacks=callbacks)
            trainer.train()
        ends.append(weights(trainer))
    assert_same_weights(*ends)
