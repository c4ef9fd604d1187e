"""When and how a run saves its checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

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
    Without a checkpoint_dir nothing is saved. `files` returns further text files of a checkpoint, by name.

    Attributes:
        requested: whether to save a checkpoint at the end of this step.
        saved_step: step whose state is on disk, or on its way there; -1: that of none.
    """

    def __init__(
        self,
        config: TrainingConfig,
        state: RunState,
        group: HostGroup,
        is_sharded: bool,
        files: Callable[[], dict[str, str]],
    ) -> None:
        self.state, self.group, self.is_sharded, self.files = state, group, is_sharded, files
        self.requested, self.saved_step = False, -1
        self._is_best = False
        self._shapes: dict[str, Any] | None = None  # of the model, before the first step of a launch
        self.manager: CheckpointManager | None = None
        if config.checkpoint_dir is not None:
            # Processes that save together need a group of their own, because they save in another thread.
            own = HostGroup() if is_sharded else None
            self.manager = CheckpointManager(config.checkpoint_dir, config.keep_last_n, own)

    def request(self, is_best: bool = False) -> None:
        """Asks for a checkpoint at the end of this step. All processes have to ask alike."""
        self.requested, self._is_best = True, self._is_best or is_best

    def save(self, name: str | None = None, is_best: bool = False) -> Path:
        """Saves now, on every process together; see `Trainer.save_checkpoint`."""
        manager = self.manager
        if manager is None:
            raise ConfigError("There is no checkpoint_dir; set training.checkpoint_dir.")
        path = manager.checkpoint_dir / (name or self._name)
        self._on_savers(lambda: manager.save(self.state.state_dict(), path.name, is_best, self.files()))
        if path.name == self._name:
            self.saved_step = self.state.progress.step
        return path

    def save_in_background(self) -> None:
        """Saves the present state in the background, unless it is saved already and is not the best."""
        manager, step = self.manager, self.state.progress.step
        # If a sharded save failed, it failed on all processes, so all of them raise here together.
        saves = self.is_sharded or (self.group.rank == 0 and manager is not None and manager.error is None)
        if manager is not None and saves and (self.saved_step != step or self._is_best):
            manager.save_in_background(self.state.state_dict(), self._name, self._is_best, self.files())
        self.saved_step, self.requested, self._is_best = step, False, False

    def finish(self) -> None:
        """Saves the present state and waits until it is on disk. Raises CheckpointError if it cannot be written."""
        if self.manager is not None:
            self.save_in_background()
            self.saved_step = -1  # if waiting raises
            self._on_savers(self.manager.wait)
            self.saved_step = self.state.progress.step

    def begin(self) -> None:
        """Starts a launch: drops requests. Raises CheckpointError if its state cannot be saved."""
        self.requested = self._is_best = False
        if self.manager is not None:
            self._plan()
            self._shapes = self._shapes_of_model()

    def check_first_step(self) -> None:
        """Raises CheckpointError if the state after a launch's first step cannot be saved, or the disk has no room."""
        manager, before, self._shapes = self.manager, self._shapes, None
        if before is not None and manager is not None:
            now = self._shapes_of_model()
            if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
                what = f"{', '.join(changed)}: made or reshaped by the first step, so that no checkpoint would fit"
                raise CheckpointError(
                    f"{what} a new model. Register each in its final shape, or with persistent=False."
                )
            num_bytes = sum({(local(t).data_ptr(), t.nbytes): t.nbytes for t in self._plan()}.values())  # tied: once
            self.group.from_main(lambda: manager.check_space(num_bytes))

    def _plan(self) -> list[Tensor]:
        """Returns the tensors of a checkpoint. Raises CheckpointError on all processes if it cannot be made."""
        # On all processes: reading its state makes a sharded model drop what a validation left gathered. If only
        # some processes did so, the next forward pass would wait forever.
        with self.group.barrier_with_errors():
            return list(plan(self.state.state_dict(), self.files())[1].values())

    def _shapes_of_model(self) -> dict[str, Any]:
        return {name: getattr(value, "shape", None) for name, value in self.state.model.state_dict().items()}

    def _on_savers(self, action: Callable[[], object]) -> None:
        if self.is_sharded:
            action()
        else:
            self.group.from_main(action)

    @property
    def _name(self) -> str:
        return f"step_{self.state.progress.step:08d}"
