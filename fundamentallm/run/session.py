"""One launch of a run: its folders are locked, its leftovers cleaned up, its outcome recorded."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.distributed.watchdog import Watchdog
from fundamentallm.errors import (
    START_AGAIN,
    CheckpointError,
    ConfigError,
    FundamentaLLMError,
    Interrupted,
    Problem,
    TrainingError,
    exit_code,
)
from fundamentallm.run.folder import locked, read_status, write_start, write_status
from fundamentallm.run.stopping import StopSwitch


class Position(NamedTuple):
    """How far a run is, as status.json records it."""

    step: int
    total_steps: int
    is_finished: bool
    was_interrupted: bool  # by a signal or `max_minutes`, which ended this launch


class Record:
    """What a run writes about itself in its output folder. Only the main process has a folder."""

    def __init__(self, folder: Path | None, position: Callable[[], Position]) -> None:
        self.folder, self.position = folder, position

    def _was(self, *states: str) -> bool:
        return self.folder is not None and read_status(self.folder).get("state") in states

    def _write(self, state: str, **more: Any) -> None:
        if self.folder is not None:
            now = self.position()
            about = {"step": now.step, "total_steps": now.total_steps, "pid": os.getpid()}
            write_status(self.folder, state=state, **more, **about, host=socket.gethostname())

    def launch(self, resumed_from: Path | None, **about: Any) -> None:
        """Notes in status.json that the run is running, and in starts.jsonl when, where and with what."""
        self._write("running")
        if self.folder is not None:
            now, source = datetime.now(timezone.utc), None if resumed_from is None else str(resumed_from)
            time = now.isoformat(timespec="seconds")
            write_start(self.folder, step=self.position().step, time=time, resumed_from=source, **about)

    def failure(self, error: BaseException) -> None:
        """Notes which error ended the launch."""
        if isinstance(error, Interrupted):
            return  # the run is where it was, which only the command knows if it was not restored yet
        # A launch that was refused leaves the run as it was, unless a scheduler would relaunch it again and again.
        if not isinstance(error, ConfigError) or self._was("running", "interrupted"):
            state = "diverged" if isinstance(error, TrainingError) else "failed"
            with suppress(FundamentaLLMError):  # on a full disk, the first error is the one to raise
                self._write(state, exit_code=exit_code(error), reason=f"{type(error).__name__}: {error}")

    def end(self, reason: str) -> None:
        """Notes how the launch ended."""
        now = self.position()
        state = "finished" if now.is_finished else "interrupted" if now.was_interrupted else "stopped"
        if state != "finished" or not self._was(state):  # launching a finished run again changes nothing
            self._write(state, exit_code=START_AGAIN if now.was_interrupted else 0, reason=reason)


@contextmanager
def session(
    record: Record,
    manager: CheckpointManager | None,
    group: HostGroup,
    stop_switch: StopSwitch,
    watchdog: Watchdog,
    say: Callable[[str], None],
) -> Iterator[ExitStack]:
    """One launch of a run: locks its folders, watches the other processes, and records the outcome in status.json.

    On entry it also cleans up what a killed process left among the checkpoints. On an exception it waits for the
    checkpoint that is being written; another Ctrl-C ends the wait. Yields the stack of what is undone once the outcome
    is recorded. Raises ProcessLostError if another process of the run died.
    """
    with ExitStack() as stack:
        stack.enter_context(watchdog)
        group.from_main(lambda: _open_folders(stack, record.folder, manager, say))
        try:
            yield stack
        except BaseException as raised:
            error = watchdog.explain(raised)
            record.failure(error)
            try:
                if manager is not None:
                    manager.wait()
            except Exception as failure:  # the first error is the one to raise
                say(str(failure))
            if error is not raised:
                raise error from raised
            raise
        record.end(stop_switch.reason)


def _open_folders(
    stack: ExitStack, output_dir: Path | None, manager: CheckpointManager | None, say: Callable[[str], None]
) -> None:
    """Locks the folders of a run until the stack is closed, and cleans up among its checkpoints."""
    checkpoint_dir = None if manager is None else manager.checkpoint_dir
    folders = [folder for folder in (output_dir, checkpoint_dir) if folder is not None]
    for folder in folders:
        if str(folder) != str(folder).encode(errors="replace").decode():
            reason = "and safetensors reads no file there"
            raise ConfigError(Problem("output_dir", str(folder), "a path in UTF-8", reason=reason))
    try:
        stack.enter_context(locked(folders))
        if manager is None:
            say("training.checkpoint_dir is not set: nothing will be saved.")
        else:
            manager.wait()  # raises the error of a save that an interrupted train() left running
            for line in manager.recover():
                say(line)
    except OSError as error:
        raise CheckpointError(f"A folder of this run cannot be used: {error}. Choose another output_dir.") from error
