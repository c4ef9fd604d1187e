"""Signals and the time limit request a stop; all processes stop at the same poll."""

import contextlib
import os
import signal
import threading

import pytest

from fundamentallm import signals
from fundamentallm.errors import Interrupted, exit_code
from fundamentallm.run import session
from fundamentallm.run.session import Stop, StopSwitch
from fundamentallm.signals import SIGNALS, ended_by_signals


@pytest.mark.parametrize("name", SIGNALS)
def test_handling_signals_requests_a_stop_and_restores_handlers(name: str) -> None:
    number, switch = getattr(signal, name), StopSwitch()
    mine = [signal.signal(getattr(signal, other), signal.default_int_handler) for other in SIGNALS]
    try:
        with contextlib.suppress(RuntimeError), switch.handling_signals():
            os.kill(os.getpid(), number)
            assert (switch.wanted, switch.agreed, switch.reason) == (Stop.SIGNAL, Stop.NO, f"{name} received")
            assert switch.poll() == switch.agreed == Stop.SIGNAL
            raise RuntimeError  # handlers are restored after an error too
        assert {signal.getsignal(getattr(signal, other)) for other in SIGNALS} == {signal.default_int_handler}
    finally:
        for other, handler in zip(SIGNALS, mine, strict=True):
            signal.signal(getattr(signal, other), handler)


def test_handling_signals_leaves_ignored_signals_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSwitch().handling_signals():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_handling_signals_second_interrupt_raises_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    switch = StopSwitch()
    with switch.handling_signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert switch.wanted == Stop.SIGNAL
        assert "Ctrl-C again to quit without saving" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handling_signals_interrupt_forwarded_by_launcher_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(signals, "ECHO_SECONDS", 1e9)
    with StopSwitch().handling_signals():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)


def test_ended_by_signals_raises_and_restores_handlers() -> None:
    before = {other: signal.getsignal(getattr(signal, other)) for other in SIGNALS}
    with pytest.raises(Interrupted) as interrupt, ended_by_signals():
        signal.raise_signal(signal.SIGHUP)
    assert exit_code(interrupt.value) == 128 + signal.SIGHUP
    assert {other: signal.getsignal(getattr(signal, other)) for other in SIGNALS} == before


def test_ended_by_signals_copy_from_the_launcher_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end the removal of temporary files."""
    monkeypatch.setattr(signals, "ECHO_SECONDS", 1e9)
    removed = False
    with contextlib.suppress(Interrupted), ended_by_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            removed = True
    assert removed


def test_handling_signals_raises_an_interruption_that_was_lost() -> None:
    """Python ignores an exception in a destructor, of which an import runs many."""
    with ended_by_signals():
        with contextlib.suppress(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted), StopSwitch().handling_signals():
            pass


def test_handling_signals_of_a_trial_ends_at_once() -> None:
    switch = StopSwitch()
    switch.ends_at_once = True
    with pytest.raises(Interrupted), ended_by_signals(), switch.handling_signals():
        signal.raise_signal(signal.SIGTERM)


def test_handling_signals_off_the_main_thread_sets_no_handler() -> None:
    found: list[object] = []

    def record_handler() -> None:
        with StopSwitch().handling_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=record_handler)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_request_keeps_the_largest_reason_and_the_first_of_equals() -> None:
    switch = StopSwitch()
    requests = [(Stop.OUT_OF_TIME, "a"), (Stop.REQUESTED, "b"), (Stop.SIGNAL, "c"), (Stop.SIGNAL, "d")]
    for stop, reason in requests:
        switch.request(stop, reason)
    assert (switch.poll(), switch.reason) == (Stop.SIGNAL, "c")
    switch.begin()
    assert (switch.poll(), switch.reason) == (Stop.NO, "")


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(session.time, "monotonic", lambda: self.now)

    def polls(self, switch: StopSwitch, seconds: float) -> int:
        """Returns how many polls, so many seconds apart, come before the stop."""
        for count in range(10_000):
            self.now += seconds
            if switch.poll():
                return count
        pytest.fail("no stop")


@pytest.mark.parametrize(("to_save", "expected"), [(0.0, 58), (7.0, 51)])
def test_poll_max_minutes_leaves_time_for_a_step_and_a_save(
    monkeypatch: pytest.MonkeyPatch, to_save: float, expected: int
) -> None:
    clock = Clock(monkeypatch)
    switch = StopSwitch(max_minutes=1)
    switch.begin()
    switch.seconds_to_save = to_save
    assert clock.polls(switch, 1.0) == expected
    assert (switch.wanted, switch.reason) == (Stop.OUT_OF_TIME, "training.max_minutes is over")
