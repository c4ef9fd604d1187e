"""Forms the process group when a launcher restarts processes."""

from __future__ import annotations

import os
import time
import uuid
from typing import Any

import torch
import torch.distributed as dist

from fundamentallm.errors import FundamentaLLMError

JOIN_SECONDS = 600.0
"""Timeout for all processes to join: machines do not start at the same time."""


def join_group(cpu: bool) -> None:
    """Forms the process group if the launcher keeps one store across restarts; otherwise accelerate forms it.

    In that store torch 2.13 would find the addresses of dead processes, so each start gives its keys another prefix.
    TORCHELASTIC_RESTART_COUNT cannot be that prefix, since each machine counts for itself.

    Raises:
        FundamentaLLMError: if a process does not join in time.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if world == 1 or not keeps_store or dist.is_initialized():
        return
    rank, address = int(os.environ["RANK"]), (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store = dist.TCPStore(*address, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
    own = dist.PrefixStore(agree_on_prefix(store, rank, world), store)  # type: ignore[attr-defined]
    device = None if cpu else torch.accelerator.current_accelerator()
    backend = "gloo" if device is None else dist.get_default_backend_for_device(device)  # as accelerate chooses it
    dist.init_process_group(backend, store=own, rank=rank, world_size=world)


def agree_on_prefix(store: Any, rank: int, world: int) -> str:
    """Returns a prefix that all processes of this start agree on, and that no earlier start had.

    Process 0 invents a prefix and confirms it once all others have answered. A process whose rank has already answered
    to a prefix knows that it belongs to an earlier start, and waits for another.

    Raises:
        FundamentaLLMError: if a process does not join in time.
    """
    deadline = time.monotonic() + JOIN_SECONDS
    if rank == 0:
        prefix, missing = uuid.uuid4().hex, set(range(1, world))
        store.set("start", prefix)
        while missing and time.monotonic() < deadline:
            time.sleep(0.05)
            missing = {other for other in missing if not store.check([f"{prefix}/{other}"])}
        if not missing:
            store.set(f"{prefix}/confirmed", "")
            return prefix
        raise FundamentaLLMError(f"processes {sorted(missing)} of {world} did not start within {JOIN_SECONDS:g} s.")
    is_first_answer: dict[str, bool] = {}
    while time.monotonic() < deadline:
        time.sleep(0.05)
        if store.check(["start"]):
            prefix = str(store.get("start"), "ascii")
            if prefix not in is_first_answer:
                is_first_answer[prefix] = store.add(f"{prefix}/{rank}", 1) == 1
            if is_first_answer[prefix] and store.check([f"{prefix}/confirmed"]):
                return prefix
    raise FundamentaLLMError(f"process {rank} of {world} waited {JOIN_SECONDS:g} s for process 0 to start.")
