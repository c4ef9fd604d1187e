"""Names the process of a run that is lost, or that the other processes wait for.

On each process a thread sends a heartbeat, with its place in the training loop, to a TCPStore that process 0 serves.
The thread of process 0 reads the heartbeats and publishes what it finds.
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
"""A process that sends no heartbeat for so long is lost. This is asked only after a process has failed."""
STORE_SECONDS = 10.0
"""Timeout of a request to the store."""
FINISHED, GONE = "finished", "is gone: killed, or its machine is lost"


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
    """Heartbeat of a process; `end` is FINISHED or its error, which may follow from the loss of another process."""

    number: int
    place: Place
    end: str = ""
    may_follow: bool = False


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
        self._since, self._hangs, self._number = math.inf, 0, 0
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
        store, shown = self._store, 0
        with suppress(RuntimeError):  # of a store that is lost together with process 0
            while not store.check(["lost"]):
                is_leaving = self._leaving.wait(BEAT_SECONDS)
                self._beat()
                if self.rank == 0:
                    self._judge(self._read())
                if is_leaving and not isinstance(self._error, RuntimeError):
                    break
                if store.check(["hang"]):
                    hangs, ranks = json.loads(store.get("hang"))
                    if self.rank in ranks and hangs > shown:
                        text = f"process {self.rank} of {self.size} is at step {self._place().step}, here:"
                        print(text, file=sys.stderr, flush=True)
                        faulthandler.dump_traceback(file=2)
                    shown = hangs
                time.sleep(BEAT_SECONDS / 10)
            if store.check(["lost"]):
                self._lost = [(rank, what) for rank, what in json.loads(store.get("lost"))]
            store.set(f"left_{self.rank}", "")
            if self.rank == 0:  # leaves last, since it serves the store
                others = [f"left_{rank}" for rank in range(self.size) if rank not in dict(self._lost)]
                store.wait(others, timedelta(seconds=LOST_SECONDS))

    def _judge(self, beats: list[Beat]) -> None:
        """Publishes the lost processes if one has failed or process 0 leaves; otherwise a hang, if there is one."""
        has_failed = any(beat.end not in ("", FINISHED) for beat in beats)
        if has_failed or beats[0].end:
            self._store.set("lost", json.dumps(self._find_lost() if has_failed else []))
        now, places = time.monotonic(), [beat.place for beat in beats]
        if places != self._places:
            self._places, self._since = places, now
        if now - self._since < self._hang_seconds:
            return
        behind, minutes = furthest_behind(places), f"{(now - self._since) / 60:.2g} minutes"
        self._since, self._hangs = math.inf, self._hangs + 1  # report it once
        named = ", ".join(
            f"process {rank} of {self.size} (on {self._hosts[rank]}) at step {places[rank].step}, "
            f"{Phase(places[rank].phase).name.lower()}"
            for rank in behind
        )
        text = f"no process has made progress for {minutes}. Furthest behind: {named}. Stacks follow."
        print(text, file=sys.stderr, flush=True)
        self._store.set("hang", json.dumps([self._hangs, behind]))

    def _find_lost(self) -> list[tuple[int, str]]:
        """Returns (rank, what happened) of the processes that ended the run: silent ones, otherwise failed ones."""
        first = beats = self._read()
        silent, deadline = list(range(1, self.size)), time.monotonic() + LOST_SECONDS
        while silent and time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 4)
            beats = self._read()
            silent = [rank for rank in silent if not beats[rank].end and beats[rank] == first[rank]]
        failed = [(rank, beat) for rank, beat in enumerate(beats) if beat.end not in ("", FINISHED)]
        causes = [(rank, beat) for rank, beat in failed if not beat.may_follow] or failed
        return [(rank, GONE) for rank in silent] or [(rank, f"ended by {beat.end}") for rank, beat in causes]

    def _beat(self) -> None:
        self._number, error, end = self._number + 1, self._error, ""
        if self._leaving.is_set():
            end = FINISHED if error is None else f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        # Collectives raise RuntimeErrors.
        beat = Beat(self._number, self._place(), end, may_follow=isinstance(error, RuntimeError))
        self._store.set(f"{self.rank}", json.dumps(beat))

    def _read(self) -> list[Beat]:
        beats = map(json.loads, self._store.multi_get([f"{rank}" for rank in range(self.size)]))
        return [Beat(number, Place(*place), *end) for number, place, *end in beats]
