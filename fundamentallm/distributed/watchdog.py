"""Names the process of a run that is lost, or that the other processes wait for.

Each process has a thread that sends heartbeats to a TCPStore that process 0 serves, and reads those of all.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from enum import IntEnum
from typing import Any, NamedTuple

import torch.distributed as dist

from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import ProcessLostError

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
LOST_SECONDS = 5.0  # without a heartbeat, once a process has failed
STORE_SECONDS = 10.0  # timeout of a request
GONE = "is gone: killed, or its machine is lost"


class Phase(IntEnum):
    """What a process is doing. The last is validating, saving, agreeing to stop."""

    STARTING, LOADING, COMPUTING, FINISHING = range(4)


class _Beat(NamedTuple):
    time: float  # by its own clock: an equal beat is an old one
    place: list[int]
    error: str  # why the process fails
    is_done: bool  # whether the process has left, or knows that one has failed


class Watchdog:
    """Watches the processes of a group from entering to leaving its context.

    `place` returns where this process is: its optimizer steps, its polls (steps and validation batches: the same on
    processes that are equally far) and its phase. It is called from another thread. A hang is reported after
    `hang_minutes` without progress on any process; None: never.
    """

    def __init__(
        self, place: Callable[[], tuple[int, int, Phase]], hang_minutes: float | None, group: HostGroup
    ) -> None:
        self._place, self._group, self.rank, self.size = place, group, group.rank, group.size
        self._hang_seconds = math.inf if hang_minutes is None else 60 * hang_minutes
        self._error, self._is_done = "", False
        self._lost = {0: GONE} if self.rank else {}  # what is true if the store does not answer
        self._leaving = threading.Event()
        # A daemon, joined with a timeout: if the machine of process 0 is lost, a request may never return.
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.size > 1 and self._connect():
            self._exchange()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        if self._thread.is_alive():
            self._thread.join(LOST_SECONDS + 2 * STORE_SECONDS)

    def explain(self, error: BaseException) -> BaseException:
        """Ends the watch. Returns a ProcessLostError if the loss of others caused the error, otherwise the error."""
        self._error = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        self.__exit__()
        if self.size == 1 or not isinstance(error, RuntimeError) or self.rank in self._lost or not self._lost:
            return error
        named = "; ".join(f"{self._name(rank)} {what}" for rank, what in self._lost.items())
        advice = "The run cannot continue without it; run the same command to resume from the last checkpoint."
        return ProcessLostError(f"at step {self._place()[0]}, {named}. {advice}", list(self._lost))

    def _name(self, rank: int) -> str:
        return f"process {rank} of {self.size} (on {self._hosts[rank]})"

    def _connect(self) -> bool:
        """Connects all processes to a store on a free port of process 0. Returns whether each of them could."""
        options: dict[str, Any] = {"wait_for_workers": False, "timeout": timedelta(seconds=STORE_SECONDS)}
        host, port = socket.gethostname(), 0
        if self.rank == 0:
            self._store: Any = dist.TCPStore("localhost", 0, is_master=True, **options)  # type: ignore[attr-defined]
            port = self._store.port
        # MASTER_ADDR, from the launcher, is how other machines reach process 0.
        mine = host, (os.environ.get("MASTER_ADDR", host), port)
        self._hosts, addresses = zip(*self._group.all_gather(mine), strict=True)
        with suppress(RuntimeError):  # a firewall between machines
            if self.rank:
                self._store = dist.TCPStore(*addresses[0], **options)  # type: ignore[attr-defined]
        if not all(self._group.all_gather(hasattr(self, "_store"))):
            self.size = 1
            logger.warning("%s:%d cannot be reached; a lost process will not be named.", *addresses[0])
        return self.size > 1

    def _watch(self) -> None:
        """The thread: exchanges heartbeats until this process leaves or another one fails, and finds out which."""
        beats, places, since = list[_Beat](), list[list[int]](), math.inf
        with suppress(RuntimeError):  # of a store that is lost together with process 0
            while not self._leaving.wait(BEAT_SECONDS) and not any(beat.error for beat in beats):
                beats = self._exchange()
                now, before, places = time.monotonic(), places, [beat.place for beat in beats]
                since = since if places == before else now
                if now - since >= self._hang_seconds:
                    self._report_hang(places, (now - since) / 60)
                    since = math.inf  # report it once
            self._is_done = True
            first = beats = self._exchange()
            failed = {rank: f"ended by {beat.error}" for rank, beat in enumerate(first) if beat.error}
            # Process 0 serves the store, so it leaves last. When a failed process leaves, the others fail too: it waits
            # until they know its error.
            deadline = time.monotonic() + (LOST_SECONDS if self.rank == 0 or failed else 0)
            while not all(beat.is_done for beat in beats) and time.monotonic() < deadline:
                time.sleep(BEAT_SECONDS / 10)
                beats = self._exchange()
            silent = [rank for rank, beat in enumerate(beats) if not beat.is_done and beat == first[rank]]
            self._lost = failed and (dict.fromkeys(silent, GONE) or failed)

    def _report_hang(self, places: list[list[int]], minutes: float) -> None:
        """Prints the stack of this process if it is the furthest behind."""
        step, *behind = places[self.rank]
        if behind == min(place[1:] for place in places):
            where = f"{self._name(self.rank)} at step {step}, {Phase(behind[1]).name.lower()}. Its stack follows."
            text = f"no process has made progress for {minutes:.2g} minutes. Furthest behind: {where}"
            print(text, file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=2)

    def _exchange(self) -> list[_Beat]:
        """Sends the heartbeat of this process. Returns those of all."""
        beat = _Beat(time.monotonic(), [*self._place()], self._error, self._is_done)
        self._store.set(f"{self.rank}", json.dumps(beat))
        return [_Beat(*json.loads(beat)) for beat in self._store.multi_get([f"{rank}" for rank in range(self.size)])]
