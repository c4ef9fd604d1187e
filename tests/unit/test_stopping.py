"""Signals and clocks only ask; all processes stop at the same poll."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from fundamentallm import create_accelerator
from fundamentallm.run import stopping
from fundamentallm.run.stopping import SIGNALS, Stop, StopSwitch
from tests.integration.runs import on_processes


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_only_asks_and_handlers_are_put_back(name: str) -> None:
    number, switch = getattr(signal, name), StopSwitch()
    mine = [signal.signal(getattr(signal, other), signal.default_int_handler) for other in SIGNALS]
    try:
        with switch.listening():
            os.kill(os.getpid(), number)
            assert (switch.wanted, switch.agreed, switch.reason) == (Stop.SIGNAL, Stop.NO, f"{name} received")
            assert switch.poll() == switch.agreed == Stop.SIGNAL
        assert {signal.getsignal(getattr(signal, other)) for other in SIGNALS} == {signal.default_int_handler}
    finally:
        for other, handler in zip(SIGNALS, mine, strict=True):
            signal.signal(getattr(signal, other), handler)


def test_handlers_are_put_back_after_an_error_too() -> None:
    before = [signal.getsignal(getattr(signal, name)) for name in SIGNALS]
    with pytest.raises(RuntimeError), StopSwitch().listening():
        raise RuntimeError
    assert [signal.getsignal(getattr(signal, name)) for name in SIGNALS] == before


def test_a_second_interrupt_raises_there_and_then(capfd: pytest.CaptureFixture[str]) -> None:
    switch = StopSwitch()
    with switch.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert switch.wanted == Stop.SIGNAL
        assert "Ctrl-C again stops at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_signal_of_a_scheduler_raises_nothing() -> None:
    switch = StopSwitch()
    with switch.listening():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
    assert switch.poll() == Stop.SIGNAL


def test_the_echo_of_an_interrupt_by_a_launcher_is_not_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(stopping, "ECHO_SECONDS", 1e9)
    with StopSwitch().listening():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)


def test_off_the_main_thread_no_handler_is_set() -> None:
    found: list[object] = []

    def listen() -> None:
        with StopSwitch().listening():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_the_gravest_reason_counts_and_of_those_the_first() -> None:
    switch = StopSwitch()
    requests = [(Stop.OUT_OF_TIME, "a"), (Stop.REQUESTED, "b"), (Stop.SIGNAL, "c"), (Stop.SIGNAL, "d")]
    for stop, reason in requests:
        switch.request(stop, reason)
    assert (switch.poll(), switch.reason) == (Stop.SIGNAL, "c")
    switch.begin()
    assert (switch.poll(), switch.reason) == (Stop.NO, "")


class Clock:
    """A clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(stopping.time, "monotonic", lambda: self.now)

    def polls(self, switch: StopSwitch, seconds: float) -> int:
        """How many polls, that far apart, a switch lets pass."""
        for count in range(10_000):
            self.now += seconds
            if switch.poll():
                return count
        pytest.fail("it never stops")


@pytest.mark.parametrize(("to_save", "expected"), [(0.0, 58), (7.0, 51)])
def test_max_minutes_leaves_time_for_a_step_and_for_saving(
    monkeypatch: pytest.MonkeyPatch, to_save: float, expected: int
) -> None:
    clock = Clock(monkeypatch)
    switch = StopSwitch(max_minutes=1)
    switch.begin()
    switch.seconds_to_save = to_save
    assert clock.polls(switch, 1.0) == expected
    assert (switch.wanted, switch.reason) == (Stop.OUT_OF_TIME, "training.max_minutes is over")


# ---- several processes -----------------------------------------------------------------------------------------

ASKED_AT, POLLS = 5, 10


def poll_until_stopped(processes: int, folder: str, by_signal: list[int], settle_at: int | None) -> None:
    """Each process counts its polls until the agreed stop; those in `by_signal` get a signal before the fifth."""
    create_accelerator()
    rank = dist.get_rank()
    assert dist.get_world_size() == processes
    switch = StopSwitch()
    stopped_at = None
    with switch.listening():
        for poll in range(POLLS):
            if poll == ASKED_AT and rank in by_signal:
                os.kill(os.getpid(), signal.SIGUSR1)
            if (switch.settle() if poll == settle_at else switch.poll()) != Stop.NO:
                stopped_at = poll
                break
    ended = {"stopped_at": stopped_at, "agreed": switch.agreed, "reason": switch.reason}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(ended))


@pytest.mark.parametrize(
    ("by_signal", "settle_at", "stopped_at"),
    [([0], None, 6), ([1], None, 6), ([0, 1], None, 6), ([1], 5, 5), ([1], 3, 6), ([], 5, None)],
)
def test_processes_stop_at_the_same_poll_whichever_is_signalled(
    tmp_path: Path, by_signal: list[int], settle_at: int | None, stopped_at: int | None
) -> None:
    """At the poll after the signal; at once where all wait for the answer."""
    on_processes(2, poll_until_stopped, str(tmp_path), by_signal, settle_at)
    for rank in range(2):
        ended = json.loads((tmp_path / f"{rank}.json").read_text())
        assert ended["stopped_at"] == stopped_at
        own = "SIGUSR1 received" if rank in by_signal else "another process received a signal"
        assert ended["reason"] == (own if by_signal else "")
        assert ended["agreed"] == (Stop.SIGNAL if by_signal else Stop.NO)


def fail_on_one(processes: int, folder: str) -> None:
    create_accelerator()
    switch = StopSwitch()
    if dist.get_rank() == 0:
        switch.request(Stop.FAILED, "a checkpoint could not be written")
    assert switch.poll() == Stop.NO
    assert switch.poll() == Stop.FAILED
    assert switch.reason == "a checkpoint could not be written"
    switch.request(Stop.SIGNAL, "too late to be the reason")
    assert switch.poll() == Stop.FAILED
    Path(folder, str(dist.get_rank())).touch()


def test_a_save_that_fails_on_one_process_stops_all(tmp_path: Path) -> None:
    on_processes(2, fail_on_one, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
