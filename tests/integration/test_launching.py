"""Command lines of users, in real processes, and the examples for several machines."""

import json
import os
import shlex
import signal
import subprocess
import sys
from contextlib import redirect_stderr, suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.run as torchrun
import yaml
from accelerate.commands.launch import launch_command_parser

from fundamentallm import train
from fundamentallm.commands import generate
from fundamentallm.config.command_line import parse_config
from fundamentallm.errors import START_AGAIN
from tests.integration.runs import lines, on_processes

ROOT = Path(__file__).parents[2]
TINY = """
output_dir: run
model: {d_model: 16, num_heads: 2, num_layers: 1}
data: {sequence_length: 32}
training: {batch_size: 9, max_steps: 6, log_every_n_steps: 1, learning_rate: 1e-2, eval_every_n_epochs: null,
  save_every_n_steps: 4, lr_scheduler: constant}
sample_tokens: 20
"""


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)


def test_train_then_generate_from_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", "tiny.yaml"]) == 0
    capsys.readouterr()
    written = {path.name for path in Path("run").iterdir()}
    logs = {"metrics.jsonl", "starts.jsonl", "curves.png", "status.json"}
    assert written == {*logs, "checkpoints", ".fundamentallm.lock"}
    outputs = []
    for seed in ("1", "1", "2"):
        assert generate.main(["--checkpoint", "run", "--prompt", "The ", "--seed", seed], "fundamentallm generate") == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("The ")
    assert outputs[0] == outputs[1] != outputs[2]
    before = Path("run/metrics.jsonl").read_text()
    assert train.main(["--config", "tiny.yaml"]) == 0
    assert train.main(["--config", "tiny.yaml", "--training.resume", "never"]) == 2
    assert Path("run/metrics.jsonl").read_text() == before


def report_an_error(count: int) -> None:
    assert torch.distributed.get_world_size() == count
    os.environ["RANK"] = rank = f"{torch.distributed.get_rank()}"  # as launchers do
    with Path(f"err_{rank}").open("w") as err, redirect_stderr(err):
        assert train.main(["--config", "tiny.yaml", "--data.sequence_length", "60000"]) == 2


def test_train_of_two_processes_reports_an_error_once() -> None:
    on_processes(2, report_an_error)
    printed = [Path(f"err_{rank}").read_text() for rank in range(2)]
    assert ["data.sequence_length is 60000" in text for text in printed] == [True, False]
    assert not Path("run").exists()


LOST_AND_STOPPED = """
import os, signal
from fundamentallm import Callback

class LostAndStopped(Callback):
    def on_log(self, trainer, metrics):
        now = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"], trainer.global_step
        if now == ("0", "1", 6):
            os.kill(os.getpid(), signal.SIGKILL)
        if now == ("1", "0", 9):
            os.kill(os.getppid(), signal.SIGTERM)  # the launcher
"""


@pytest.mark.slow
def test_launch_of_two_is_one_run_restarted_and_stopped() -> None:
    """The exit code of a launcher is 1 whatever its processes return; status.json has theirs."""
    Path("lost.py").write_text(LOST_AND_STOPPED)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command = [*launcher, str(ROOT / "accelerate_configs/cpu_2_processes.yaml"), "--max_restarts", "1"]
    command += ["-m", "fundamentallm.train", "--config", "tiny.yaml", "--training.max_steps", "100000"]
    command += ["--callbacks", "[lost:LostAndStopped]"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "WORLD_SIZE"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "process 1 of 2" in done.stderr
    assert "is gone: killed, or its machine is lost" in done.stderr
    assert "resumed from run/checkpoints/step_00000004 at step 4" in done.stdout
    last = done.stderr.splitlines()[-2:]  # after the launcher's traceback
    assert "SIGTERM received; saved in run/checkpoints/step_" in last[0]
    assert shlex.join(command[1:]) in last[1]
    assert done.stdout.count("2 processes on cpu") == 2
    status = json.loads(Path("run/status.json").read_text())
    assert (status["state"], status["exit_code"], status["reason"]) == ("interrupted", START_AGAIN, "SIGTERM received")
    assert Path(f"run/checkpoints/step_{status['step']:08d}").exists()
    until = ["--training.max_steps", "9", "--sample_tokens", "0"]
    assert train.main(["--config", "tiny.yaml", "--output_dir", "one", *until]) == 0
    one, two = ([line for line in lines(folder) if "train_loss" in line][:9] for folder in ("one", "run"))
    for name in ("step", "train_loss", "grad_norm", "samples", "tokens"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-4)


# ---- the examples for several machines, without the machines ---------------------------------------------------

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM $(jobs -p)' TERM
for node in 0 1; do SLURM_NODEID=$node "$@" & done
for machine in $(jobs -p); do
    while kill -0 $machine 2>/dev/null; do wait $machine; code=$?; done
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf '127.0.0.1\\nanother\\n'; else echo "$@" > scontrol_arguments; fi
"""
ACCELERATE = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "launched_$SLURM_NODEID"
trap 'cp stopped.json run/status.json; exit 1' TERM
echo launched
while true; do sleep 0.05; done
"""


def catches(process: int, number: signal.Signals) -> bool:
    """Returns whether a process has installed a handler of a signal."""
    caught = Path(f"/proc/{process}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_slurm_script_launches_one_run_and_requeues_it(tmp_path: Path) -> None:
    """The launcher is replaced by one that notes its arguments, and stops as a real run did."""
    assert train.main(["--config", "tiny.yaml", "--training.max_minutes", "1e-9"]) == START_AGAIN
    Path("run/status.json").rename("stopped.json")
    Path("bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "accelerate": ACCELERATE}.items():
        Path("bin", name).write_text(text)
        Path("bin", name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "23456", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "two"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "examples/slurm.sh"), "run", "--config", "tiny.yaml"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["launched\n"] * 2
        while not catches(process.pid, signal.SIGUSR1):
            assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=100)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    assert Path("scontrol_arguments").read_text() == "requeue 23456\n"
    for rank in (0, 1):
        launched = launch_command_parser().parse_args(Path(f"launched_{rank}").read_text().splitlines()[1:])
        assert (launched.machine_rank, launched.num_machines, launched.num_processes) == (rank, 2, 2)
        assert (launched.main_process_ip, launched.main_process_port) == ("127.0.0.1", 23456)
        assert (launched.config_file, launched.max_restarts) == ("accelerate_configs/multi_node.yaml", 3)
        assert (launched.module, launched.training_script) == (True, "fundamentallm.train")
        assert parse_config(launched.training_script_args).output_dir == "run"


def test_kubernetes_job_launches_one_run_on_all_pods() -> None:
    service, job = yaml.safe_load_all((ROOT / "examples/kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    name, *arguments = pod["containers"][0]["command"]
    given = torchrun.parse_args(arguments)
    config, _, words = torchrun.config_from_args(given)
    assert (name, given.module, words[1]) == ("torchrun", True, "-m")
    assert config.min_nodes == config.max_nodes == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert config.nproc_per_node == pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert config.rdzv_endpoint == f"{service['metadata']['name']}-0.{pod['subdomain']}:29500"
    assert (config.rdzv_backend, config.max_restarts) == ("c10d", 3)
    assert words[2] == "fundamentallm.train"
    Path("your.yaml").write_text(TINY)
    assert parse_config(words[3:]).output_dir == "runs/mine"
