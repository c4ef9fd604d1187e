"""Damaged checkpoints, full disks, unusable folders and killed processes: reported, and nothing is lost."""

import json
import math
import resource
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fundamentallm import Callback, CheckpointError, DataConfig, Trainer, train
from fundamentallm.checkpoint import manager as checkpoint_module
from fundamentallm.errors import RunInProgressError
from fundamentallm.run.folder import locked
from tests.integration.runs import assert_same_weights, lines, make_config, make_trainer, prose, timeless, weights
from tests.unit.checkpoint_files import flip_middle_bit, rewrite

RUN: dict[str, Any] = {"dropout": 0.2, "save_every_n_steps": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed: checkpoints of steps 4, 8 and 12, the last."""
    folder = tmp_path_factory.mktemp("whole")
    make_trainer(make_config(folder, **RUN)).train()
    return folder


@pytest.fixture
def cut(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run as it was after step 8."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000012")
    return folder


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step_00000008"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_ends_as_undisturbed(run: Path, whole: Path) -> None:
    for file in ("model.safetensors", "training.safetensors"):
        ours, theirs = (load_file(folder / "checkpoints" / "step_00000012" / file) for folder in (run, whole))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert timeless(lines(run)) == timeless(lines(whole))


# ---- damaged checkpoints ---------------------------------------------------------------------------------------


def test_resume_skips_a_damaged_checkpoint(cut: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The damage is reported with checkpoint and file, and the checkpoint before it is taken."""
    flip_middle_bit(newest(cut) / "model.safetensors")
    make_trainer(make_config(cut, **RUN)).train()
    (reason,) = [line for line in capsys.readouterr().out.splitlines() if f"{newest(cut)}: " in line]
    assert "model.safetensors" in reason
    assert_ends_as_undisturbed(cut, whole)


def test_resume_with_damaged_checkpoints_only_fails(cut: Path) -> None:
    for path in (cut / "checkpoints").glob("step*"):
        flip_middle_bit(path / "training.safetensors")
    before = contents(cut / "checkpoints")
    with pytest.raises(CheckpointError) as error:
        make_trainer(make_config(cut, **RUN)).train()
    assert all(f"step_0000000{step}: training.safetensors" in str(error.value) for step in (4, 8))
    assert contents(cut / "checkpoints") == before


LOST: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "the optimizer": (lambda state, _: state.pop("optimizer_state_dict"), ("missing ['optimizer']",)),
    "a moment's tensor": (
        lambda _, tensors: tensors.pop("optimizer_state_dict/state/lm_head.weight/exp_avg"),
        ("state.json", "lm_head.weight/exp_avg"),
    ),
}


@pytest.mark.parametrize("lost", LOST)
def test_resume_refuses_a_state_that_lacks_something(cut: Path, lost: str) -> None:
    """The manifest is correct."""
    remove, facts = LOST[lost]
    shutil.rmtree(cut / "checkpoints" / "step_00000004")
    rewrite(newest(cut), remove)
    before = contents(cut / "checkpoints")
    trainer = make_trainer(make_config(cut, **RUN, resume=str(newest(cut))))
    with pytest.raises(CheckpointError) as error:
        trainer.train()
    assert all(fact in str(error.value) for fact in facts), error.value
    assert contents(cut / "checkpoints") == before


# ---- folders that cannot be used -------------------------------------------------------------------------------


