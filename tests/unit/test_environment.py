"""The record of a launch: the command that starts it again."""

import sys
from pathlib import Path

import pytest

from fundamentallm.run.folder import command


def test_command_is_what_the_user_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    (script := tmp_path / "fundamentallm").touch(mode=0o755)
    for typed, expected in (
        (
            ["-m", "fundamentallm.train", "--output_dir", "my run"],
            "python -m fundamentallm.train --output_dir 'my run'",
        ),
        ([str(script), "train"], "fundamentallm train"),
        (["train.py"], "python train.py"),
    ):
        monkeypatch.setattr(sys, "orig_argv", ["/somewhere/python", *typed])
        assert command() == expected
