"""Stopping before the end: signals, the clock and requests, agreed on by all processes at the same step."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
"""Those that end a run at its next step, saved. (Schedulers send SIGUSR1, or SIGTERM, some time before SIGKILL.)"""
ECHO_SECONDS = 1.0
"""Under a launcher, one Ctrl-C arrives twice: from the terminal, and passed on by the launcher."""


class Stop(IntEnum):
    """Why a run stops before its end; of several reasons the largest counts."""

    NO = 0
    REQUESTED = 1
    """By a callback, or early stopping."""
    OUT_OF_TIME = 2
    SIGNAL = 3
    FAILED = 4
    """A checkpoint could not be written."""


REASONS = {
    Stop.REQUESTED: "another process asked for it",
    Stop.OUT_OF_TIME: "training.max_minutes is over",
    Stop.SIGNAL: "another process received a signal",
    Stop.FAILED: "a checkpoint could not be written",
}


class StopSwitch:
    """Whether, and why, to stop: what this process wants, and what all of them have agreed on.

    Processes agree on the host, over gloo: an accelerator never waits. The answer to a `poll` is that of the
    poll before, exchanged while the step was computed, so that nobody waits for it either.

    Args:
        max_minutes: from `begin` on; None: without limit.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.wanted, self.agreed, self.reason = Stop.NO, Stop.NO, ""
        self.seconds_to_save = 0.0  # kept free before the time is over
        self._max_minutes = max_minutes
        self._deadline = math.inf
        self.polled_at = time.monotonic()
        """When the training last moved on: by a step, or by a batch of a validation."""
        self._on_their_way: tuple[torch.Tensor, Any] | None = None
        self._several = dist.is_initialized() and dist.get_world_size() > 1
        # The default group is used where it is gloo's already.
        self._group = dist.new_group(backend="gloo") if self._several and dist.get_backend() != "gloo" else None

    def request(self, stop: Stop, reason: str) -> None:
        """Ask for a stop; of several reasons the gravest, and of those the first, is remembered."""
        if stop > self.wanted:
            self.wanted, self.reason = stop, reason

    def begin(self) -> None:
        """Start the clock, and forget every reason, also one on its way: a stopped run may begin again."""
        self._collect()
        self.polled_at = time.monotonic()
        self._deadline = math.inf if self._max_minutes is None else self.polled_at + 60 * self._max_minutes
        self.wanted, self.agreed, self.reason = Stop.NO, Stop.NO, ""

    def poll(self) -> Stop:
        """Whether all processes stop here; what one of them wants now is the answer to the next poll of all.

        On a single process, what it wants now.
        """
        now = time.monotonic()
        since_last, self.polled_at = now - self.polled_at, now
        if now + since_last + self.seconds_to_save >= self._deadline:
            self.request(Stop.OUT_OF_TIME, REASONS[Stop.OUT_OF_TIME])
        if not self._several:
            return self._conclude(self.wanted)
        answer = self._collect()
        wanted = torch.tensor(int(self.wanted))
        self._on_their_way = wanted, dist.all_reduce(wanted, dist.ReduceOp.MAX, self._group, async_op=True)
        return self._conclude(answer)

    def settle(self) -> Stop:
        """Like `poll`, and waits for what all processes want now: for where a request has just been made."""
        self.poll()
        return self._conclude(self._collect()) if self._several else self.agreed

    def _collect(self) -> Stop:
        if self._on_their_way is None:
            return Stop.NO
        value, work = self._on_their_way
        work.wait()
        self._on_their_way = None
        return Stop(int(value))

    def _conclude(self, stop: Stop) -> Stop:
        self.agreed = max(self.agreed, stop)
        if self.agreed > self.wanted:  # another process's
            self.wanted, self.reason = self.agreed, REASONS[self.agreed]
        return self.agreed

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile, `SIGNALS` ask for a stop; a second Ctrl-C raises KeyboardInterrupt, there and then."""
        if threading.current_thread() is not threading.main_thread():  # only it may set handlers
            yield
            return
        interrupted_at: float | None = None
        shortest = ECHO_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

        def handle(number: int, frame: FrameType | None) -> None:
            nonlocal interrupted_at
            if number == signal.SIGINT:
                if interrupted_at is not None and time.monotonic() - interrupted_at >= shortest:
                    raise KeyboardInterrupt
                if interrupted_at is None and os.environ.get("RANK", "0") == "0":
                    # Not by print, which the signal may have found in the middle of a line.
                    os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")
                interrupted_at = interrupted_at or time.monotonic()
            self.request(Stop.SIGNAL, f"{signal.Signals(number).name} received")

        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        # What somebody set to be ignored stays so: a shell does it for the Ctrl-C of its background jobs.
        heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, handle) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
