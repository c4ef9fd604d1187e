"""Command lines of users, in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch

from fundamentallm import train
from fundamentallm.commands import generate
from tests.integration.runs import on_processes

ROOT = Path(__file__).parents[2]
TINY = """
output_dir: run
model: {d_model: 16, num_heads: 2, num_layers: 1}
data: {sequence_length: 32}
training: {batch_size: 9, max_steps: 6, log_every_n_steps: 1, learning_rate: 1e-2, eval_every_n_epochs: null}
sample_tokens: 20
"""
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]


@pytest.mark.slow
def test_launch_on_a_gpu_without_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    file = str(ROOT / "accelerate_configs/single_gpu.yaml")
    command = [*LAUNCH, file, "-m", "fundamentallm.train", "--config", "quickstart"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert f"accelerate_config.use_cpu is False, in {file}" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_train_then_generate_from_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    assert train.main(["--config", "tiny.yaml"]) == 0
    capsys.readouterr()
    written = {path.name for path in (tmp_path / "run").iterdir()}
    logs = {"metrics.jsonl", "starts.jsonl", "curves.png", "status.json"}
    assert written == {*logs, "checkpoints", ".fundamentallm.lock"}
    outputs = []
    for seed in ("1", "1", "2"):
        assert generate.main(["--checkpoint", "run", "--prompt", "The ", "--seed", seed], "fundamentallm generate") == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("The ")
    assert outputs[0] == outputs[1] != outputs[2]
    before = (tmp_path / "run/metrics.jsonl").read_text()
    assert train.main(["--config", "tiny.yaml"]) == 0
    assert train.main(["--config", "tiny.yaml", "--training.resume", "never"]) == 2
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def report_an_error(count: int, folder: str) -> None:
    os.chdir(folder)
    assert torch.distributed.get_world_size() == count
    os.environ["RANK"] = rank = f"{torch.distributed.get_rank()}"  # as launchers do
    with Path(f"err_{rank}").open("w") as err, redirect_stderr(err):
        assert train.main(["--config", "tiny.yaml", "--data.sequence_length", "60000"]) == 2


def test_train_of_two_processes_reports_an_error_once(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    on_processes(2, report_an_error, str(tmp_path))
    printed = [(tmp_path / f"err_{rank}").read_text() for rank in range(2)]
    assert ["data.sequence_length" in text for text in printed] == [True, False]
    assert not (tmp_path / "run").exists()
