"""Processes that do one thing together, and fail together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from fundamentallm.errors import FundamentaLLMError

T = TypeVar("T")


class Team:
    """The processes of a run, as far as files are concerned; they speak over gloo, so that no device waits.

    Args:
        alone: whether this process is a team of its own, whatever there is besides.
    """

    def __init__(self, alone: bool = False) -> None:
        alone = alone or not dist.is_initialized() or dist.get_world_size() == 1
        # A group of its own, since a thread may use it while the training uses another.
        self._group = None if alone else dist.new_group(backend="gloo")
        self.rank, self.size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())

    def exchange(self, value: T) -> list[T]:
        """Everybody's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        # torch pickles what processes of one run tell each other; nothing of it ever gets to the disk.
        dist.all_gather_object(values, value, self._group)
        return values  # type: ignore[return-value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done inside is done when all have done it; where one fails, all do.

        Raises:
            FundamentaLLMError: on the others, with what the first one to fail had to say.
        """
        failure = None
        try:
            yield
        except BaseException as error:
            failure = error
        said = self.exchange(None if failure is None else f"{failure}")
        if failure is not None:
            raise failure
        for rank, text in enumerate(said):
            if text is not None:
                raise FundamentaLLMError(f"process {rank} of {self.size} failed: {text}")

    def from_first(self, action: Callable[[], T]) -> T:
        """`action()` as the first process does it, on all of them.

        Raises:
            FundamentaLLMError: as `together` does.
        """
        result: T | None = None
        with self.together():
            if self.rank == 0:
                result = action()
        return self.exchange(result)[0]  # type: ignore[return-value]
