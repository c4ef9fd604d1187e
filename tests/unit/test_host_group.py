"""Processes exchange values, and fail together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from fundamentallm import create_accelerator
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import FundamentaLLMError
from tests.integration.runs import on_processes


def exchange_and_fail(processes: int, folder: str) -> None:
    create_accelerator()
    group, rank = HostGroup(), dist.get_rank()
    assert group.all_gather(f"value {rank}") == [f"value {other}" for other in range(processes)]
    assert group.from_main(lambda: rank) == 0
    with pytest.raises(FundamentaLLMError if rank == 0 else ZeroDivisionError), group.barrier_with_errors():  # noqa: PT012
        if rank == 1:
            raise ZeroDivisionError("of process 1")
    with pytest.raises(FundamentaLLMError if rank == 1 else ZeroDivisionError):
        group.from_main(lambda: 1 // 0)
    assert HostGroup(alone=True).all_gather(rank) == [rank]
    Path(folder, f"{rank}").touch()


def test_host_group_exchanges_values_and_errors(tmp_path: Path) -> None:
    on_processes(2, exchange_and_fail, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_host_group_of_one_process_raises_its_own_error() -> None:
    group = HostGroup()
    assert group.all_gather(3) == [3]
    with pytest.raises(ZeroDivisionError):
        group.from_main(lambda: 1 // 0)
