"""The examples for several machines, with two launchers of one process each on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from fundamentallm import train
from fundamentallm.errors import START_AGAIN
from tests.integration.runs import lines
from tests.integration.test_launching import ROOT

TINY = """
model: {d_model: 16, num_heads: 2, num_layers: 1}
data: {sequence_length: 32}
training: {batch_size: 9, log_every_n_steps: 5,
  eval_every_n_epochs: null, save_every_n_steps: 4, lr_scheduler: constant}
sample_tokens: 0
"""
KILL_ONCE = """
import os, pathlib, signal
from fundamentallm import Callback

class KillOnce(Callback):
    def on_log(self, trainer, metrics):
        if trainer.global_step == 15 and os.environ["GROUP_RANK"] == "1" and not os.path.exists("killed"):
            pathlib.Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & done
machines=$(jobs -p)
trap 'kill -TERM $machines' TERM
for machine in $machines; do
    while kill -0 $machine 2>/dev/null; do wait $machine; code=$?; done
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf '127.0.0.1\\nanother\\n'; else echo "$@" > scontrol_arguments; fi
"""


def read_up_to(text: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    read = []
    for line in process.stdout:
        read.append(line)
        if text in line:
            return
    raise AssertionError(f"the run ended with {process.wait()} before {text!r}: {''.join(read)}")


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Waits for a process; returns its exit code and the rest of its output."""
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _nothing_left_running() -> Iterator[None]:
    yield
    while started:
        process = started.pop()
        if process.poll() is None:  # after a failure; launchers end their processes
            process.terminate()
            process.communicate(timeout=100)


def start(folder: Path, command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "WORLD_SIZE"))}
    own |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started.append(subprocess.Popen(command, cwd=folder, env=own, start_new_session=True, **pipes))
    return started[-1]


def assert_losses_of_one_process(folder: Path, monkeypatch: pytest.MonkeyPatch, expected: Sequence[int]) -> None:
    """Compares the run in `folder`/run, logged at the expected steps, with a run on one process."""
    monkeypatch.chdir(folder)
    until = ["--training.max_steps", f"{expected[-1]}"]
    assert train.main(["--config", "tiny.yaml", "--output_dir", "one", *until]) == 0
    one, several = ([line for line in lines(folder / run) if "train_loss" in line] for run in ("one", "run"))
    several = several[: len(expected)]
    assert [line["step"] for line in several] == list(expected)
    for name in ("train_loss", "grad_norm", "samples", "tokens"):
        assert [line[name] for line in several] == pytest.approx([line[name] for line in one], rel=1e-4)


@pytest.mark.slow
def test_slurm_script_is_one_run_and_requeues_it(tmp_path: Path) -> None:
    script = ROOT / "examples/slurm.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "tiny.yaml").write_text(TINY)
    on_cpus = (ROOT / "accelerate_configs/multi_node.yaml").read_text().replace("use_cpu: false", "use_cpu: true")
    (tmp_path / "multi_node.yaml").write_text(on_cpus)
    process = start(
        tmp_path,
        ["bash", str(script), "run", "--config", "tiny.yaml", "--training.max_steps", "100000"],
        PATH=f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        ACCELERATE_CONFIG="multi_node.yaml",
        SLURM_JOB_ID=f"{free_port()}",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="two",
    )
    read_up_to("2 processes on cpu", process)
    read_up_to("10/100000 |", process)
    process.send_signal(signal.SIGUSR1)
    code, output = end(process)
    assert code == 1, output
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"], status["reason"]) == ("interrupted", START_AGAIN, "SIGTERM received")
    end_of_run = f"saved in run/checkpoints/step_{status['step']:08d}\nto resume: "
    assert output.count(end_of_run) == 2, output  # again after the launcher's traceback
    assert (tmp_path / "scontrol_arguments").read_text().startswith("requeue ")


@pytest.mark.slow
def test_kubernetes_job_names_a_lost_process_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service, job = yaml.safe_load_all((ROOT / "examples/kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    first, number = f"{service['metadata']['name']}-0.{pod['subdomain']}", job["spec"]["completions"]
    command = " ".join(pod["containers"][0]["command"])
    assert f"--nnodes={number} " in command
    changes = {
        "torchrun ": f"{sys.executable} -m torch.distributed.run ",
        f"{first}:29500": f"localhost:{free_port()}",
        "--nproc-per-node=8": "--nproc-per-node=1",
        "your.yaml": "tiny.yaml",
        "runs/mine": "run --training.max_steps=25 --callbacks=[kill:KillOnce]",
        "precision=bf16": "precision=no",
        "max-restarts=3": "max-restarts=1",  # one lost process needs one restart
    }
    for old, new in changes.items():
        assert command.count(old) == 1
        command = command.replace(old, new)
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "kill.py").write_text(KILL_ONCE)
    machines = [start(tmp_path, command.split()) for _ in range(number)]
    ends = [end(machine) for machine in machines]
    output = "".join(text for _, text in ends)
    assert [code for code, _ in ends] == [0, 0], output
    assert output.count("2 processes on cpu") == 2
    assert "process 1 of 2" in output
    assert "is gone: killed, or its machine is lost" in output
    assert "resumed from run/checkpoints/step_00000012 at step 12" in output
    assert_losses_of_one_process(tmp_path, monkeypatch, [5, 10, 15, 20, 25])
