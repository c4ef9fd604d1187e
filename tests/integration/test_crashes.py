"""A run that is killed, at whatever instant, and started again ends as if nothing had happened; see `crashes`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.crashes import die_with_parent

ROOT = Path(__file__).parents[2]


def crash(folder: Path, *arguments: str) -> str:
    """The harness in an interpreter of its own, which has computed nothing yet and can be forked."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "WORLD_SIZE"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.crashes", *arguments], cwd=ROOT, capture_output=True, text=True,
        env=environment | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}, timeout=600, preexec_fn=die_with_parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the harness uses what only Linux has")
@pytest.mark.parametrize(
    "options", [["--processes", "1"], ["--processes", "2"], ["--kind", "adapter"], ["--kind", "stream"]]
)
def test_train_killed_at_chosen_instants_ends_the_same(tmp_path: Path, options: list[str]) -> None:
    if "adapter" in options:
        pytest.importorskip("peft")
    assert "each ended as the uninterrupted one" in crash(tmp_path, "--windows", *options)
