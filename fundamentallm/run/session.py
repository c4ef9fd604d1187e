"""One launch of a run: its folders are locked, its leftovers cleaned up, its outcome recorded."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fundamentallm import errors
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
            except Exception as failure:  # the first error is the one to raise
                say(str(failure))
            if error is not raised:
                raise error from raised
            raise
        end = position()
        if folder is not None and (end["state"] != "finished" or read_status(folder).get("state") != "finished"):
            write_status(folder, **end, exit_code=errors.START_AGAIN if end["state"] == "interrupted" else 0)


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
    folders = [folder for folder in (output_dir, manager and manager.checkpoint_dir) if folder is not None]
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
