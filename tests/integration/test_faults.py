"""Disks that lose, fill up or refuse, and processes in each other's way: told with the numbers, nothing lost."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from fundamentallm import Callback, CheckpointError, CheckpointManager, Trainer, train
from fundamentallm.checkpoint import manager as checkpoint_module
from fundamentallm.errors import RunInProgressError
from tests.conftest import reset_accelerate
from tests.integration.runs import assert_same_weights, lines, make_config, make_trainer, timeless, weights
from tests.unit.checkpoint_files import rewrite

SAVED = ("model.safetensors", "training.safetensors", "state.json", "config.json", "tokenizer.json")
FILES = (*SAVED, "tokenizer_config.json", "manifest.json")
RUN: dict[str, Any] = {"dropout": 0.2, "save_every_n_steps": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed: checkpoints of steps 4, 8 and 12, the last."""
    folder = tmp_path_factory.mktemp("whole")
    make_trainer(make_config(folder, **RUN)).train()
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of step 8 of a run of another seed and tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    make_trainer(make_config(folder, seed=1, **RUN), tokenizer_spec="byte").train()
    return folder / "checkpoints" / "step_00000008"


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
        timeless_ours, timeless_theirs = (
            {name: tensor for name, tensor in tensors.items() if "tokens_per_second" not in name}
            for tensors in (ours, theirs)
        )
        assert timeless_ours.keys() == timeless_theirs.keys()
        for name, tensor in timeless_ours.items():
            torch.testing.assert_close(tensor, timeless_theirs[name], rtol=0, atol=0, equal_nan=True)
    assert timeless(lines(run)) == timeless(lines(whole))


# ---- damaged checkpoints ---------------------------------------------------------------------------------------


def flip(place: float, file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "deleted": Path.unlink,
    "first byte": functools.partial(flip, 0),
    "middle byte": functools.partial(flip, 0.5),
    "last byte": functools.partial(flip, 1),
}


