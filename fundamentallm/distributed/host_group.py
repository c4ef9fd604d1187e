"""Groups of processes: they find each other, and exchange values and errors on the host."""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fundamentallm.errors import FundamentaLLMError

T = TypeVar("T")

JOIN_SECONDS = 600.0  # for all processes to start: machines do not start at the same time
FORM_SECONDS = 120.0  # for the processes to form a group: one of them may have died since the last exchange


def join_group(cpu: bool) -> None:
    """Forms the process group if the launcher keeps one store across restarts; otherwise accelerate forms it.

    In that store torch 2.13 would find the addresses of dead processes, so each start gives its keys another prefix.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    rank, address = int(os.environ["RANK"]), (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store = dist.TCPStore(*address, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
    own = dist.PrefixStore(agree_on_prefix(store, rank, world), store)  # type: ignore[attr-defined]
    device = None if cpu else torch.accelerator.current_accelerator(check_available=True)
    backend = "gloo" if device is None else dist.get_default_backend_for_device(device)  # as accelerate chooses it
    dist.init_process_group(backend, store=own, rank=rank, world_size=world)


def agree_on_prefix(store: Any, rank: int, world: int) -> str:
    """Returns a prefix that all processes of this start agree on, and that no earlier start had.

    Process 0 invents it, and confirms it once all have answered. A process whose rank has answered to a prefix before
    waits for another: that was an earlier start. (Machines count their restarts apart.) Raises FundamentaLLMError if a
    process does not join in time.
    """
    deadline, prefix, is_first = time.monotonic() + JOIN_SECONDS, "", False
    if rank == 0:
        store.set("start", uuid.uuid4().hex)
    while time.monotonic() < deadline:
        time.sleep(0.05)
        newest = str(store.get("start"), "ascii") if store.check(["start"]) else ""
        if newest != prefix:
            prefix, is_first = newest, store.add(f"{newest}/{rank}", 1) == 1
        if rank == 0 and store.check([f"{prefix}/{other}" for other in range(world)]):
            store.set(f"{prefix}/confirmed", "")
        if is_first and store.check([f"{prefix}/confirmed"]):
            return prefix
    raise FundamentaLLMError(f"process {rank}: some of {world} processes did not start within {JOIN_SECONDS:g} s.")


class HostGroup:
    """All processes of the run (`alone`: this one), in a gloo group of their own, so that no device has to wait.

    Each thread needs its own, since collectives of two threads in one group would mix. Raises FundamentaLLMError if
    another process has died. An exchange waits for the slowest process up to `hours`.
    """

    def __init__(self, alone: bool = False, hours: float = 0.5) -> None:
        self.rank, self.size = 0, 1
        if not alone and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            # torch waits for a dead process as long as for a slow collective, half an hour: try a shorter timeout first
            try:
                dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(seconds=FORM_SECONDS)))
            except RuntimeError as error:
                raise FundamentaLLMError(f"another process has died, or did not start in time: {error}") from error
            self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=hours))

    def all_gather(self, value: T) -> list[T]:
        """Returns the values of all processes, ordered by rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        # torch pickles the objects. The processes of one run trust each other, and nothing of this reaches a file.
        dist.all_gather_object(values, value, self._group)
        return values  # type: ignore[return-value]

    @contextmanager
    def barrier_with_errors(self) -> Iterator[None]:
        """Returns once all processes have left the block. If one raised, the others raise FundamentaLLMError."""
        try:
            yield
        except BaseException as error:
            name = "" if isinstance(error, FundamentaLLMError) else f"{type(error).__name__}: "
            with suppress(Exception):  # another process may have died
                self.all_gather(f"{name}{error}")
            raise
        for rank, text in enumerate(self.all_gather("")):
            if text:
                raise FundamentaLLMError(f"process {rank} of {self.size} failed: {text}")

    def from_main(self, action: Callable[[], T]) -> T:
        """Runs `action` on the main process and returns its result on all processes. Errors as in the barrier."""
        result: T | None = None
        with self.barrier_with_errors():
            if self.rank == 0:
                result = action()
        return self.all_gather(result)[0]  # type: ignore[return-value]