def test_train_in_a_folder_that_cannot_be_made_fails_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody can make a folder in /proc; permission bits would not stop root."""
    code = train.main(
        [
            *("--output_dir=/proc/run", "--data.sequence_length=16", "--model.d_model=16", "--model.num_heads=2"),
            *("--training.max_steps=1", "--data.tokenizer=byte", f"--data.cache_dir={tmp_path}"),
        ]
    )
    output = capsys.readouterr()
    assert code == 1
    assert "/proc/run" in output.err
    assert "step 1" not in output.out


class Fill(Callback):
    """Makes every larger file fail after a step, once its checkpoint is written."""

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        if trainer.global_step == 5:
            assert trainer.checkpoint_manager is not None
            trainer.checkpoint_manager.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def test_save_that_finds_no_room_fails_and_can_be_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = make_trainer(make_config(tmp_path, **RUN))
    trainer.callbacks.add(Fill())
    try:
        with pytest.raises(CheckpointError, match=r"'step_00000008' .*File too large"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path / "checkpoints") == [".fundamentallm.lock", "step_00000004"]
    again = make_trainer(make_config(tmp_path, **RUN))
    again.train()
    assert again.is_finished


def test_train_with_unwritable_curves_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "curves.png").mkdir()
    (tmp_path / "a.txt").write_text(prose())
    data = DataConfig(str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache"), sequence_length=16)
    config = replace(make_config(tmp_path, max_steps=2), data=data, sample_tokens=0)
    assert train.run(config).is_finished
    said = capsys.readouterr().out
    assert "curves.png cannot be drawn" in said
    assert "metrics and checkpoints are in" in said


def test_train_with_too_little_room_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000))
    trainer = make_trainer(make_config(tmp_path, **RUN))
    with pytest.raises(CheckpointError, match=r"needs room for 1.* kB"):
        trainer.train()
    assert trainer.global_step == 1


# ---- killed and concurrent processes --------------------------------------------------------------------------------


def test_train_cleans_up_after_a_killed_process(
    cut: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, outside = cut / "checkpoints", tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (folder / ".staging-step_00000012-0123456789ab").mkdir()
    (folder / ".staging-step_00000012-0123456789ab" / "model.safetensors").write_bytes(b"half")
    shutil.copytree(newest(cut), folder / ".deleting-step_00000001-0123456789ab")
    newest(cut).rename(folder / ".replaced-step_00000008-0123456789ab")
    shutil.copytree(folder / "step_00000004", folder / ".replaced-step_00000004-0123456789ab")
    foreign = [".staging-mine", ".git", ".replaced-step_00000008-0123456789abc"]
    for name in foreign:
        (folder / name).mkdir()
        (folder / name / "mine").write_text("mine")
    (folder / ".deleting-link-0123456789ab").symlink_to(outside)

    make_trainer(make_config(cut, **RUN)).train()
    output = capsys.readouterr().out
    assert "restored step_00000008" in output
    for name in ("staging-step_00000012", "deleting-step_00000001", "replaced-step_00000004"):
        assert f"removed .{name}-0123456789ab" in output
    assert "step_00000008 at step 8" in output
    assert_ends_as_undisturbed(cut, whole)
    steps = [f"step_{step:08d}" for step in (4, 8, 12)]
    assert names(folder) == sorted([".fundamentallm.lock", *steps, *foreign, ".deleting-link-0123456789ab"])
    assert all((folder / name / "mine").read_text() == "mine" for name in foreign)
    assert names(outside) == ["mine"]


def test_train_refuses_a_folder_in_use(tmp_path: Path) -> None:
    """The output folder or the folder of checkpoints."""
    config = make_config(tmp_path / "run", checkpoint_dir=str(tmp_path / "checkpoints"), **RUN)
    for used in (tmp_path / "run", tmp_path / "checkpoints"):
        with locked([used]), pytest.raises(RunInProgressError, match=f"{used} is in use"):
            make_trainer(config).train()
    assert names(tmp_path / "run") == names(tmp_path / "checkpoints") == [".fundamentallm.lock"]


# ---- background saves and bad weights --------------------------------------------------------------------------


def test_train_ends_at_the_step_after_a_failed_save(tmp_path: Path) -> None:

    class Obstruct(Callback):
        def on_step_end(self, trainer: Trainer, loss: float) -> None:
            manager = trainer.checkpoint_manager
            assert manager is not None
            if trainer.global_step == 5:
                (tmp_path / "checkpoints" / "step_00000008").mkdir()
            if trainer.global_step == 9:  # the save has failed by the end of this step
                for thread in threading.enumerate():
                    if thread.name == "checkpoint":
                        thread.join()

    trainer = make_trainer(make_config(tmp_path, **{**RUN, "max_steps": 100}))
    trainer.callbacks.add(Obstruct())
    with pytest.raises(CheckpointError, match="step_00000008"):
        trainer.train()
    assert trainer.global_step == 9
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == 1
    assert names(tmp_path / "checkpoints") == [".fundamentallm.lock", "step_00000004", "step_00000008"]


def test_train_again_makes_the_last_save_that_failed(tmp_path: Path) -> None:
    obstacle = tmp_path / "checkpoints" / "step_00000012"

    class Obstruct(Callback):
        def on_step_end(self, trainer: Trainer, loss: float) -> None:
            if trainer.global_step == 11:
                obstacle.mkdir()

    trainer = make_trainer(make_config(tmp_path, **RUN))
    trainer.callbacks.add(Obstruct())
    with pytest.raises(CheckpointError, match="step_00000012"):
        trainer.train()
    obstacle.rmdir()
    trainer.train()
    assert (obstacle / "manifest.json").exists()


def test_second_interrupt_waits_for_the_save_in_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted, write = threading.Event(), checkpoint_module.write_manifest

    class Interrupt(Callback):
        def on_step_begin(self, trainer: Trainer) -> None:
            if trainer.global_step == 4:
                interrupted.set()
                raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, "write_manifest", lambda *a, **b: interrupted.wait(60) and write(*a, **b))
    trainer = make_trainer(make_config(tmp_path, **RUN))
    trainer.callbacks.add(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert names(tmp_path / "checkpoints") == [".fundamentallm.lock", "step_00000004"]


def spoil(trainer: Trainer) -> None:
    with torch.no_grad():
        next(iter(trainer.model.parameters()))[0, 0] = math.nan


def test_resume_skips_weights_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Spoil(Callback):
        def on_step_end(self, trainer: Trainer, loss: float) -> None:
            if trainer.global_step == 5:
                spoil(trainer)

    settings = {**RUN, "save_every_n_steps": 2, "keep_last_n": 1, "max_bad_steps": 99}
    trainer = make_trainer(make_config(tmp_path / "run", **settings))
    trainer.callbacks.add(Spoil())
    trainer.train()
    assert names(tmp_path / "run" / "checkpoints") == [".fundamentallm.lock", "step_00000004", "step_00000012"]
    capsys.readouterr()
    again = make_trainer(make_config(tmp_path / "run", **settings))
    again.train()
    output = capsys.readouterr().out
    assert "step_00000012: its weights are not finite" in output
    assert "step_00000004 at step 4" in output
    undisturbed = make_trainer(make_config(tmp_path / "whole", **settings))
    undisturbed.train()
    assert_same_weights(weights(again), weights(undisturbed))
