"""One start of a run: its folders are locked, its checkpoints put in order and taken up, its end is told."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from fundamentallm.checkpoint.snapshot import OPTIMIZER_KEY
from fundamentallm.checkpoint.state_json import encode
from fundamentallm.distributed.dtensor import device_name, local
from fundamentallm.distributed.watchdog import Place, Watchdog
from fundamentallm.errors import START_AGAIN, CheckpointError, ConfigError, FundamentaLLMError, TrainingError, exit_code
from fundamentallm.run.environment import environment
from fundamentallm.run.folder import locked, read_state, write_start, write_status
from fundamentallm.run.resume import resume
from fundamentallm.run.state import run_state

if TYPE_CHECKING:
    from fundamentallm.checkpoint.manager import CheckpointManager
    from fundamentallm.training.trainer import Trainer

logger = logging.getLogger(__name__)


@contextmanager
def session(trainer: Trainer, is_first: bool) -> Iterator[None]:
    """Meanwhile, this run alone uses its folders, and signals ask it to stop.

    Args:
        trainer: about to train.
        is_first: whether its state is still that of a new run, so that it has to be resumed.

    Raises:
        RunInProgressError: if another process trains in the same folders.
        ProcessLostError: if another process of the run is gone.
        CheckpointError: if there is no room for the checkpoints, or none can be restored.
        ConfigError: if the run cannot go on with this config.
    """
    with ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(lambda: _place(trainer), trainer.config.training.hang_minutes))
        trainer.team.from_first(lambda: _open_folders(trainer, stack))
        try:
            resumed_from = None
            if is_first:
                resumed_from = resume(trainer)
                trainer.team.from_first(lambda: _delete_old(trainer, resumed_from))
            if not trainer.is_finished:
                _check_saving(trainer)
                trainer.find_micro_batch_size()
                _tell(trainer, state="running")
                _record_start(trainer, resumed_from)
            trainer.stop_switch.begin()
            stack.enter_context(trainer.stop_switch.listening())
            yield
        except BaseException as raised:
            error = watchdog.explain(raised)
            if trainer.checkpoint_manager is not None and not isinstance(error, KeyboardInterrupt):
                _finish_saving(trainer, trainer.checkpoint_manager)
            state = "diverged" if isinstance(error, TrainingError) else "failed"
            # A start that is refused leaves the run as it was, unless that is to be started again and again.
            if not isinstance(error, ConfigError) or _state(trainer) in ("running", "interrupted"):
                with suppress(FundamentaLLMError):  # a full disk takes no status either, which is not what to raise
                    _tell(trainer, state=state, exit_code=exit_code(error), reason=f"{type(error).__name__}: {error}")
            if error is not raised:
                raise error from raised
            raise
        state = "finished" if trainer.is_finished else "interrupted" if trainer.was_interrupted else "stopped"
        code = START_AGAIN if trainer.was_interrupted else 0
        if state != "finished" or _state(trainer) != state:  # a start that finds the run finished changes nothing
            _tell(trainer, state=state, exit_code=code, reason=trainer.stop_switch.reason)


def _place(trainer: Trainer) -> Place:
    return Place(trainer.global_step, trainer.stop_switch.polled_at)


def _open_folders(trainer: Trainer, stack: ExitStack) -> None:
    manager, folders = trainer.checkpoint_manager, []
    if trainer.output_dir is not None:
        folders.append(trainer.output_dir)
    if manager is not None:
        folders.append(manager.checkpoint_dir)
    elif trainer.config.training.checkpoint_dir is None:
        logger.warning("training.checkpoint_dir is not set: nothing will be saved.")
    try:
        stack.enter_context(locked(folders))
        if manager is not None:
            manager.wait()  # for what an interrupted start in this process may have left under way
        for what in manager.recover() if manager is not None else ():
            trainer.say(what)
    except OSError as error:
        raise CheckpointError(f"a folder of this run cannot be used: {error}; choose another output_dir.") from error


def _finish_saving(trainer: Trainer, manager: CheckpointManager) -> None:
    """After an error, let the checkpoint in the making be completed; an error of its own is said, not raised."""
    try:
        manager.wait()
    except Exception as error:  # also that of a group in which a process is missing
        trainer.say(str(error))


def _delete_old(trainer: Trainer, verified: Path | None) -> None:
    """Delete what a process that was killed after a save did not; `verified` is the checkpoint resumed from."""
    manager = trainer.checkpoint_manager
    if manager is not None and verified is not None and verified == manager.get_latest():
        manager.rotate()


def _check_saving(trainer: Trainer) -> None:
    """Find out before the first step whether the state can be saved, and whether there is room for it."""
    manager = trainer.checkpoint_manager
    if manager is not None:
        config, left = trainer.config.training, trainer.total_steps - trainer.global_step
        by_steps = left // (config.save_every_n_steps or left + 1)
        by_epochs = left // ((config.save_every_n_epochs or left + 1) * trainer.steps_per_epoch)
        by_validations = left // min(config.eval_every_n_steps or left + 1, trainer.steps_per_epoch)  # the best
        # On all processes: asked for its state, a sharded model lets go of what it has gathered, for a validation, say;
        # where some do and others do not, the next forward pass waits for ever.
        with trainer.team.together():
            num_bytes = expected_bytes(trainer)
        trainer.team.from_first(
            lambda: manager.check_space_of_run(num_bytes, by_steps + by_epochs + by_validations + 2)
        )


def expected_bytes(trainer: Trainer) -> int:
    """Size of a checkpoint; before the first step, the optimizer is taken to hold two numbers a parameter, as Adam.

    Raises:
        CheckpointError: if the state has something in it that cannot be saved.
    """
    tensors: dict[str, Tensor] = {}
    encode(run_state(trainer), (), tensors)
    moments = {name: tensor for name, tensor in tensors.items() if name.startswith(OPTIMIZER_KEY)}
    trained = sum(p.numel() * p.element_size() for group in trainer.optimizer.param_groups for p in group["params"])
    return _bytes(tensors) if trainer.global_step else _bytes(tensors) - _bytes(moments) + 2 * trained


def _bytes(tensors: dict[str, Tensor]) -> int:
    """Of all of them, a tied one counted once."""
    return sum({(local(t).data_ptr(), t.nbytes): t.nbytes for t in tensors.values()}.values())


def _state(trainer: Trainer) -> str | None:
    return read_state(trainer.output_dir) if trainer.output_dir is not None else None


def _record_start(trainer: Trainer, resumed_from: Path | None) -> None:
    """Write down where, when and with what the run goes on."""
    config, accelerator = trainer.config, trainer.accelerator
    if not trainer.is_main_process or trainer.output_dir is None:
        return
    device, processes = device_name(accelerator.device), accelerator.num_processes
    write_start(
        trainer.output_dir,
        step=trainer.global_step,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        resumed_from=None if resumed_from is None else str(resumed_from),
        environment=environment(device, processes, accelerator.mixed_precision),
        config=dataclasses.asdict(config),
    )


def _tell(trainer: Trainer, **status: object) -> None:
    if trainer.is_main_process and trainer.output_dir is not None:
        about = {"step": trainer.global_step, "total_steps": trainer.total_steps, "pid": os.getpid()}
        write_status(trainer.output_dir, **status, **about, host=socket.gethostname())
