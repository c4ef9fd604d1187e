"""Which process of several is gone, or holds up the others, and where.

A thread in each process tells the others, through the store that formed their group, that it lives, at which step it is
and how many collectives it has begun. One that has begun fewer than the others is the one they wait for. The training
thread does nothing for it.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from fundamentallm.errors import ProcessLostError

BEAT_SECONDS = 1.0
LOST_SECONDS = 5.0
"""Without a beat, after which a process is taken for gone; asked only when the group has failed already."""
STORE_SECONDS = 10.0
"""For the store to answer."""
GO_ON = "The others cannot go on without; the same command goes on from the last checkpoint."

_sessions = itertools.count()  # the same in all processes, which begin the same sessions


class Place(NamedTuple):
    """Where the training thread of a process is."""

    step: int
    """Optimizer steps done."""
    moved: float
    """Another number whenever it has moved on: by a step, or by a batch of a validation."""


class Beat(NamedTuple):
    """What a process says of itself."""

    number: int
    step: int
    moved: float
    collectives: int
    host: str
    end: str = ""
    """The error that ended it, if one has."""
    lost: Sequence[int] = ()
    """The processes whose loss ended it, if it has ended so."""


class Watchdog:
    """Watches, from entering to leaving its context, over all processes of the default group.

    Args:
        place: where this process's training is; asked by another thread.
        hang_minutes: without progress anywhere, after which those that are waited for are named; None: never.
    """

    def __init__(self, place: Callable[[], Place], hang_minutes: float | None) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self._place, self._number = place, 0
        self._hangs = Hangs(self.size, None if hang_minutes is None else 60 * hang_minutes)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.size > 1:
            # Through a connection of its own, since what waits on the group's keeps others from using it.
            store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            store.set_timeout(timedelta(seconds=STORE_SECONDS))
            self._store: Any = dist.PrefixStore(f"watchdog_{next(_sessions)}", store)  # type: ignore[attr-defined]
            self._tell()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(STORE_SECONDS)  # not for ever: the store's machine may be gone without a word

    # ---- who is gone -------------------------------------------------------------------------------------

    def explain(self, error: BaseException) -> BaseException:
        """The error itself; where it came of processes that are gone, one that names them, after a look at who lives
        that takes some seconds. The last thing to ask: the others hear that this process ends.
        """
        if self.size == 1:
            return error
        # What torch raises where a collective fails; our own errors are no RuntimeErrors.
        gone = self._look_around() if isinstance(error, RuntimeError) else {}
        self.__exit__()
        if not self._thread.is_alive():  # else the store does not answer, and would keep this thread too
            with suppress(RuntimeError):
                self._tell(end=_one_line(error), lost=sorted(gone))
        if not gone:
            return error
        what = "; ".join(f"process {rank} of {self.size} {text}" for rank, text in sorted(gone.items()))
        return ProcessLostError(f"at step {self._place().step}, {what}. {GO_ON}", sorted(gone))

    def _look_around(self) -> dict[int, str]:
        """{rank: what is known of its end} of the other processes that live no more."""
        found: list[dict[int, str]] = []
        look = threading.Thread(target=lambda: found.append(self._gone()), daemon=True)
        look.start()
        look.join(LOST_SECONDS + STORE_SECONDS)
        if found:
            return found[0]
        return {} if self.rank == 0 else {0: "does not answer, nor the store of the group, which its machine keeps"}

    def _gone(self) -> dict[int, str]:
        first: dict[int, Beat] = {}
        living, gone = {self.rank}, dict[int, str]()
        deadline = time.monotonic() + LOST_SECONDS
        while len(living | gone.keys()) < self.size and time.monotonic() < deadline:
            try:
                beats = self._read()
            except RuntimeError as error:
                return {} if self.rank == 0 else {0: f"is gone, and its machine with the store: {_one_line(error)}"}
            for rank, beat in beats.items():
                if beat.lost:  # ended as this process is about to
                    living.add(rank)
                    gone |= dict.fromkeys(set(beat.lost) - gone.keys(), "is gone, as others have seen")
                elif beat.end:
                    gone[rank] = f"(on {beat.host}) ended by {beat.end}"
                elif beat.number > first.setdefault(rank, beat).number:
                    living.add(rank)
            time.sleep(BEAT_SECONDS / 4)
        for rank in set(range(self.size)) - living - gone.keys():
            where = f" (on {first[rank].host})" if rank in first else ""
            gone[rank] = f"{where} is gone: killed, or its machine is lost".lstrip()
        return gone

    # ---- the thread --------------------------------------------------------------------------------------

    def _watch(self) -> None:
        heard = 0
        with suppress(RuntimeError):  # of the store, which is gone then, and the group with it
            while not self._done.wait(BEAT_SECONDS):
                self._tell()
                if self.rank == 0 and (text := self._hangs.look(self._read())):
                    print(text, file=sys.stderr, flush=True)
                    self._store.set("hang", json.dumps([self._hangs.count, self._hangs.waited_for]))
                if self._store.check(["hang"]):
                    count, waited_for = json.loads(self._store.get("hang"))
                    if count > heard and self.rank in waited_for:
                        text = f"process {self.rank} of {self.size} is at step {self._place().step}, here:"
                        print(text, file=sys.stderr, flush=True)
                        faulthandler.dump_traceback(file=2)
                    heard = count

    def _tell(self, **more: Any) -> None:
        self._number += 1
        beat = Beat(self._number, *self._place(), _collectives(), socket.gethostname(), **more)
        self._store.set(f"{self.rank}", json.dumps(beat))

    def _read(self) -> dict[int, Beat]:
        """Of all processes that have told something."""
        ranks = [rank for rank in range(self.size) if self._store.check([f"{rank}"])]
        values = self._store.multi_get([f"{rank}" for rank in ranks])
        return {rank: Beat(*json.loads(value)) for rank, value in zip(ranks, values, strict=True)}


class Hangs:
    """Finds in the beats of all processes those that hold up the others, once for each time they do.

    Args:
        size: how many processes there are.
        limit: seconds without progress of any; None: never.
    """

    def __init__(self, size: int, limit: float | None) -> None:
        self._size, self._limit = size, limit
        self._beats: dict[int, Beat] = {}
        self._since = 0.0
        self.count = 0
        self.waited_for: list[int] = []

    def look(self, beats: dict[int, Beat]) -> str:
        """What to say now, if anything."""
        now, before = time.monotonic(), self._beats
        if [beat.moved for beat in beats.values()] != [beat.moved for beat in before.values()]:
            self._beats, self._since, self.waited_for = beats, now, []
        most = max(beat.collectives for beat in beats.values())
        # Where all have begun as many, none waits for another: they compile, say, or take a large step.
        behind = [rank for rank, beat in beats.items() if beat.collectives < most]
        if not behind or self.waited_for or self._limit is None or now - self._since < self._limit:
            return ""
        self.count, self.waited_for = self.count + 1, behind
        text = ""
        for rank in behind:
            silent = beats[rank].number == self._beats[rank].number
            answer = "does not answer either: it is stopped, or holds the interpreter" if silent else "says where"
            text += (
                f"process {rank} of {self._size} (on {beats[rank].host}) has been at step {beats[rank].step} for "
                f"{(now - self._since) / 60:.2g} minutes, and the others wait for it; it {answer}\n"
            )
        return text.rstrip()


def _collectives() -> int:
    """Collectives that this process has begun, in all its groups."""
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    with suppress(RuntimeError):  # a backend that does not count
        return sum(group._get_sequence_number_for_group() for group in groups)
    return 0


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
