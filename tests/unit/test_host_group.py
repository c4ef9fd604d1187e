"""Processes find each other, exchange values, and fail together."""

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from fundamentallm import create_accelerator
from fundamentallm.distributed import host_group
from fundamentallm.distributed.host_group import HostGroup, agree_on_prefix
from fundamentallm.errors import FundamentaLLMError
from tests.integration.runs import on_processes


def exchange_and_fail(processes: int, folder: str) -> None:
    create_accelerator()
    group, rank = HostGroup(), dist.get_rank()
    assert group.all_gather(f"value {rank}") == [f"value {other}" for other in range(processes)]
    assert group.from_main(lambda: rank) == 0
    expected, text = (FundamentaLLMError, "ZeroDivisionError: of process 1") if rank == 0 else (ZeroDivisionError, "")
    with pytest.raises(expected, match=text), group.barrier_with_errors():  # noqa: PT012
        if rank == 1:
            raise ZeroDivisionError("of process 1")
    with pytest.raises(FundamentaLLMError if rank == 1 else ZeroDivisionError):
        group.from_main(lambda: 1 // 0)
    assert HostGroup(alone=True).all_gather(rank) == [rank]
    Path(folder, f"{rank}").touch()


def test_host_group_exchanges_values_and_errors(tmp_path: Path) -> None:
    on_processes(2, exchange_and_fail, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def form_a_group_without_rank_0(rank: int, port: int, folder: str) -> None:
    """The store is another process's, as that of a launcher is: it outlives rank 0."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    if rank == 0:
        os._exit(1)
    host_group.FORM_SECONDS = 0.5
    with pytest.raises(FundamentaLLMError):
        HostGroup()
    Path(folder, "raised").touch()


def test_host_group_does_not_wait_for_a_dead_process(tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    fork = multiprocessing.get_context("fork")
    started = [
        fork.Process(target=form_a_group_without_rank_0, args=(rank, store.port, str(tmp_path))) for rank in range(2)
    ]
    for process in started:
        process.start()
    started[1].join(100)
    started[1].kill()
    assert (tmp_path / "raised").exists()


def test_host_group_keeps_an_error_if_the_exchange_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    group = HostGroup()
    monkeypatch.setattr(group, "all_gather", lambda value: int("of a dead process"))
    with pytest.raises(ZeroDivisionError):
        group.from_main(lambda: 1 // 0)


# ---- restarted processes find each other, and not the processes that ran before them

WORLD = 3


def start(store: dist.Store, *ranks: int) -> list[str]:
    """Returns the prefix that each of these processes agrees on."""
    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(lambda rank: agree_on_prefix(store, rank, WORLD), ranks))


def test_agree_on_prefix_is_common_and_new_for_each_start() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    prefixes = [start(store, *order) for order in ((0, 1, 2), (2, 1, 0))]
    assert [len(set(agreed)) for agreed in prefixes] == [1, 1]
    assert prefixes[0][0] != prefixes[1][0]


def test_agree_on_prefix_refuses_an_old_or_incomplete_start(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    start(store, 0, 1, 2)
    with monkeypatch.context() as shorter:
        shorter.setattr(host_group, "JOIN_SECONDS", 0.3)
        with pytest.raises(FundamentaLLMError):
            start(store, 1)
        with pytest.raises(FundamentaLLMError):
            start(store, 0, 1)
    # Process 2 answers to the incomplete start first, which process 0 never confirms.
    assert len(set(start(store, 2, 1, 0))) == 1
