"""`fundamentallm checkpoints` prints what a run did, and no traceback for damaged or hostile checkpoints."""

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader

from fundamentallm import CheckpointManager, Config, DataConfig, ModelConfig, Trainer, TrainingConfig
from fundamentallm.__main__ import main
from fundamentallm.checkpoint.manifest import MANIFEST, describe, write_manifest
from fundamentallm.commands import checkpoints
from fundamentallm.train import make_trainer
from tests.conftest import reset_accelerate
from tests.integration.runs import PartlyIgnored, lines, prose
from tests.integration.test_training_loop import Bigram

ROOT = Path(__file__).parents[2]
SEQUENCE = 16
Command = Callable[..., tuple[int, str, str]]


class Run(NamedTuple):
    """A run that was made on `text`, and the texts that its model saw at each step."""

    folder: Path
    text: Path
    seen: list[list[str]]


def record(trainer: Trainer, seen: list[list[str]]) -> None:
    decode = trainer.train_loader.dataset.tokenizer.decode  # type: ignore[attr-defined]

    def sees(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if model.training:
            seen.append([decode(row, skip_special_tokens=False) for row in inputs[0].tolist()])

    trainer.model.register_forward_pre_hook(sees)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs and more over 169 samples: 8 steps of 32, whose sixth is short, then steps of 20."""
    folder = tmp_path_factory.mktemp("run")
    run = Run(folder / "run", folder / "text.txt", [])
    run.text.write_text(prose(3_000))
    data = DataConfig(str(run.text), sequence_length=SEQUENCE, cache_dir=str(folder / "cache"))
    model = ModelConfig(d_model=16, num_heads=2, num_layers=1)
    for batch_size, max_steps in ((32, 8), (20, 18)):
        reset_accelerate()
        training = TrainingConfig(
            batch_size=batch_size, max_steps=max_steps, learning_rate=1e-2, log_every_n_steps=1, keep_last_n=20,
            save_every_n_steps=4, eval_every_n_steps=4, eval_every_n_epochs=None, save_every_n_epochs=None,
            resume_changes=["training.batch_size", "training.max_steps"],
        )  # fmt: skip
        trainer = make_trainer(Config(str(run.folder), model, data, training).resolved())
        record(trainer, run.seen)
        trainer.train()
    reset_accelerate()
    return run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `fundamentallm checkpoints ...` here; (exit code, what it printed, errors)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fundamentallm", "checkpoints", *map(str, arguments)])
        capsys.readouterr()
        return (main(), *capsys.readouterr())

    return run


@pytest.fixture
def copy(made: Run, tmp_path: Path) -> Path:
    """The run's folder, to be damaged."""
    return Path(shutil.copytree(made.folder, tmp_path / "run", symlinks=True))


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / "step_00000018"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def parsed(output: str) -> dict[str, tuple[str, str]]:
    """{index: (first and last token, text)} of what `samples` prints."""
    parts = re.split(r"---- sample ([\d,]+), tokens (\S+) ----\n", output)[1:]
    found = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return {index.replace(",", ""): (place.replace(",", ""), text[:-1]) for index, place, text in found}


# ---- samples ----------------------------------------------------------------------------------------------


def test_samples_equal_what_each_step_saw(made: Run, command: Command) -> None:
    length = int(3_000 * 0.9)
    assert len(made.seen[5]) == 9  # the last batch of an epoch is short
    for step, seen in enumerate(made.seen, start=1):
        code, out, err = command("samples", made.folder, "--step", step)
        assert (code, err) == (0, "")
        samples = parsed(out)
        assert [text for _, text in samples.values()] == seen
        starts = [min(int(index) * SEQUENCE, length - 1 - SEQUENCE) for index in samples]
        assert [place for place, _ in samples.values()] == [f"{start}-{start + SEQUENCE - 1}" for start in starts]
        before = sum(map(len, made.seen[: step - 1]))
        assert f"step {step} is in epoch {before // 169} (from 0), after {before} samples" in out


def test_samples_after_an_older_checkpoint_are_predicted(made: Run, command: Command) -> None:
    older = made.folder / "checkpoints" / "step_00000004"
    for step, is_told in ((4, False), (8, True)):
        code, out, _ = command("samples", older, "--step", step, "--indices_only")
        assert code == 0
        assert out.splitlines()[-1] == ", ".join(parsed(command("samples", made.folder, "--step", step)[1]))
        assert ("not trained yet: the checkpoint has 4 steps" in out) == is_told


def test_samples_of_step_0_is_refused(made: Run, command: Command) -> None:
    code, out, err = command("samples", made.folder, "--step", 0)
    assert (code, out) == (2, "")
    assert "step is 0; allowed: at least 1" in err


def test_samples_changed_text_is_refused(made: Run, copy: Path, command: Command, tmp_path: Path) -> None:
    text, other, foreign = made.text.read_text(), tmp_path / "other.txt", tmp_path / "foreign.txt"
    other.write_text(text[:50] + "#" + text[51:])
    foreign.write_text(
        "".join(chr(ord(character) + 0x4E00) for character in text)
    )  # equal ids by a vocabulary of its own
    for source in (other, foreign, "gone.txt"):
        code, out, err = command("samples", copy, "--step", 1, "--source", source)
        assert (code, out) == (2, "")
        assert str(source) in err
        assert "data.source" in err
        assert "--source" in err
    assert command("samples", copy, "--step", 1, "--source", other, "--indices_only")[0] == 0


def test_samples_own_dataset_has_indices_and_no_text(tmp_path: Path, command: Command) -> None:
    asked: list[int] = []

    class Recorded(PartlyIgnored):
        def __getitem__(self, index: int) -> Any:
            asked.append(index)
            return super().__getitem__(index)

    config = TrainingConfig(max_steps=12, checkpoint_dir=str(tmp_path))
    loader = DataLoader(Recorded(), batch_size=8, shuffle=True, drop_last=True)
    Trainer(Bigram(), config, loader, callbacks=[]).train()
    for step in (1, 7, 12):
        code, out, _ = command("samples", tmp_path, "--step", step)
        assert code == 0
        assert "no text" in out
        assert out.splitlines()[-1] == ", ".join(map(str, asked[8 * step - 8 : 8 * step]))
    assert command("show", tmp_path)[0] == 0


# ---- list -------------------------------------------------------------------------------------------------


def test_list_has_a_line_per_checkpoint_oldest_first(made: Run, command: Command) -> None:
    code, out, _ = command("list", made.folder)
    assert command("list", made.folder / "checkpoints")[1] == out
    table, note = out.split("\n\n")
    assert "sizes" in note
    header, *rows = (line.split() for line in table.splitlines())
    assert code == 0
    assert header == ["checkpoint", "step", "val_loss", "size", "saved"]
    steps = [4, 8, 12, 16, 18]
    losses = {line["step"]: line["val_loss"] for line in lines(made.folder) if "val_loss" in line}
    assert [row[:3] for row in rows] == [[f"step_{step:08d}", str(step), f"{losses[step]:.4f}"] for step in steps]
    best = min(losses, key=lambda step: losses[step])
    marked = {row[0]: " ".join(row[7:]) for row in rows if row[7:]}
    assert marked == {f"step_{best:08d}": "best"} | {"step_00000018": "best, newest" if best == 18 else "newest"}
    assert max(map(len, out.splitlines())) <= 100


def test_list_is_in_the_order_of_saving(tmp_path: Path, command: Command) -> None:
    history = {"val_step": torch.tensor([1, 4]), "val_loss": torch.tensor([float("nan"), 1.75])}
    latest = {"latest": {"val_step": 3, "val_loss": 1.5}}
    for name, step, metrics in (("new", 1, {"latest": {}}), ("z", 2, latest), ("a", 3, latest), ("b", 4, history)):
        state = {"metrics_state_dict": metrics, "progress_state_dict": {"step": step}}
        CheckpointManager(tmp_path, 4).save({"model_state_dict": {"w": torch.ones(1)}, **state}, name)
    rows = [line.split()[:3] for line in command("list", tmp_path)[1].split("\n\n")[0].splitlines()[1:]]
    assert rows == [["new", "1", "-"], ["z", "2", "-"], ["a", "3", "1.5000"], ["b", "4", "1.7500"]]


def test_list_says_why_a_folder_is_not_complete(copy: Path, command: Command) -> None:
    folder = copy / "checkpoints"
    (folder / "step_00000004" / MANIFEST).unlink()
    (folder / "step_00000008" / MANIFEST).write_text("{")
    (folder / "step_00000012" / "model.safetensors").write_bytes(b"short")
    CheckpointManager(folder, 20).save({"model_state_dict": {"w": torch.tensor([float("nan")])}}, "nan")
    code, out, _ = command("list", copy)
    assert code == 0
    for name, reason in (
        ("step_00000004", "incomplete, it has no manifest.json"),
        ("step_00000008", "manifest.json is damaged"),
        ("step_00000012", "model.safetensors has 5 bytes instead of"),
        ("nan", "newest, weights not finite"),
    ):
        assert [line for line in out.splitlines() if line.split()[:1] == [name] and reason in line], name


# ---- verify -----------------------------------------------------------------------------------------------


def test_verify_finds_a_flipped_bit(copy: Path, command: Command) -> None:
    for folder in (newest(copy), copy):
        code, out, _ = command("verify", folder)
        assert code == 0
        assert len(out.splitlines()) == (2 if folder == newest(copy) else 6)
    flip(newest(copy) / "model.safetensors")
    for folder, count in ((newest(copy), 1), (copy, 5)):
        code, out, err = command("verify", folder)
        assert code == 1
        assert f"1 of {count} checkpoints are damaged" in err
        (line,) = [line for line in out.splitlines() if "step_00000018" in line]
        assert "model.safetensors is damaged, its SHA-256 differs" in line


def test_verify_does_not_call_a_rotated_checkpoint_damaged(
    copy: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A live run deletes its oldest checkpoint between the listing and the reading."""
    real = checkpoints.verify

    def verify(path: Path) -> Any:
        shutil.rmtree(copy / "checkpoints" / "step_00000008", ignore_errors=True)
        return real(path)

    monkeypatch.setattr(checkpoints, "verify", verify)
    code, out, _ = command("verify", copy)
    assert (code, "damaged" in out, len(out.splitlines())) == (0, False, 5)


def test_every_verb_takes_the_checkpoint_as_an_option(made: Run, command: Command) -> None:
    for verb in VERBS:
        name, *further = verb
        if name != "consolidate":
            assert command(name, "--checkpoint", made.folder, *further) == command(name, made.folder, *further)


# ---- source of a stranger's checkpoint ----------------------------------------------------------------------


def change_source(path: Path, source: str) -> None:
    """Rewrites the source in a checkpoint's config, and its manifest."""
    state = json.loads((path / "state.json").read_text())
    state["state"]["config"]["data"] |= {"source": source, "tokenizer": "byte"}
    (path / "state.json").write_text(json.dumps(state))
    (path / MANIFEST).unlink()
    write_manifest(path, describe(path, os.listdir(path)), sequence=99, is_best=True, is_finite=True, step=18)


@pytest.mark.parametrize("where", ["run", "alone"])
@pytest.mark.parametrize("source", ["pipe", "secret.txt", "datasets:json,data_files=secret.txt", "/**"])
def test_source_that_only_a_checkpoint_names_is_not_opened(
    copy: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    (tmp_path / "secret.txt").write_text("to be or not to be " * 200)
    path = newest(copy)
    if where == "alone":
        path = path.rename(tmp_path / path.name)
    change_source(path, source)
    data = json.loads((path / "state.json").read_text())["state"]["config"]["data"]
    forged = {"step": 0, "environment": {"host": socket.gethostname()}, "config": {"data": data}}
    (copy / "starts.jsonl").write_text(json.dumps(forged) + "\n")
    monkeypatch.setattr("fundamentallm.run.progress.load_corpus", lambda *_, **__: pytest.fail("opened"))
    for verb in (["checkpoints", "samples", str(path), "--step", "9"], ["evaluate", str(path)]):
        monkeypatch.setattr(sys, "argv", ["fundamentallm", *verb])
        assert main() == 2


def test_source_of_a_checkpoint_is_opened_once_the_user_has(
    made: Run, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = shutil.copytree(newest(made.folder), tmp_path / "step_00000018")
    assert command("samples", path, "--step", 9)[0] == 2
    assert command("samples", path, "--step", 9, "--source", made.text)[0] == 0
    assert command("samples", path, "--step", 9)[0] == 0


# ---- show -------------------------------------------------------------------------------------------------


def test_show_prints_step_loss_files_versions_and_config(made: Run, command: Command) -> None:
    code, out, _ = command("show", made.folder)
    assert code == 0
    assert command("show", newest(made.folder))[1] == out
    loss = [line["val_loss"] for line in lines(made.folder) if "val_loss" in line][-1]
    printed = {" ".join(line.split()) for line in out.splitlines()}
    size = (newest(made.folder) / "model.safetensors").stat().st_size
    assert f"\nstep 18, val_loss {loss:.4f}" in out
    expected = {"batch_size: 20", f"source: {made.text}"}
    assert expected | {f"model.safetensors {size / 1000:.1f} kB"} <= printed
    assert f"torch {torch.__version__}" in " ".join(out.split())
    changed = out.partition("differ from the defaults\n")[2].partition("\n\n")[0].split("\n")
    assert {"  training.batch_size: 20", "  model.num_layers: 1"} <= set(changed)
    assert not [line for line in changed if "weight_decay" in line or "checkpoint_dir" in line]


# ---- whatever it is given ---------------------------------------------------------------------------------

VERBS: list[list[str]] = [["list"], ["verify"], ["show"], ["samples", "--step", "1"]]


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_wrong_path_is_an_error_with_the_path(tmp_path: Path, command: Command, verb: list[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "file", "empty", "x" * 300, "x\x1b[2J"):
        code, out, err = command(verb[0], tmp_path / name, *verb[1:])
        assert (code, out) == (1, "")
        assert str(tmp_path / name).replace("\x1b", "\\x1b") in err


ESCAPE = "\x1b[2J\ud800\nstep_99999999  ok"


@pytest.mark.parametrize("part", ["config", "data", "versions", "progress_state_dict", "metrics_state_dict"])
def test_verbs_hostile_state_prints_no_control_characters(copy: Path, command: Command, part: str) -> None:
    path = newest(copy)
    saved = json.loads((path / "state.json").read_text())
    if part == "data":
        saved["state"]["config"]["data"] |= {ESCAPE: ESCAPE, "source": ESCAPE}
    else:
        saved["state"][part] = {ESCAPE: ESCAPE}
    (path / "state.json").write_text(json.dumps(saved))
    (path / MANIFEST).unlink()
    write_manifest(path, describe(path, os.listdir(path)), sequence=99, is_best=True, is_finite=True, step=18)
    for verb in VERBS:
        code, out, err = command(verb[0], copy, *verb[1:])
        assert code in (0, 1, 2)
        assert (code == 0) == (err == "")
        assert all(character.isprintable() or character == "\n" for character in out + err)
