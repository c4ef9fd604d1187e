"""One launch of a run: its folders are locked, it can be stopped early, and its outcome is recorded."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from fundamentallm import errors, signals
from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.distributed.watchdog import Watchdog
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.run.folder import locked, read_status, write_start, write_status


@contextmanager
def session(
    folder: Path | None,
    position: Callable[[], dict[str, Any]],
    manager: CheckpointManager | None,
    group: HostGroup,
    watchdog: Watchdog,
    say: Callable[[str], None],
) -> Iterator[ExitStack]:
    """One launch of a run: locks its folders, watches the other processes, and records the outcome in status.json.

    On entry it also cleans up what a killed process left among the checkpoints. On an exception it waits for the
    checkpoint that is being written; another Ctrl-C ends the wait. Yields the stack of what is undone once the outcome
    is recorded. Raises ProcessLostError if another process of the run died.

    Only the main process has a `folder`. `position` returns what status.json would hold if the run ended now.
    """
    with ExitStack() as stack:
        stack.enter_context(watchdog)
        group.from_main(lambda: _open_folders(stack, folder, manager, say))
        try:
            yield stack
        except BaseException as raised:
            error = watchdog.explain(raised)
            if folder is not None:
                _record_failure(folder, position(), error)
            try:
                if manager is not None:
                    manager.wait()
                    if group.rank == 0 and isinstance(error, Exception) and not isinstance(error, ConfigError):
                        _finish_copies(manager, HostGroup(alone=True), say)
            except Exception as failure:  # the first error is the one to raise
                say(str(failure))
            if error is not raised:
                raise error from raised
            raise
        end = position()
        if folder is not None and (end["state"] != "finished" or read_status(folder).get("state") != "finished"):
            write_status(folder, **end, exit_code=errors.START_AGAIN if end["state"] == "interrupted" else 0)
        if manager is not None and manager.mirror.url:
            watchdog.__exit__()  # to copy for long is not to hang
            _finish_copies(manager, group, say)


def _finish_copies(manager: CheckpointManager, group: HostGroup, say: Callable[[str], None]) -> None:
    """Waits until the mirror has all checkpoints or fails, and says which it lacks."""
    group.from_main(manager.mirror.request)
    while not group.from_main(lambda: manager.mirror.has_ended(20.0)):  # in turns: one that takes long would time out
        say(f"copying checkpoints to {manager.mirror.url}; Ctrl-C twice leaves that to the next launch")
    if group.rank == 0:
        manager.mirror.say_news(say)
        if names := [path.name for path, _ in manager.mirror.missing()]:
            say(f"warning: not copied to {manager.mirror.url}: {', '.join(names)}. The same command copies them.")
        elif manager.mirror.url:
            manager.rotate()  # deletes those that have waited for their copies


def record_launch(folder: Path, position: dict[str, Any], resumed_from: Path | None, **about: Any) -> None:
    """Notes in status.json that the run is running, and in starts.jsonl when, where and with what."""
    write_status(folder, **position | {"state": "running", "reason": ""})
    now, source = datetime.now(timezone.utc), None if resumed_from is None else str(resumed_from)
    write_start(folder, step=position["step"], time=now.isoformat(timespec="seconds"), resumed_from=source, **about)


def _record_failure(folder: Path, position: dict[str, Any], error: BaseException) -> None:
    # A launch that was refused leaves the run as it was, unless a scheduler would relaunch it again and again.
    was_ended = read_status(folder).get("state") not in ("running", "interrupted")
    if isinstance(error, errors.Interrupted) or (isinstance(error, ConfigError) and was_ended):
        return
    state = "diverged" if isinstance(error, errors.TrainingError) else "failed"
    failure = {"state": state, "exit_code": errors.exit_code(error), "reason": f"{type(error).__name__}: {error}"}
    with suppress(errors.FundamentaLLMError):  # on a full disk, the first error is the one to raise
        write_status(folder, **position | failure)


def _open_folders(
    stack: ExitStack, output_dir: Path | None, manager: CheckpointManager | None, say: Callable[[str], None]
) -> None:
    below = None if manager is None else manager.checkpoint_dir
    folders = [folder for folder in (output_dir, below) if folder is not None]
    for folder in folders:
        if str(folder) != str(folder).encode(errors="replace").decode():
            reason = "and safetensors reads no file there"
            raise ConfigError(Problem("output_dir", str(folder), "a path in UTF-8", reason=reason))
    try:
        stack.enter_context(locked(folders))
        if manager is None:
            say("training.checkpoint_dir is not set: nothing will be saved.")
            return
        manager.wait()  # raises the error of a save that an interrupted train() left running
        for line in manager.recover():
            say(line)
    except OSError as error:
        raise errors.CheckpointError(f"A folder cannot be used: {error}. Choose another output_dir.") from error


class Stop(IntEnum):
    """Reason to stop a run before its end. If there are several, the largest counts."""

    NO, REQUESTED, OUT_OF_TIME, SIGNAL, FAILED = range(5)


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
            self.request(Stop.OUT_OF_TIME, "training.max_minutes is over")
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
        if self._pending is not None:
            value, work = self._pending
            work.wait()
            self._pending, self.agreed = None, max(self.agreed, Stop(int(value)))
            if self.agreed > self.wanted:
                self.request(self.agreed, f"{self.agreed.name.lower().replace('_', ' ')} on another process")
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
