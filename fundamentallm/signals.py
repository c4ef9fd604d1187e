"""The signals that end a command, and a run after its current step."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from fundamentallm.errors import Interrupted

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
"""Schedulers send SIGTERM or SIGUSR1 some time before SIGKILL. SIGHUP means that the terminal was closed."""
ECHO_SECONDS = 1.0
"""A launcher forwards Ctrl-C to processes that got it from the terminal too. A signal within this time is that copy."""
_received: list[tuple[int, float]] = []
"""(number, time) of the last signal that raised. An exception in a destructor is lost, but not this."""


@contextlib.contextmanager
def handling_signals(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handles `SIGNALS` in the block. Off the main thread, where Python allows no handlers, it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in SIGNALS]
    # An ignored signal stays ignored: a shell ignores Ctrl-C for its background jobs, and nohup ignores SIGHUP.
    previous = {n: signal.signal(n, handle) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raises Interrupted in the block when one of `SIGNALS` arrives, so that temporary files are removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not _received or now - _received[-1][1] >= ECHO_SECONDS:
            _received[:] = [(number, now)]
            raise Interrupted(number)

    try:
        with handling_signals(interrupt):
            yield
    finally:
        _received.clear()


def raise_if_interrupted() -> None:
    """Raises Interrupted if the one that a signal raised in `ended_by_signals` was lost."""
    if _received:
        raise Interrupted(_received.pop()[0])
