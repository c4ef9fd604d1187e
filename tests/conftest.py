"""Shared by all tests: one thread, a cache of their own, a fresh accelerate state for each, hypothesis' profiles."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hypothesis import HealthCheck, settings

from fundamentallm.errors import ConfigError, Problem

# More threads than cores (pytest beside anything else) make OpenMP spin: seconds instead of milliseconds a step.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# A shell ignores them for background jobs, and nohup for all jobs. Runs would ignore them too, and tests would fail.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Property tests take a second or two each in CI, where the same examples come every time; by hand,
# HYPOTHESIS_PROFILE=thorough draws new ones, 250 times as many. Examples of both make real runs, and share the
# fixtures of their test. What hangs is ended by `time_limit` of each test, which says where; hypothesis' own deadline
# would call a busy machine a failure.
COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
}
settings.register_profile("ci", derandomize=True, database=None, print_blob=True, max_examples=40, **COMMON)
settings.register_profile("thorough", max_examples=10_000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


ELSEWHERE = {
    *("test_compile", "test_crashes", "test_estimated_memory", "test_gpu_checks", "test_hostile_checkpoints"),
    *("test_hostile_input", "test_launching", "test_layouts", "test_preemption", "test_processes", "test_sharding"),
    "test_watchdog",
}
"""Modules whose tests work in processes that coverage does not see, or repeat what others cover many times over: it
would take a third more time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks real runs as slow: `-m "not slow"` leaves the tests of single modules, which take a minute."""
    for item in items:
        if item.path.stem in ELSEWHERE or item.get_closest_marker("slow"):
            item.add_marker("no_cover")
        if "integration" in item.path.parts:
            item.add_marker("slow")


@pytest.fixture(autouse=True, scope="module")
def _few_objects_to_collect() -> None:
    """What is there already is not looked through again: after a few hundred tests, each collection took a second."""
    gc.collect()
    gc.freeze()


class Blank:
    """A figure without content."""

    def savefig(self, path: Any, **_: Any) -> None:
        open(path, "wb").close()


@pytest.fixture(autouse=True, scope="module")
def _blank_curves(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs write an empty curves.png, except in tests of it: drawing takes longer than a short run."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem not in ("test_curves", "test_run_view"):
            patch.setattr("fundamentallm.training.callbacks.curves.draw", lambda *_: Blank())
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokenized text of tests never lands in the user's cache; one folder serves the whole session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


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


def problem_of(make: Callable[..., object], *arguments: Any, **settings: Any) -> Problem:
    """Returns the only problem that the call reports."""
    with pytest.raises(ConfigError) as error:
        make(*arguments, **settings)
    (problem,) = error.value.problems
    return problem


def nested(given: dict[str, Any]) -> dict[str, Any]:
    """Returns dotted settings as nested mappings."""
    values: dict[str, Any] = {}
    for name, value in given.items():
        section, _, key = name.rpartition(".")
        target = values.setdefault(section, {}) if section else values
        if isinstance(target, dict):
            target[key] = value
    return values
