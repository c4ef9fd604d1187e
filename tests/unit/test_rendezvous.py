"""Restarted processes find each other, and not the processes that ran before them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from fundamentallm.distributed import rendezvous
from fundamentallm.distributed.rendezvous import agree_on_prefix
from fundamentallm.errors import FundamentaLLMError

WORLD = 3


@pytest.fixture(autouse=True)
def _short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 20.0)


def start(store: dist.Store, *ranks: int) -> list[str]:
    """Returns the prefix that each of these processes agrees on."""
    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(lambda rank: agree_on_prefix(store, rank, WORLD), ranks))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_agree_on_prefix_is_common_and_new_for_each_start(order: tuple[int, ...]) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    prefixes = [start(store, *order) for _ in range(3)]
    assert [len(set(agreed)) for agreed in prefixes] == [1, 1, 1]
    assert len({agreed[0] for agreed in prefixes}) == 3


def test_agree_on_prefix_skips_a_start_that_was_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 2 answers to the old prefix first, which process 0 never confirms."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    with monkeypatch.context() as shorter:
        shorter.setattr(rendezvous, "JOIN_SECONDS", 0.3)
        with pytest.raises(FundamentaLLMError, match=r"\[2\] of 3"):
            start(store, 0, 1)
    assert len(set(start(store, 2, 1, 0))) == 1


def test_agree_on_prefix_refuses_that_of_an_earlier_start(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    start(store, 0, 1, 2)
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 0.3)
    with pytest.raises(FundamentaLLMError, match="process 1 of 3 waited"):
        start(store, 1)
