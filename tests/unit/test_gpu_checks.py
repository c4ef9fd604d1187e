"""The checks for a GPU run, as far as a CPU can show it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.benchmarks.gpu import main as measure_speed
from tests.conftest import reset_accelerate
from tests.gpu.__main__ import main
from tests.gpu.checks import CHECKS
from tests.gpu.runs import Runs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def _runs_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another interpreter would take as long to start as the run takes."""

    def run(command: list[str], **_: Any) -> Any:
        reset_accelerate()
        monkeypatch.setattr("sys.argv", command[2:])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(command[2], run_name="__main__")
        return SimpleNamespace(returncode=ended.value.code or 0, stderr="")

    monkeypatch.setattr("tests.gpu.runs.subprocess", SimpleNamespace(run=run))


@pytest.mark.usefixtures("_runs_in_this_process")
def test_main_on_a_cpu_reports_the_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(runs: Runs) -> str:
        """Fails."""
        raise AssertionError("a loss of 7")

    monkeypatch.setitem(CHECKS, "fails", fails)
    command = ["gpu", "--device", "cpu", "--output", str(tmp_path / "gpu.json"), "fails", "overflow", "sharded"]
    monkeypatch.setattr("sys.argv", command)
    assert main() == 1
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["machine"].keys() >= {"device", "torch", "accelerate"}
    found = {finding["name"]: finding["status"] for finding in results["checks"]}
    assert found == {"fails": "FAILED", "overflow": "passed", "sharded": "skipped"}
    assert "FAILED: AssertionError: a loss of 7" in capsys.readouterr().out


@pytest.mark.usefixtures("_runs_in_this_process")
def test_speed_on_a_cpu_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "gpu_speed.json"
    assert measure_speed(["--device", "cpu", "--output", str(output), "GPT-2 124M, uncompiled"]) == 0
    (row,) = json.loads(output.read_text())["rows"].values()
    assert row["tokens_per_second"] > 0
    assert 0 < row["utilisation"] < 1


FAKE_PYTHON = f"""#!/bin/sh
case $1 in -c) echo 2.11;; -m) echo "$@";; *) exec {sys.executable} "$@";; esac
"""


def test_script_passes_its_arguments_to_a_python_with_torch(tmp_path: Path) -> None:
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    command = [ROOT / "tests/gpu/run.sh", "overflow"]
    environment = os.environ | {"PYTHON": str(tmp_path / "python")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "-m tests.gpu overflow\n"
