"""Names the process of a run that is lost, or that the other processes wait for.

On each process a thread sends heartbeats, with its place in the training loop, to a TCPStore that process 0 serves, and
reads those of all processes.
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
LOST_SECONDS = 5.0
"""A process that sends no heartbeat for so long is lost. Only asked after a process has failed."""
STORE_SECONDS = 10.0
"""Timeout of a request to the store."""
GONE = "is gone: killed, or its machine is lost"


class Phase(IntEnum):
    """What a process is doing, in the order of the training loop."""

    STARTING = 0
    LOADING = 1
    COMPUTING = 2
    FINISHING = 3
    """Validating, saving, agreeing on whether to stop."""


class Place(NamedTuple):
    """Where a process is in the training loop."""

    step: int
    """Finished optimizer steps."""
    polls: int
    """Finished steps and validation batches: the same on processes that are equally far."""
    phase: int = Phase.STARTING


class Beat(NamedTuple):
    """Heartbeat of a process."""

    number: int
    place: Place
    error: str = ""
    """Why the process fails; "" if it does not."""
    may_follow: bool = False
    """True if the error may follow from the loss of another process."""
    is_done: bool = False
    """True if the process has finished, or knows which processes are lost."""


def furthest_behind(places: list[Place]) -> list[int]:
    """Returns the ranks of the processes that the furthest one waits for; if none is behind, all ranks."""
    furthest = max(place[1:] for place in places)
    return [rank for rank, place in enumerate(places) if place[1:] < furthest] or list(range(len(places)))


class Watchdog:
    """Watches the processes of a group from entering to leaving its context.

    Args:
        place: returns the place of this process; called from another thread.
        hang_minutes: time without progress on any process after which a hang is reported; None: never.
        group: the processes.
    """

    def __init__(self, place: Callable[[], Place], hang_minutes: float | None, group: HostGroup) -> None:
        self._place, self._group, self.rank, self.size = place, group, group.rank, group.size
        self._hang_seconds = math.inf if hang_minutes is None else 60 * hang_minutes
        self._places: list[Place] = []
        self._since, self._number = math.inf, 0
        self._error: BaseException | None = None
        self._leaving = threading.Event()
        # A daemon, joined with a timeout: if the machine of process 0 is lost, a request may never return.
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.size > 1 and self._connect():
            self._beat()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        if self._thread.is_alive():
            self._thread.join(2 * LOST_SECONDS + STORE_SECONDS)

    def explain(self, error: BaseException) -> BaseException:
        """Ends the watch. Returns a ProcessLostError if the loss of others caused the error, otherwise the error."""
        self._error = error
        self.__exit__()
        if self.size == 1 or not isinstance(error, RuntimeError) or self.rank in dict(self._lost) or not self._lost:
            return error
        lost = "; ".join(f"process {rank} of {self.size} (on {self._hosts[rank]}) {what}" for rank, what in self._lost)
        advice = "The run cannot continue without it; run the same command to resume from the last checkpoint."
        return ProcessLostError(f"at step {self._place().step}, {lost}. {advice}", [rank for rank, _ in self._lost])

    def _connect(self) -> bool:
        """Connects all processes to a store on a free port of process 0; returns whether each could."""
        store: Any = None
        options: dict[str, Any] = {"wait_for_workers": False, "timeout": timedelta(seconds=STORE_SECONDS)}
        if self.rank == 0:
            store = dist.TCPStore("localhost", 0, is_master=True, **options)  # type: ignore[attr-defined]
        host = socket.gethostname()
        # MASTER_ADDR, from the launcher, is how other machines reach process 0.
        hosts = self._group.all_gather((host, os.environ.get("MASTER_ADDR", host), store and store.port))
        self._hosts, (_, address, port) = [host for host, _, _ in hosts], hosts[0]
        if self.rank != 0:
            with suppress(RuntimeError):
                store = dist.TCPStore(address, port, **options)  # type: ignore[attr-defined]
        self._store = store
        self._lost = [] if self.rank == 0 else [(0, GONE)]  # what is true if the store does not answer
        if all(self._group.all_gather(store is not None)):
            return True
        self.size = 1
        logger.warning("some processes cannot reach %s:%d; a lost process will not be named.", address, port)
        return False

    # ---- the thread --------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Sends and reads heartbeats until this process leaves or another one fails."""
        is_leaving = has_failed = False
        with suppress(RuntimeError):  # of a store that is lost together with process 0
            while not is_leaving and not has_failed:
                is_leaving = self._leaving.wait(BEAT_SECONDS)
                self._beat()
                beats = self._read()
                has_failed = any(beat.error for beat in beats)
                self._report_hang([beat.place for beat in beats])
            self._lost = self._find_lost(beats) if has_failed else []
            self._beat(is_done=True)
            # Process 0 serves the store, so it leaves last. When a failed process leaves, the others fail too: it waits
            # until they know its error.
            deadline = time.monotonic() + LOST_SECONDS
            while (self.rank == 0 or has_failed) and time.monotonic() < deadline:
                others = [beat for rank, beat in enumerate(self._read()) if rank not in dict(self._lost)]
                if all(beat.is_done for beat in others):
                    break
                time.sleep(BEAT_SECONDS / 10)

    def _find_lost(self, first: list[Beat]) -> list[tuple[int, str]]:
        """Returns (rank, what happened) of the processes that ended the run: silent ones, otherwise failed ones."""
        beats, silent = first, [rank for rank in range(self.size) if rank != self.rank]
        deadline = time.monotonic() + LOST_SECONDS
        while silent and time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 4)
            self._beat()
            beats = self._read()
            silent = [rank for rank in silent if not beats[rank].is_done and beats[rank] == first[rank]]
        failed = [(rank, beat) for rank, beat in enumerate(beats) if beat.error]
        causes = [(rank, beat) for rank, beat in failed if not beat.may_follow] or failed
        return [(rank, GONE) for rank in silent] or [(rank, f"ended by {beat.error}") for rank, beat in causes]

    def _report_hang(self, places: list[Place]) -> None:
        """Prints the stack of this process if nothing moves and the others wait for it."""
        now = time.monotonic()
        if places != self._places:
            self._places, self._since = places, now
        if now - self._since < self._hang_seconds:
            return
        minutes = (now - self._since) / 60
        self._since = math.inf  # report it once
        if self.rank in furthest_behind(places):
            place = places[self.rank]
            print(
                f"no process has made progress for {minutes:.2g} minutes. Furthest behind: process {self.rank} of "
                f"{self.size} (on {self._hosts[self.rank]}) at step {place.step}, {Phase(place.phase).name.lower()}. "
                "Its stack follows.",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(file=2)

    def _beat(self, is_done: bool = False) -> None:
        self._number, error = self._number + 1, self._error
        text = "" if error is None else f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        # Collectives raise RuntimeErrors.
        beat = Beat(self._number, self._place(), text, isinstance(error, RuntimeError), is_done)
        self._store.set(f"{self.rank}", json.dumps(beat))

    def _read(self) -> list[Beat]:
        beats = map(json.loads, self._store.multi_get([f"{rank}" for rank in range(self.size)]))
        return [Beat(number, Place(*place), *end) for number, place, *end in beats]
