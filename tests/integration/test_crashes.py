"""SIGKILL at every window of a run; see `crashes.py`, which draws the instants at random: `--kills 200`."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.integration.crashes import Case, Instant, uninterrupted

PUBLISH = "os.rename run/checkpoints/.staging-step_N -> run/checkpoints/step_N"
RETIRE = "os.rename run/checkpoints/step_N -> run/checkpoints/.deleting-step_N/step_N"
REPLACE = "os.rename run/checkpoints/step_N -> run/checkpoints/.replaced-step_N/step_N"

# One start each, in this order; the run gets on in between. (An event is met just before it happens.)
WINDOWS = [
    Instant("file", "open for writing cache/.staging/train.bin"),
    Instant("call", "session: _open_folders ends"),
    Instant("call", "step: OptimizerStep._update", 2),
    Instant("file", "open for writing run/checkpoints/.staging-step_N/manifest.json"),
    Instant("file", PUBLISH),
    Instant("call", "checkpoint: CheckpointManager._publish ends", 2),  # between the rename and the old one's end
    Instant("call", "checkpoint: CheckpointManager.recover"),
    Instant("call", "resume: restore"),
    Instant("file", "os.rename run/metrics.jsonl.new -> run/metrics.jsonl"),
    Instant("file", RETIRE),
    Instant("file", "os.rmdir run/checkpoints/.deleting-step_N/step_N"),
    Instant("call", "evaluation: evaluate", 2),
    Instant("call", "callbacks: LoggingCallback._write", 2),
    Instant("call", "trainer: Trainer._finish"),
    Instant("call", "checkpoint: CheckpointManager.wait ends", 1),
    Instant("file", "open for writing run/status.json.new", 2),
]


def where(instants: list[Instant]) -> list[str]:
    return [instant.label for instant in instants]


@pytest.mark.slow
def test_killed_in_every_window_a_run_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    reference = uninterrupted(tmp_path, 1)
    case = Case(tmp_path / "killed", 1)
    for instant in WINDOWS:
        assert not case.start(instant), f"{instant} was not met"
    assert [hit.where for hit in case.hits] == where(WINDOWS)
    assert case.start()
    case.check(reference)


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    """Stopped within the validation of step 12, which is saved; its checkpoint is then made once more."""
    reference = uninterrupted(tmp_path, 1)
    case = Case(tmp_path / "killed", 1)
    assert not case.start(Instant("call", "evaluation: evaluate", 4, number=signal.SIGTERM))
    assert case.was_stopped
    instants = [
        Instant("file", REPLACE),
        Instant("file", PUBLISH),
        Instant("file", "os.mkdir run/checkpoints/.replaced"),
    ]
    for instant in instants[:2]:
        assert not case.start(instant), f"{instant} was not met"
    assert [hit.where for hit in case.hits] == where(instants[:2])
    assert case.start()
    case.check(reference)


@pytest.mark.slow
def test_started_as_a_user_would_and_killed_at_a_line_of_its_output(tmp_path: Path) -> None:
    reference = uninterrupted(tmp_path, 1)
    case = Case(tmp_path / "killed", 1)
    for line in ("step 6 ", "step 12 "):
        assert not case.start(Instant("line", line), for_real=True)
    assert len(case.hits) == 2
    assert case.start(for_real=True)
    case.check(reference)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_one_of_which_is_killed(tmp_path: Path, rank: int) -> None:
    reference = uninterrupted(tmp_path, 2)
    case = Case(tmp_path / "killed", 2)
    instants = [
        Instant("call", "step: OptimizerStep._update", 5, rank),
        Instant("call", "evaluation: evaluate", 2, rank),
        Instant("call", "session: _check_same_step", 1, rank),
        *([Instant("file", PUBLISH, 1, rank), Instant("file", RETIRE, 1, rank)] if rank == 0 else []),
    ]
    for number, instant in enumerate(instants):
        # As under a launcher, which ends the others; or left to find out by themselves.
        assert not case.start(instant, as_launcher=number % 2 == 0), f"{instant} was not met"
    assert [hit.where for hit in case.hits] == where(instants)
    assert case.start()
    case.check(reference)
