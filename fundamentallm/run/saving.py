"""When and how a run saves its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.checkpoint.snapshot import plan
from fundamentallm.config.schema import TrainingConfig
from fundamentallm.distributed.dtensor import local
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import CheckpointError, ConfigError
from fundamentallm.run.state import RunState


class Saver:
    """Saves the state of a run: on request, when due, and at its end.

    A sharded state is saved by all processes together, each writing its shards. Otherwise the main process saves alone.
    Without a manager nothing is saved. `files` returns further text files of a checkpoint, by name.
    """

    def __init__(
        self, manager: CheckpointManager | None, state: RunState, group: HostGroup, files: Callable[[], dict[str, str]]
    ) -> None:
        self.manager, self.state, self.group, self.files = manager, state, group, files
        self.requested = False  # a checkpoint at the end of this step
        self._is_best = False
        self._saved_step = -1
        self._shapes: dict[str, Any] | None = None  # of the model, before the first step of a launch

    @property
    def is_sharded(self) -> bool:
        """Whether each process writes a part of every checkpoint."""
        return self.manager is not None and self.manager.group.size > 1

    @property
    def is_current(self) -> bool:
        """Whether the present state is on disk already."""
        return self._saved_step == self.state.progress.step

    def request(self, is_best: bool = False) -> None:
        """Asks for a checkpoint at the end of this step. All processes have to ask alike."""
        self.requested, self._is_best = True, self._is_best or is_best

    def mark_saved(self, is_saved: bool = True) -> None:
        """Notes whether the present state is on disk. A validation that is due changes it."""
        progress = self.state.progress
        self._saved_step = progress.step if is_saved and not progress.validation_due else -1

    def save(self, name: str | None = None, is_best: bool = False) -> Path:
        """Saves now, on every process together; see `Trainer.save_checkpoint`."""
        manager, default = self.manager, self._name
        if manager is None:
            raise ConfigError("There is no checkpoint_dir; set training.checkpoint_dir.")
        name = name or default
        self._on_savers(lambda: manager.save(self.state.state_dict(), name, is_best, self.files()))
        if name == default:
            self._saved_step = self.state.progress.step
        return manager.checkpoint_dir / name

    def save_in_background(self) -> None:
        """Saves the present state in the background, unless it is saved already and is not the best."""
        manager = self.manager
        if manager is not None and (not self.is_current or self._is_best):
            # If a sharded save failed, it failed on all processes, so all of them raise here together.
            if self.is_sharded or (self.group.rank == 0 and not manager.has_failed):
                manager.save_in_background(self.state.state_dict(), self._name, self._is_best, self.files())
            self._saved_step = self.state.progress.step
        self.requested = self._is_best = False

    def finish(self) -> None:
        """Saves the present state and waits until it is on disk. Raises CheckpointError if it cannot be written."""
        if self.manager is None:
            return
        self.save_in_background()
        saved, self._saved_step = self._saved_step, -1  # not saved if waiting raises
        self._on_savers(self.manager.wait)
        self._saved_step = saved

    def begin(self) -> None:
        """Starts a launch: drops requests, and lets `check_first_step` check its first step.

        Raises:
            CheckpointError: if the state cannot be saved.
        """
        self.requested = self._is_best = False
        if self.manager is not None:
            self._plan()
            self._shapes = self._shapes_of_model()

    def check_first_step(self) -> None:
        """Raises CheckpointError if after a launch's first step its state cannot be saved, or loaded by a new model."""
        manager, before, self._shapes = self.manager, self._shapes, None
        if manager is None or before is None:
            return
        now = self._shapes_of_model()
        if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            raise CheckpointError(
                f"{', '.join(changed)}: made or reshaped by the first step, so that no checkpoint would fit a new "
                "model. Register each as a tensor of its final shape, or with persistent=False."
            )
        tensors = self._plan().values()
        num_bytes = sum({(local(t).data_ptr(), t.nbytes): t.nbytes for t in tensors}.values())  # tied: once
        self.group.from_main(lambda: manager.check_space(num_bytes))

    def _plan(self) -> dict[str, Any]:
        """Returns the tensors of a checkpoint. Raises CheckpointError on all processes if it cannot be made."""
        # On all processes: reading its state makes a sharded model drop what a validation left gathered. If only
        # some processes did so, the next forward pass would wait forever.
        with self.group.barrier_with_errors():
            return plan(self.state.state_dict(), self.files())[1]

    def _shapes_of_model(self) -> dict[str, Any]:
        return {name: getattr(value, "shape", None) for name, value in self.state.model.state_dict().items()}

    def _on_savers(self, action: Callable[[], object]) -> None:
        """Runs `action` on every process that saves; errors are raised on all processes."""
        if self.is_sharded:
            action()
        else:
            self.group.from_main(action)

    @property
    def _name(self) -> str:
        return f"step_{self.state.progress.step:08d}"


def open_manager(config: TrainingConfig, is_sharded: bool) -> CheckpointManager | None:
    """Returns what writes the checkpoints, or None if there is no checkpoint_dir."""
    if config.checkpoint_dir is None:
        return None
    # Processes that save together need a group of their own, because they save in another thread.
    return CheckpointManager(config.checkpoint_dir, config.keep_last_n, HostGroup() if is_sharded else None)
