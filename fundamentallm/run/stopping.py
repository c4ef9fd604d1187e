"""Stopping a run early: signals, a time limit and requests, which take effect on all processes at the same step."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from fundamentallm import signals


class Stop(IntEnum):
    """Reason to stop a run before its end. If there are several, the largest counts."""

    NO, REQUESTED, OUT_OF_TIME, SIGNAL, FAILED = range(5)


REASONS = {
    Stop.REQUESTED: "another process requested it",
    Stop.OUT_OF_TIME: "training.max_minutes is over",
    Stop.SIGNAL: "another process received a signal",
    Stop.FAILED: "a checkpoint could not be written",
}


class StopSwitch:
    """Collects requests to stop, and agrees on them with the other processes over gloo: no device has to wait."""

    def __init__(self, max_minutes: float | None = None) -> None:
        self.wanted = Stop.NO  # the largest reason that this process knows
        self.reason = ""  # in words
        self.agreed = Stop.NO  # by all processes
        self.polls = 0  # equal on all processes that have come equally far
        self.ends_at_once = False  # on a signal, unsaved
        self.seconds_to_save = 0.0  # time that max_minutes has to leave for the last save
        self._max_minutes = max_minutes
        self._deadline = math.inf
        self._polled_at = time.monotonic()
        self._pending: tuple[torch.Tensor, Any] | None = None  # the all-reduce that the last poll began
        self._several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if self._several and dist.get_backend() != "gloo" else None

    def request(self, stop: Stop, reason: str) -> None:
        """Asks all processes to stop. The largest reason is kept, and of equal ones the first."""
        if stop > self.wanted:
            self.wanted, self.reason = stop, reason

    def begin(self) -> None:
        """Starts the clock and drops every earlier request, so that a stopped run can train again."""
        self._answer()
        self._polled_at = time.monotonic()
        self._deadline = math.inf if self._max_minutes is None else self._polled_at + 60 * self._max_minutes
        self.wanted, self.agreed, self.reason = Stop.NO, Stop.NO, ""

    def poll(self) -> Stop:
        """Returns the decision agreed at the previous poll and starts an asynchronous all-reduce for the next one.

        A request therefore takes effect one step later. On a single process it takes effect at once.
        """
        now = time.monotonic()
        since_last, self._polled_at = now - self._polled_at, now
        self.polls += 1
        if now + since_last + self.seconds_to_save >= self._deadline:
            self.request(Stop.OUT_OF_TIME, REASONS[Stop.OUT_OF_TIME])
        if not self._several:
            self.agreed = self.wanted
            return self.agreed
        decision, wanted = self._answer(), torch.tensor(int(self.wanted))
        self._pending = wanted, dist.all_reduce(wanted, dist.ReduceOp.MAX, self._group, async_op=True)
        return decision

    def settle(self) -> Stop:
        """Polls and waits for the answer, so that a request takes effect at once on all processes."""
        self.poll()
        return self._answer()

    def _answer(self) -> Stop:
        """Waits for the all-reduce that the last poll began. Returns the decision."""
        if self._pending is not None:
            value, work = self._pending
            work.wait()
            self._pending, self.agreed = None, max(self.agreed, Stop(int(value)))
            if self.agreed > self.wanted:
                self.request(self.agreed, REASONS[self.agreed])
        return self.agreed

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Requests a stop when one of `signals.SIGNALS` arrives. A second Ctrl-C raises KeyboardInterrupt at once."""
        signals.raise_if_interrupted()
        if self.ends_at_once:  # the command that started the run handles signals
            yield
            return
        interrupted_at: list[float] = []
        echo_seconds = signals.ECHO_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

        def handle(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT:
                if interrupted_at and time.monotonic() - interrupted_at[0] >= echo_seconds:
                    raise KeyboardInterrupt
                if not interrupted_at and os.environ.get("RANK", "0") == "0":
                    with suppress(OSError):  # os.write, since the signal may interrupt a print
                        os.write(2, b"\nfinishing this step, then saving... (Ctrl-C again to quit without saving)\n")
                interrupted_at.append(time.monotonic())
            self.request(Stop.SIGNAL, f"{signal.Signals(number).name} received")

        with signals.handling_signals(handle):
            yield