def resume_past_the_damage(run: Path, whole: Path, file: str, said: Callable[[], str]) -> None:
    """The damage is told with checkpoint and file, the one before is taken, and the damaged one stays to be seen."""
    damaged = contents(newest(run))
    make_trainer(make_config(run, **RUN)).train()
    (reason,) = [line for line in said().splitlines() if line.startswith("skipping checkpoint ")]
    assert reason.startswith(f"skipping checkpoint {newest(run)}: ")
    assert file in reason
    assert_ends_as_undisturbed(run, whole)
    (aside,) = (run / "checkpoints").glob("step_00000008~damaged-*")
    assert contents(aside) == damaged


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_taken(
    cut: Path, whole: Path, damage: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[damage](newest(cut) / file)
    resume_past_the_damage(cut, whole, file, lambda: capsys.readouterr().out)


@pytest.mark.parametrize("file", SAVED)
def test_a_file_of_another_run_is_named_and_the_checkpoint_before_taken(
    cut: Path, whole: Path, other: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(other / file, newest(cut) / file)
    resume_past_the_damage(cut, whole, file, lambda: capsys.readouterr().out)


def test_the_manifest_of_another_run_fits_no_file(
    cut: Path, whole: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(other / "manifest.json", newest(cut) / "manifest.json")
    resume_past_the_damage(cut, whole, "config.json has", lambda: capsys.readouterr().out)


def test_with_every_checkpoint_damaged_the_run_names_them_all_and_touches_nothing(
    cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (cut / "checkpoints").glob("step*"):
        flip(0.5, path / "training.safetensors")
    before = contents(cut / "checkpoints")
    with pytest.raises(CheckpointError, match=r"checkpoints in .* are damaged") as caught:
        make_trainer(make_config(cut, **RUN)).train()
    assert str(caught.value).count("training.safetensors is damaged") == 2
    assert contents(cut / "checkpoints") == before


LOST: dict[str, tuple[Callable[..., Any], str]] = {
    "the optimizer": (lambda state, _: state.pop("optimizer_state_dict"), "missing .*optimizer_state_dict"),
    "its type": (lambda state, _: state["optimizer_state_dict"].pop("type"), "its optimizer does not fit.*type"),
    "its inventory": (lambda state, _: state["optimizer_state_dict"].pop("entries"), "its optimizer does not.*entries"),
    "all of its state": (lambda state, _: state["optimizer_state_dict"].update(state={}), "there is none for lm_head"),
    "a parameter": (
        lambda state, _: state["optimizer_state_dict"]["state"].pop("lm_head.weight"),
        "its optimizer does not fit.*there is none for lm_head.weight",
    ),
    "what a parameter has": (
        lambda state, _: state["optimizer_state_dict"]["state"]["lm_head.weight"].clear(),
        "its optimizer does not fit.*there are 24 of 25 step; there are 24 of 25 exp_avg",
    ),
    "what every parameter has": (
        lambda state, _: [entries.clear() for entries in state["optimizer_state_dict"]["state"].values()],
        "its optimizer does not fit.*there are 0 of 25 exp_avg",
    ),
    "a moment": (
        lambda state, _: state["optimizer_state_dict"]["state"]["lm_head.weight"].pop("exp_avg_sq"),
        "its optimizer does not fit.*there are 24 of 25 exp_avg_sq",
    ),
    "every second moment": (
        lambda state, _: [entries.pop("exp_avg_sq") for entries in state["optimizer_state_dict"]["state"].values()],
        "its optimizer does not fit.*there are 0 of 25 exp_avg_sq",
    ),
    "a moment's tensor": (
        lambda _, tensors: tensors.pop("optimizer_state_dict/state/lm_head.weight/exp_avg"),
        "state.json does not fit the tensors.*lm_head.weight/exp_avg",
    ),
    "most of a moment": (
        lambda _, tensors: tensors.update({"optimizer_state_dict/state/lm_head.weight/exp_avg": torch.zeros(1)}),
        r"its optimizer does not fit.*exp_avg of lm_head.weight has shape \(1,\)",
    ),
    "the guard": (lambda state, _: state.pop("guard_state_dict"), "missing .*guard_state_dict"),
    "the guard's window": (lambda state, _: state["guard_state_dict"].pop("recent"), "its guard does not fit"),
    "the progress": (lambda state, _: state.pop("progress_state_dict"), "progress_state_dict"),
    "the place": (lambda state, _: state["progress_state_dict"].pop("samples"), "its progress does not fit"),
    "the schedule's step": (lambda state, _: state["scheduler_state_dict"].clear(), "its scheduler does not fit"),
    "a weight": (lambda state, _: state["model_state_dict"].popitem(), "its model does not fit"),
}


@pytest.mark.parametrize("lost", LOST)
def test_what_a_true_manifest_lacks_is_named_and_never_begun_afresh(cut: Path, lost: str) -> None:
    remove, named = LOST[lost]
    shutil.rmtree(cut / "checkpoints" / "step_00000004")
    rewrite(newest(cut), remove)
    before = contents(cut / "checkpoints")
    trainer = make_trainer(make_config(cut, **RUN, resume=str(newest(cut))))
    with pytest.raises(CheckpointError, match=named):
        trainer.train()
    assert contents(cut / "checkpoints") == before


def test_rewriting_without_a_change_is_no_damage(cut: Path, whole: Path) -> None:
    rewrite(newest(cut), lambda state, tensors: None)
    make_trainer(make_config(cut, **RUN)).train()
    assert_ends_as_undisturbed(cut, whole)


# ---- folders that cannot be used -------------------------------------------------------------------------------


class Ended(NamedTuple):
    code: int
    said: str


def run_command_line(folder: Path, *options: str, largest_file: int = resource.RLIM_INFINITY) -> Ended:
    """The command line in a process of its own, none of whose files may grow beyond a size; saves at steps 2 and 4."""
    (folder / "text.txt").write_text("to be or not to be, that is the question. " * 50)
    settings = {
        "data.source": "text.txt", "data.sequence_length": 16, "data.cache_dir": "cache", "model.d_model": 64,
        "model.num_heads": 2, "model.num_layers": 2, "training.batch_size": 8, "training.max_steps": 4,
        "training.save_every_n_steps": 2, "training.log_every_n_steps": 1, "sample_tokens": 0, "output_dir": "run",
    }  # fmt: skip

    def run() -> None:
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        with open("said", "w") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = train.main([*(f"--{name}={value}" for name, value in settings.items()), *options])
        os._exit(code)

    reset_accelerate()
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode is not None
    return Ended(process.exitcode, (folder / "said").read_text())


def assert_told(ended: Ended, *told: str) -> None:
    assert ended.code == 1, ended.said
    assert "Traceback" not in ended.said
    _, _, error = ended.said.partition("error: ")
    for text in told:
        assert text in error


@pytest.mark.parametrize("option", ["output_dir", "training.checkpoint_dir"])
def test_a_folder_that_cannot_be_made_is_told_before_the_first_step(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """/proc takes no folder from anybody; permission bits would not stop root."""
    code = train.main(
        [f"--{option}=/proc/run", "--data.sequence_length=16", "--model.d_model=16", "--model.num_heads=2"]
        + ["--training.max_steps=1", "--data.tokenizer=byte", f"--data.cache_dir={tmp_path}"]
        + ([f"--output_dir={tmp_path / 'run'}"] if option != "output_dir" else [])
    )
    said = capsys.readouterr()
    assert code == 1
    assert "[Errno 2]" in said.err
    assert "/proc/run" in said.err
    assert "step 1" not in said.out


def test_a_file_that_takes_a_folders_place_during_the_run_is_told(tmp_path: Path) -> None:
    class Replace(Callback):
        def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            if trainer.global_step == 5:
                assert trainer.checkpoint_manager is not None
                trainer.checkpoint_manager.wait()
                trainer.checkpoint_manager.checkpoint_dir.rename(tmp_path / "moved")
                trainer.checkpoint_manager.checkpoint_dir.write_text("mine")

    trainer = make_trainer(make_config(tmp_path / "run", **RUN))
    trainer.callbacks.add(Replace())
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint 'step_00000008' in .*checkpoints"):
        trainer.train()
    assert trainer.global_step < 12
    assert (tmp_path / "run" / "checkpoints").read_text() == "mine"
    CheckpointManager(tmp_path / "moved").load(tmp_path / "moved" / "step_00000004")


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own; skips the test where none may be mounted."""
    folder.mkdir(exist_ok=True)
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root may mount")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_cannot_be_written_is_told_before_the_first_step(tmp_path: Path) -> None:
    with (
        mounted(tmp_path / "disk", "size=8m,ro") as disk,
        pytest.raises(CheckpointError, match="Read-only file system"),
    ):
        make_trainer(make_config(disk / "run", **RUN)).train()


# ---- no room ---------------------------------------------------------------------------------------------------


def fill(folder: Path, free: int) -> None:
    """Leave `free` bytes of a file system."""
    size = shutil.disk_usage(folder).free - free
    (folder / "filling").write_bytes(b"0" * size)


class Fill(Callback):
    """Fills the disk after a step, once its checkpoint is written."""

    def __init__(self, disk: Path, step: int, free: int) -> None:
        self.disk, self.step, self.free = disk, step, free

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        if trainer.global_step == self.step:
            assert trainer.checkpoint_manager is not None
            trainer.checkpoint_manager.wait()
            fill(self.disk, self.free)


@pytest.mark.parametrize(
    ("step", "left"), [(1, [".fundamentallm.lock"]), (5, [".fundamentallm.lock", "step_00000004"])]
)
@pytest.mark.parametrize("free", [0, 40_000])
def test_a_full_disk_is_told_with_the_numbers_and_keeps_what_is_on_it(
    tmp_path: Path, step: int, left: list[str], free: int
) -> None:
    with mounted(tmp_path / "disk", "size=4m") as disk:
        trainer = make_trainer(make_config(tmp_path / "run", checkpoint_dir=str(disk / "c"), **RUN))
        trainer.callbacks.add(Fill(disk, step, free))
        with pytest.raises(CheckpointError, match=r"1 checkpoint of 0\.1 MB needs 0\.1 MB in .*, and 0\.0 MB are free"):
            trainer.train()
        assert trainer.global_step < 12
        assert names(disk / "c") == left
        for path in (disk / "c").glob("step*"):
            CheckpointManager(disk / "c").load(path)


def test_a_disk_that_fills_up_while_writing_is_told_in_the_file_systems_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The space was there when it was looked at; somebody else has it now."""
    usage = namedtuple("usage", "total used free")
    with mounted(tmp_path / "disk", "size=4m") as disk:
        trainer = make_trainer(make_config(tmp_path / "run", checkpoint_dir=str(disk / "c"), **RUN))
        trainer.callbacks.add(Fill(disk, 5, 40_000))
        monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda folder: usage(10**9, 0, 10**9))
        with monkeypatch.context() as patched:
            patched.setattr(f"{__name__}.fill", lambda folder, free: _fill_by_statvfs(folder, free))
            with pytest.raises(CheckpointError, match=r"cannot write checkpoint 'step_00000008'.*No space left"):
                trainer.train()
        assert names(disk / "c") == [".fundamentallm.lock", "step_00000004"]
        CheckpointManager(disk / "c").load(disk / "c" / "step_00000004")


def _fill_by_statvfs(folder: Path, free: int) -> None:
    status = os.statvfs(folder)
    (folder / "filling").write_bytes(b"0" * (status.f_bavail * status.f_frsize - free))


def test_a_full_disk_under_the_whole_run_is_told(tmp_path: Path) -> None:
    """Log lines and the run's status lie on the same disk, and cannot be written either."""
    with mounted(tmp_path / "disk", "size=4m") as disk:
        trainer = make_trainer(make_config(disk / "run", **RUN))
        trainer.callbacks.add(Fill(disk, 5, 0))
        with pytest.raises(CheckpointError, match=r"and 0\.0 MB are free"):
            trainer.train()
        assert names(disk / "run" / "checkpoints") == [".fundamentallm.lock", "step_00000004"]
        (disk / "filling").unlink()
        again = make_trainer(make_config(disk / "run", **RUN))
        again.train()
        assert again.is_finished


LIMIT = 400_000
"""Bytes of a file: more than the curves, less than the moments of a model of 100,000 parameters."""


def test_a_limit_on_files_is_told_in_the_file_systems_words_at_the_first_save(tmp_path: Path) -> None:
    ended = run_command_line(tmp_path, largest_file=LIMIT)
    assert_told(ended, "cannot write checkpoint 'step_00000002' in run/checkpoints", "File too large")
    assert names(tmp_path / "run" / "checkpoints") == [".fundamentallm.lock"]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)


def test_a_limit_on_files_at_a_later_save_leaves_the_older_checkpoint_whole(tmp_path: Path) -> None:
    assert run_command_line(tmp_path).code == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    before = contents(tmp_path / "run" / "checkpoints")
    ended = run_command_line(tmp_path, largest_file=LIMIT)
    assert_told(ended, "cannot write checkpoint 'step_00000004' in run/checkpoints", "File too large")
    assert contents(tmp_path / "run" / "checkpoints") == before
    assert run_command_line(tmp_path).code == 0


def test_curves_that_cannot_be_drawn_are_told_by_name_and_end_no_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "curves.png").mkdir(parents=True)
    ended = run_command_line(tmp_path)
    assert ended.code == 0, ended.said
    assert "run/curves.png cannot be drawn: [Errno 21] Is a directory" in ended.said
    assert [line["step"] for line in lines(tmp_path / "run") if "train_loss" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize("present", [0, 1])
def test_too_little_room_for_the_run_is_told_before_its_first_step(
    whole: Path, tmp_path: Path, present: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """keep_last_n, the best and a new one: five at once, less those that are there."""
    folder = tmp_path / "run" / "checkpoints"
    if present:
        shutil.copytree(whole / "checkpoints" / "step_00000004", folder / "step_00000004")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 400_000))
    trainer = make_trainer(make_config(tmp_path / "run", **RUN))
    steps: list[int] = []
    monkeypatch.setattr(trainer.callbacks, "on_train_begin", lambda trainer: steps.append(trainer.global_step))
    count = 5 - present
    with pytest.raises(
        CheckpointError, match=rf"{count} checkpoints of 0\.1 MB need 0\.[45] MB in .*, and 0\.4 MB are"
    ):
        trainer.train()
    assert steps == []


# ---- what dead processes leave --------------------------------------------------------------------------------


def test_what_a_dead_process_left_is_put_in_order_and_told_and_nothing_else_is_touched(
    cut: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, outside = cut / "checkpoints", tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (folder / ".staging-step_00000012-0123456789ab").mkdir()
    (folder / ".staging-step_00000012-0123456789ab" / "model.safetensors").write_bytes(b"half")
    (folder / ".deleting-step_00000001-0123456789ab").mkdir()
    shutil.copytree(newest(cut), folder / ".deleting-step_00000001-0123456789ab" / "step_00000001")
    (folder / ".replaced-step_00000008-0123456789ab").mkdir()
    newest(cut).rename(folder / ".replaced-step_00000008-0123456789ab" / "step_00000008")
    (folder / ".replaced-step_00000004-0123456789ab").mkdir()
    shutil.copytree(folder / "step_00000004", folder / ".replaced-step_00000004-0123456789ab" / "step_00000004")
    foreign = [".staging-mine", ".staging-step_1-0123", ".git", ".replaced-step_00000008-0123456789abc", "staging-x"]
    for name in foreign:
        (folder / name).mkdir()
        (folder / name / "mine").write_text("mine")
    (folder / ".staging-file-0123456789ab").write_text("mine")
    (folder / ".deleting-link-0123456789ab").symlink_to(outside)
    (folder / ".replaced-link-0123456789ab").symlink_to(outside)

    make_trainer(make_config(cut, **RUN)).train()
    said = capsys.readouterr().out
    assert "put step_00000008 back, which was being replaced when its process ended" in said
    assert "removed an unfinished checkpoint, .staging-step_00000012-0123456789ab, of a process that ended" in said
    assert "removed the rest of an old checkpoint, .deleting-step_00000001-0123456789ab, of a process" in said
    assert "removed the rest of an old checkpoint, .replaced-step_00000004-0123456789ab, of a process" in said
    assert "step_00000008 at step 8" in said
    assert_ends_as_undisturbed(cut, whole)
    links = [".deleting-link-0123456789ab", ".replaced-link-0123456789ab", ".staging-file-0123456789ab"]
    assert names(folder) == sorted(
        [".fundamentallm.lock", "step_00000004", "step_00000008", "step_00000012", *foreign, *links]
    )
    assert all((folder / name / "mine").read_text() == "mine" for name in foreign)
    assert names(outside) == ["mine"]


WAITS = """
import sys
from tests.integration.runs import make_config, make_trainer
from fundamentallm import Callback

class Wait(Callback):
    def on_log(self, trainer, metrics):
        if trainer.global_step == 3:
            print("waiting", flush=True)
            sys.stdin.readline()

trainer = make_trainer(make_config(sys.argv[1], dropout=0.2, save_every_n_steps=4))
trainer.callbacks.add(Wait())
trainer.train()
"""


@contextlib.contextmanager
def waiting_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The run in another process, in the middle of its third step until it is sent a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        while "waiting" not in (line := process.stdout.readline()):
            assert line, "the run ended early"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_undisturbed(tmp_path: Path, whole: Path) -> None:
    with waiting_run(tmp_path / "run") as process:
        before = contents(tmp_path / "run")
        with pytest.raises(RunInProgressError, match=rf"run is in use by process {process.pid} on "):
            make_trainer(make_config(tmp_path / "run", **RUN)).train()
        elsewhere = make_config(tmp_path / "b", checkpoint_dir=str(tmp_path / "run" / "checkpoints"), **RUN)
        with pytest.raises(RunInProgressError, match=rf"checkpoints is in use by process {process.pid} on "):
            make_trainer(elsewhere).train()
        assert contents(tmp_path / "run") == before
        process.communicate("\n")
        assert process.returncode == 0
    assert_ends_as_undisturbed(tmp_path / "run", whole)


def test_the_lock_of_a_killed_process_stops_nobody(tmp_path: Path, whole: Path) -> None:
    with waiting_run(tmp_path / "run") as process:
        process.kill()
        process.wait()
        assert f"process {process.pid}" in (tmp_path / "run" / ".fundamentallm.lock").read_text()
        make_trainer(make_config(tmp_path / "run", **RUN)).train()
    assert_ends_as_undisturbed(tmp_path / "run", whole)


# ---- background saves and bad weights --------------------------------------------------------------------------


def test_a_failed_save_ends_the_run_at_its_next_step(tmp_path: Path) -> None:
    """What cannot be saved is not trained on: a hundred steps are left when the second save fails."""

    class Obstruct(Callback):
        def on_step_end(self, trainer: Trainer, loss: float) -> None:
            manager = trainer.checkpoint_manager
            assert manager is not None
            if trainer.global_step == 5:
                (tmp_path / "checkpoints" / "step_00000008").mkdir()
            if trainer.global_step == 9 and manager._writer is not None:
                manager._writer.join()  # so that the step after is the first that can know

    trainer = make_trainer(make_config(tmp_path, **{**RUN, "max_steps": 100}))
    trainer.callbacks.add(Obstruct())
    with pytest.raises(CheckpointError, match="step_00000008 is in the way"):
        trainer.train()
    assert trainer.global_step == 9
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == 1
    assert names(tmp_path / "checkpoints") == [".fundamentallm.lock", "step_00000004", "step_00000008"]


def spoil(trainer: Trainer) -> None:
    with torch.no_grad():
        next(iter(trainer.model.parameters()))[0, 0] = math.nan


def test_weights_that_are_not_finite_push_no_finite_ones_out_and_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    said = capsys.readouterr().out
    assert "step_00000012: its weights are not finite" in said
    assert "step_00000004 at step 4" in said
    undisturbed = make_trainer(make_config(tmp_path / "whole", **settings))
    undisturbed.train()
    assert_same_weights(weights(again), weights(undisturbed))
