"""Shared by all tests: one thread, a cache of their own, and a fresh accelerate state for each."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

# More threads than cores (pytest beside anything else) make OpenMP spin: seconds instead of milliseconds a step.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenized text of tests never lands in the user's cache; one folder serves the whole session."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def reset_accelerate() -> None:
    """Forget accelerate's process-wide state, which refuses a second precision and is inherited by forks."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> Iterator[None]:
    yield
    reset_accelerate()


@pytest.fixture
def text() -> str:
    """Twenty thousand characters of English prose."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())[:20_000]
