"""A group of processes that exchange values and errors on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from fundamentallm.errors import FundamentaLLMError

T = TypeVar("T")

FORM_SECONDS = 120.0
"""Timeout for the processes to form a group: one of them may have died since the last exchange."""


class HostGroup:
    """All processes of the run, connected by a gloo group of their own, so that no device has to wait.

    Each thread needs its own HostGroup, since collectives of two threads in one group would mix.

    Args:
        alone: use this process only, even if it belongs to a process group.

    Raises:
        FundamentaLLMError: if another process has died.
    """

    def __init__(self, alone: bool = False) -> None:
        alone = alone or not dist.is_initialized() or dist.get_world_size() == 1
        if not alone:
            # torch waits for a dead process as long as for a slow collective, half an hour, so a group with a shorter
            # timeout goes ahead.
            try:
                ahead = dist.new_group(backend="gloo", timeout=timedelta(seconds=FORM_SECONDS))
                dist.barrier(ahead)
            except RuntimeError as error:
                raise FundamentaLLMError(f"another process has died, or did not start in time: {error}") from error
        self._group = None if alone else dist.new_group(backend="gloo")
        self.rank, self.size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())

    def all_gather(self, value: T) -> list[T]:
        """Returns the values of all processes, ordered by rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        # torch.distributed pickles objects that the processes of one run exchange. They trust each other, and nothing
        # of this reaches a file.
        dist.all_gather_object(values, value, self._group)
        return values  # type: ignore[return-value]

    @contextmanager
    def barrier_with_errors(self) -> Iterator[None]:
        """Barrier with error propagation.

        Returns once every process has left the block, and raises on all of them if one raised.

        Raises:
            FundamentaLLMError: on the processes that did not raise, with the message of the first one that did.
        """
        failure, message = None, None
        try:
            yield
        except BaseException as error:
            name = "" if isinstance(error, FundamentaLLMError) else f"{type(error).__name__}: "
            failure, message = error, f"{name}{error}"
        try:
            messages = self.all_gather(message)
        finally:
            if failure is not None:
                raise failure  # also if the exchange fails, since another process has died
        for rank, text in enumerate(messages):
            if text is not None:
                raise FundamentaLLMError(f"process {rank} of {self.size} failed: {text}")

    def from_main(self, action: Callable[[], T]) -> T:
        """Runs `action` on the main process and returns its result on all processes.

        Raises:
            FundamentaLLMError: as `barrier_with_errors` does.
        """
        result: T | None = None
        with self.barrier_with_errors():
            if self.rank == 0:
                result = action()
        return self.all_gather(result)[0]  # type: ignore[return-value]
