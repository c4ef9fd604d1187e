"""The checks for a GPU run, as far as a CPU can show it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.gpu import main as measure_speed
from tests.gpu.__main__ import main
from tests.gpu.checks import CHECKS, described
from tests.gpu.runs import Runs

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_main_on_a_cpu_reports_the_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["gpu", "--device", "cpu", "--output", str(tmp_path / "gpu.json"), "overflow", "sharded"]
    monkeypatch.setattr("sys.argv", command)
    assert main() == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["machine"].keys() >= {"device", "torch", "accelerate"}
    found = {finding["name"]: finding["status"] for finding in results["checks"]}
    assert found == {"overflow": "passed", "sharded": "skipped"}
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in found)


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


@pytest.mark.slow
def test_speed_on_a_cpu_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "gpu_speed.json"
    assert measure_speed(["--device", "cpu", "--output", str(output), "GPT-2 124M, uncompiled"]) == 0
    (row,) = json.loads(output.read_text())["rows"].values()
    assert row["tokens_per_second"] > 0
    assert 0 < row["utilisation"] < 1


def test_main_reports_a_failed_check_and_runs_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(runs: Runs) -> str:
        """Fails."""
        raise AssertionError("a loss of 7")

    def passes(runs: Runs) -> str:
        """Passes."""
        return f"on {runs.device}"

    monkeypatch.setattr("tests.gpu.__main__.CHECKS", {"fails": fails, "passes": passes})
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--output", str(tmp_path / "gpu.json")])
    assert main() == 1
    reported = [
        (finding["status"], finding["text"]) for finding in json.loads((tmp_path / "gpu.json").read_text())["checks"]
    ]
    assert reported == [("FAILED", "AssertionError: a loss of 7"), ("passed", "on cpu")]
    assert "FAILED: AssertionError: a loss of 7" in capsys.readouterr().out


@pytest.mark.parametrize("name", CHECKS)
def test_checks_have_a_description(name: str) -> None:
    assert described(CHECKS[name]).endswith(".")
