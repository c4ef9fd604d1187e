"""The command lines a user types, started for real."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from fundamentallm import ConfigError, create_accelerator, train
from fundamentallm.commands import generate
from fundamentallm.distributed.accelerator import check_accelerator
from fundamentallm.training.metrics import MEASURED
from tests.integration.runs import lines, on_processes

ROOT = Path(__file__).parents[2]
TINY = """
output_dir: run
model: {d_model: 16, num_heads: 2, num_layers: 1}
data: {sequence_length: 32}
training: {batch_size: 9, max_steps: 6, log_every_n_steps: 1, learning_rate: 1e-2, eval_every_n_epochs: null}
sample_tokens: 20
"""
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]


def run(folder: Path, *command: str, expected: int = 0) -> subprocess.CompletedProcess[str]:
    (folder / "tiny.yaml").write_text(TINY)
    # Only what a shell has: nothing that a test runner or an enclosing launch may have left.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "WORLD_SIZE"))}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == expected, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_launchers_start_one_run_on_as_many_processes_as_their_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launched = ["-m", "fundamentallm.train", "--config", "tiny.yaml", "--output_dir"]
    one = run(tmp_path, *LAUNCH, str(ROOT / "accelerate_configs/cpu.yaml"), *launched, "one").stdout
    two = run(tmp_path, *LAUNCH, str(ROOT / "accelerate_configs/cpu_2_processes.yaml"), *launched, "two").stdout
    assert train.main(["--config", "tiny.yaml", "--output_dir", "python"]) == 0
    assert "1 process on cpu" in one
    assert two.count("2 processes on cpu") == 1
    assert two.count("---- sample") == 1
    reference = lines(tmp_path / "python")
    assert len(reference) == 7
    for other in ("one", "two"):
        for expected, got in zip(reference, lines(tmp_path / other), strict=True):
            assert got.keys() == expected.keys()
            for key in expected.keys() - MEASURED:
                assert got[key] == pytest.approx(expected[key], rel=1e-5)


@pytest.mark.slow
def test_train_then_generate_from_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, sys.executable, "-m", "fundamentallm", "train", "--config", "tiny.yaml")
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {
        "metrics.jsonl",
        "starts.jsonl",
        "curves.png",
        "checkpoints",
        "status.json",
        ".fundamentallm.lock",
    }
    monkeypatch.chdir(tmp_path)
    outputs = []
    for seed in ("1", "1", "2"):
        assert generate.main(["--checkpoint", "run", "--prompt", "The ", "--seed", seed], "fundamentallm generate") == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("The ")
    assert outputs[0] == outputs[1] != outputs[2]
    assert train.main(["--config", "tiny.yaml"]) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert train.main(["--config", "tiny.yaml", "--training.resume", "never"]) == 2
    assert "holds a run already" in capsys.readouterr().err


def report_a_mistake(count: int, folder: str) -> None:
    os.chdir(folder)
    assert torch.distributed.get_world_size() == count
    os.environ["RANK"] = rank = f"{torch.distributed.get_rank()}"  # as launchers do
    with Path(f"err_{rank}").open("w") as err, redirect_stderr(err):
        assert train.main(["--config", "tiny.yaml", "--data.sequence_length", "60000"]) == 2


def test_two_processes_report_a_mistake_once(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    on_processes(2, report_a_mistake, str(tmp_path))
    said = "".join((tmp_path / f"err_{rank}").read_text() for rank in range(2))
    assert said.count("error: ") == 1
    assert "46513 tokens" in said.replace(",", "")
    assert not (tmp_path / "run").exists()


def test_processes_that_form_no_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were launched and the Accelerator has 1"):
        check_accelerator(accelerator)


def test_accelerates_own_accumulation_is_refused() -> None:
    with pytest.raises(ConfigError, match="micro_batch_size"):
        check_accelerator(Accelerator(cpu=True, gradient_accumulation_steps=2))


def test_two_precisions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match="'no' and mixed_precision in the accelerate config is 'bf16'"):
        create_accelerator("no")
    assert create_accelerator(None).mixed_precision == "bf16"
