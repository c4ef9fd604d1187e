"""Forming one group of the processes that a launcher has started, also when it starts them again."""

from __future__ import annotations

import os
import time
import uuid
from typing import Any

import torch
import torch.distributed as dist

from fundamentallm.errors import FundamentaLLMError

JOIN_SECONDS = 600.0
"""For all processes to have come; machines do not start at once."""


def join_group(cpu: bool) -> None:
    """Form the process group, where a launcher keeps one store for all the starts of its processes.

    It outlives them, and torch 2.13 would find there what processes that are dead have written, such as their
    addresses. So each start is given keys of its own. (Not by TORCHELASTIC_RESTART_COUNT, which each machine counts for
    itself.) Elsewhere accelerate will form it.

    Args:
        cpu: whether to compute on the CPU.

    Raises:
        FundamentaLLMError: if not all processes come.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if world == 1 or not keeps_store or dist.is_initialized():
        return
    rank, address = int(os.environ["RANK"]), (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store = dist.TCPStore(*address, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
    own = dist.PrefixStore(agree_on_start(store, rank, world), store)  # type: ignore[attr-defined]
    dist.init_process_group(_backend(cpu), store=own, rank=rank, world_size=world)


def _backend(cpu: bool) -> str:
    """What accelerate would choose."""
    device = None if cpu else torch.accelerator.current_accelerator()
    return "gloo" if device is None else dist.get_default_backend_for_device(device)


def agree_on_start(store: Any, rank: int, world: int) -> str:
    """A name for this start of the processes, which all of them agree on, and none before them had.

    The first process invents it, and gives the word when all others have answered to it. A process that meets a name
    to which one of its rank has answered before, meets an earlier start's, and looks again.

    Raises:
        FundamentaLLMError: if not all processes come.
    """
    if rank == 0:
        name = uuid.uuid4().hex
        store.set("start", name)
        _await(store, [f"{name}/{other}" for other in range(1, world)])
        store.set(f"{name}/go", "")
        return name
    first_to_answer: dict[str, bool] = {}
    deadline = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < deadline:
        if store.check(["start"]):
            name = str(store.get("start"), "ascii")
            if name not in first_to_answer:
                first_to_answer[name] = store.add(f"{name}/{rank}", 1) == 1
            if first_to_answer[name] and store.check([f"{name}/go"]):
                return name
        time.sleep(0.05)
    raise FundamentaLLMError(f"process {rank} of {world} waited {JOIN_SECONDS:g} s for process 0 to form the group.")


def _await(store: Any, keys: list[str]) -> None:
    deadline = time.monotonic() + JOIN_SECONDS
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = [key.rpartition("/")[2] for key in keys if not store.check([key])]
            raise FundamentaLLMError(f"the group waited {JOIN_SECONDS:g} s for processes {', '.join(missing)} to join.")
        time.sleep(0.05)
