"""What callbacks and other readers see of a Trainer: where the run is, and what they may ask for."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.config.schema import Config
from fundamentallm.errors import ConfigError, Problem, printable
from fundamentallm.run.folder import command
from fundamentallm.run.progress import Progress
from fundamentallm.run.session import Stop, StopSwitch
from fundamentallm.run.state import RunState, Saver
from fundamentallm.training.callbacks.base import RunView
from fundamentallm.training.early_stopping import EarlyStopping
from fundamentallm.training.ema import WeightAverage
from fundamentallm.training.throughput import Throughput


class TrainerView(RunView):
    """The side of the Trainer that callbacks see. Everything it says follows from the run's state."""

    config: Config
    early_stopping: EarlyStopping | None
    average: WeightAverage | None
    state: RunState
    saver: Saver
    stop_switch: StopSwitch
    _throughput: Throughput

    @property
    def _progress(self) -> Progress:
        return self.state.progress

    @property
    def global_step(self) -> int:
        """Optimizer steps done."""
        return self._progress.step

    @property
    def current_epoch(self) -> int:
        """Index of the epoch that the next step belongs to, from 0."""
        return self.samples.at(self.global_step).epoch

    @property
    def epochs_done(self) -> float:
        """Passes over the training data done, in samples."""
        return self.samples.epochs_before(self.global_step)

    @property
    def validation_due(self) -> bool:
        """Whether the last step's validation was interrupted, and comes first when the run resumes."""
        return self._progress.validation_due

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that prints, draws and writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a shard of the weights."""
        return bool(self.accelerator.is_fsdp2)

    @property
    def is_finished(self) -> bool:
        """Whether the run has reached its last step, or early stopping has ended it."""
        out_of_patience = self.early_stopping is not None and self.early_stopping.should_stop
        return (self.global_step >= self.total_steps and not self.validation_due) or out_of_patience

    @property
    def was_interrupted(self) -> bool:
        """Whether a signal or `max_minutes` ended the last `train()`. The same command resumes the run."""
        return not self.is_finished and self.stop_switch.agreed in (Stop.SIGNAL, Stop.OUT_OF_TIME)

    @property
    def seconds_left(self) -> float:
        """Seconds to the last step at the present pace; NaN before this launch's second log line."""
        return self._throughput.seconds_left(self.total_steps - self.global_step)

    @property
    def checkpoint_manager(self) -> CheckpointManager | None:
        """The run's checkpoints; None if nothing is saved."""
        return self.saver.manager

    @property
    def resumed_from(self) -> Path | None:
        """The checkpoint that the state was restored from, or None."""
        return self.state.loaded_from

    @property
    def history(self) -> dict[str, list[float]]:
        """The numbers of the run so far, as `pandas.DataFrame(trainer.history)` takes them.

        Each step that was logged or validated has a row. A value that a row lacks is NaN.
        """
        return self.metrics.by_step()

    def _set_max_steps(self, max_steps: int) -> None:
        """Gives the run another end. Raises ConfigError if it lies behind the run."""
        if max_steps < self.global_step:
            raise ConfigError(Problem("max_steps", max_steps, f"at least {self.global_step}, the steps done"))
        training = replace(self.config.training, max_steps=max_steps, max_epochs=None)
        self.config = replace(self.config, training=training)
        self.state.config = asdict(training if self.output_dir is None else self.config)

    @property
    def _is_at_epoch(self) -> bool:
        """Whether the last step ended an epoch, maybe one whose end is left out by `data.skip`."""
        before, at = (self.samples.at(self.global_step, is_before_skip) for is_before_skip in (True, False))
        return 0 in (before.place, at.place) or before.epoch < at.epoch

    def _is_due(self, every_n_steps: int | None, every_n_epochs: int | None) -> bool:
        if self.global_step == 0:  # of `eval_at_start`
            return False
        if every_n_steps is not None and self.global_step % every_n_steps == 0:
            return True
        return every_n_epochs is not None and self._is_at_epoch and self.current_epoch % every_n_epochs == 0

    def _position(self) -> dict[str, Any]:
        """Returns how far the run is, and in which state and why it would end now, for status.json."""
        state = "finished" if self.is_finished else "interrupted" if self.was_interrupted else "stopped"
        counts = {"step": self.global_step, "total_steps": self.total_steps}
        return {"state": state, **counts, "reason": self.stop_switch.reason}

    def request_stop(self, reason: str) -> None:
        """Stops the run at the end of this step, saved, or one later if not all processes ask in `on_step_end`."""
        self.stop_switch.request(Stop.REQUESTED, reason)

    def request_save(self, is_best: bool = False) -> None:
        """Saves a checkpoint at the end of this step, after all hooks. All processes have to ask alike."""
        self.saver.request(is_best)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Gives `model` the averaged weights on entry, and its own on exit. Without `ema_decay` it does nothing."""
        return self.average.applied() if self.average is not None else nullcontext()

    def say(self, text: str) -> None:
        """Prints a line beside the progress bar, on the main process only. Output that cannot be written is dropped."""
        if self.is_main_process:
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            with suppress(OSError, ValueError):  # ValueError: it is closed
                tqdm.write(printable(text).encode(encoding, "backslashreplace").decode(encoding))

    def describe_stop(self) -> str:
        """Returns where and why the run stopped, where it is saved, and how to resume it."""
        text = f"stopped at step {self.global_step}/{self.total_steps}: {self.stop_switch.reason}"
        if self.checkpoint_manager is not None and not self.is_finished:
            text += f"; saved in {self.checkpoint_manager.get_latest()}\nto resume: {command()}"
        return text

    def _describe_finished_run(self) -> str:
        """Returns that there is nothing to train, and what would change that."""
        where = f"This run is already finished, at step {self.global_step} of {self.total_steps}. To train longer,"
        if self.checkpoint_manager is None:
            return f"{where} call trainer.train(max_steps=...)."
        longer = "max_steps (or max_epochs), and name it in training.resume_changes"
        longer = "early_stopping_patience" if self.global_step < self.total_steps else longer
        return f"{where} raise training.{longer}. To start over, choose another output_dir (and mirror)."
