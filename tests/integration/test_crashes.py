"""A run that is killed, at whatever instant, and started again ends as if nothing had happened; see `crashes`."""

import sys
from pathlib import Path

import pytest

from tests.integration.crashes import WINDOWS, kill_in_windows


@pytest.mark.skipif(sys.platform != "linux", reason="the harness uses what only Linux has")
@pytest.mark.parametrize("name", WINDOWS)
def test_train_killed_at_chosen_instants_ends_the_same(tmp_path: Path, name: str) -> None:
    if name == "adapter":
        pytest.importorskip("peft")
    assert kill_in_windows(tmp_path, name).hits
