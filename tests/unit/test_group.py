"""Processes that a launcher starts again find each other, and not those that were before them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from fundamentallm.distributed import rendezvous as group
from fundamentallm.distributed.rendezvous import agree_on_start
from fundamentallm.errors import FundamentaLLMError

WORLD = 3


@pytest.fixture(autouse=True)
def _bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "JOIN_SECONDS", 20.0)


def start(store: dist.Store, *ranks: int) -> list[str]:
    """The name that each of these processes agrees to."""
    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(lambda rank: agree_on_start(store, rank, WORLD), ranks))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_each_start_has_a_name_of_its_own_that_all_agree_on(order: tuple[int, ...]) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    names = [start(store, *order) for _ in range(3)]
    assert [len(set(agreed)) for agreed in names] == [1, 1, 1]
    assert len({agreed[0] for agreed in names}) == 3


def test_a_start_that_was_never_complete_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that died before it answered answers, started again, to the old name first: nobody gives the word."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    with monkeypatch.context() as shorter:
        shorter.setattr(group, "JOIN_SECONDS", 0.3)
        with pytest.raises(FundamentaLLMError, match="for processes 2 to join"):
            start(store, 0, 1)
    assert len(set(start(store, 2, 1, 0))) == 1


def test_a_process_that_nobody_joins_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "JOIN_SECONDS", 0.1)
    with pytest.raises(FundamentaLLMError, match=r"process 1 of 3 waited 0.1 s for process 0"):
        start(dist.HashStore(), 1)  # type: ignore[attr-defined]
