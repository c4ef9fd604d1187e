"""Callbacks observe a run without changing its numbers. `RunView` is what they see, `CallbackList` calls them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fundamentallm.config.schema import Config
from fundamentallm.data.loaders import ValidationLoaders
from fundamentallm.data.sampler import StepSampler
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.run.folder import LineFile, repeats_all_launches
from fundamentallm.training.early_stopping import BestValue
from fundamentallm.training.metrics import MetricTracker

logger = logging.getLogger(__name__)


class RunView(Protocol):
    """What a callback may read of a run and ask of it. The `Trainer` has all of it, and so may a stub in a test."""

    model: nn.Module  # not wrapped; its parameters are sharded under FSDP2
    optimizer: Optimizer
    accelerator: Accelerator
    config: Config  # resolved
    output_dir: Path | None  # None: the run has no folder
    train_loader: DataLoader[Any]
    val_loader: ValidationLoaders | None
    samples: StepSampler  # which samples each step sees
    metrics: MetricTracker  # the history so far
    total_steps: int
    was_rewound: bool  # resumed from a checkpoint older than the newest one

    @property
    def global_step(self) -> int: ...  # optimizer steps done

    @property
    def epochs_done(self) -> float: ...  # passes over the training data done

    @property
    def seconds_left(self) -> float: ...  # to the last step; NaN until there is an estimate

    @property
    def is_main_process(self) -> bool: ...  # whether this process prints and writes files

    @property
    def resumed_from(self) -> Path | None: ...  # the checkpoint that the state was restored from

    def say(self, text: str) -> None:
        """Print a line above the progress bar, on the main process only."""

    def request_stop(self, reason: str) -> None:
        """Save and stop at the end of this step."""

    def request_save(self, is_best: bool = False) -> None:
        """Save a checkpoint at the end of this step. Every process must call it."""

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Give the model the averaged weights on entry and its own on exit. Does nothing without an average."""


class Callback:
    """Base class whose hooks do nothing. Hooks run on every process, and their exceptions end the training.

    A hook may call `trainer.request_stop(reason)` and `trainer.request_save()`. Both take effect at the end of the
    optimizer step, after all hooks. The `trainer` of a hook is the Trainer; see `RunView` for what a callback may use.

    Examples:
        >>> from fundamentallm import Callback
        >>> class StopWhenGood(Callback):
        ...     def on_log(self, trainer, metrics):
        ...         if metrics["train_loss"] < 0.5:
        ...             trainer.request_stop("it is good enough")
        >>> callbacks = [StopWhenGood()]  # for a Trainer
    """

    def on_train_begin(self, trainer: RunView) -> None:
        """Called once per launch, after the state was restored and before the first step."""

    def on_train_end(self, trainer: RunView) -> None:
        """Called once per launch, after the last step and the final checkpoint."""

    def on_train_abort(self, trainer: RunView) -> None:
        """Called instead of `on_train_end` if an exception ends the training. Other processes may have died."""

    def on_epoch_begin(self, trainer: RunView) -> None:
        """Called before an epoch's first step, and when a run resumes within an epoch."""

    def on_epoch_end(self, trainer: RunView) -> None:
        """Called after an epoch's last step and its validation, before its checkpoint."""

    def on_step_begin(self, trainer: RunView) -> None:
        """Called before each optimizer step, whose number is `trainer.global_step + 1`."""

    def on_step_end(self, trainer: RunView, loss: float) -> None:
        """Called after each optimizer step with its mean loss per target. Makes the host wait for the device."""

    def measure(self, trainer: RunView) -> dict[str, float]:
        """Returns additional numbers for a log line. Called before `on_log`, when the host waits for the device."""
        return {}

    def on_log(self, trainer: RunView, metrics: dict[str, float]) -> None:
        """Called after every `log_every_n_steps`-th step and the last one, with a line of metrics.jsonl."""

    def on_validation_end(self, trainer: RunView, metrics: dict[str, float]) -> None:
        """Called after each validation during training, with `val_loss` and the other validation metrics."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a checkpoint keeps, as tensors and JSON values; {} if there is none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class CallbackList:
    """Callbacks in the order in which they are called. A hook may add and remove some; the next hook sees the change.

    Examples:
        >>> from fundamentallm import CallbackList, LoggingCallback, ProgressCallback
        >>> callbacks = CallbackList([LoggingCallback()])
        >>> callbacks.add(ProgressCallback())  # as trainer.callbacks.add does
    """

    def __init__(self, callbacks: list[Callback] | None = None) -> None:
        self.callbacks = list(callbacks or [])

    def add(self, callback: Callback) -> None:
        """Append a callback."""
        self.callbacks.append(callback)

    def remove(self, callback: Callback) -> None:
        """Remove a callback. Raises ValueError if it is not in the list."""
        self.callbacks.remove(callback)

    def __getattr__(self, hook: str) -> Callable[..., None]:
        """Returns a function that calls this hook of all callbacks. See `Callback` for the hooks."""
        if not hasattr(Callback, hook):
            raise AttributeError(f"{hook!r} is not a hook of Callback")

        def call(*arguments: Any) -> None:
            for callback in tuple(self.callbacks):  # a copy, because a hook may change the list
                try:
                    getattr(callback, hook)(*arguments)
                except Exception as error:
                    if hook != "on_train_abort":  # whose errors would hide the one that ended the training
                        raise
                    logger.warning("%s failed while the training was aborted: %s", type(callback).__name__, error)

        return call

    def measure(self, trainer: RunView) -> dict[str, float]:
        """Returns the numbers of all callbacks."""
        return {name: value for callback in self.callbacks for name, value in callback.measure(trainer).items()}

    @property
    def wants_step_loss(self) -> bool:
        """Whether any callback overrides `on_step_end`."""
        return any(type(callback).on_step_end is not Callback.on_step_end for callback in self.callbacks)

    def _by_name(self) -> dict[str, Callback]:
        """Returns the callbacks by class name, of which the second is numbered _2, and so on."""
        names = [type(callback).__name__ for callback in self.callbacks]
        numbers = [names[:index].count(name) + 1 for index, name in enumerate(names)]
        names = [name if number == 1 else f"{name}_{number}" for name, number in zip(names, numbers, strict=True)]
        return dict(zip(names, self.callbacks, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of each callback that has any, by name."""
        return {name: state for name, callback in self._by_name().items() if (state := callback.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the callbacks that are in the saved state, and warn of each one that is missing on either side."""
        named = self._by_name()
        for name in sorted((self.state_dict().keys() - state.keys()) | (state.keys() - named.keys())):
            logger.warning("callback %s starts new or is left out: the checkpoint or this run does not have it.", name)
        for name in named.keys() & state.keys():
            named[name].load_state_dict(state[name])


class SaveBestCallback(BestValue, Callback):
    """Saves a checkpoint, marked as the best, whenever a validation metric improves. See `EarlyStopping` for arguments.

    Examples:
        >>> from fundamentallm import SaveBestCallback
        >>> callbacks = [SaveBestCallback("val_loss")]  # for a Trainer; trainer.checkpoint_manager.get_best() is it
    """

    def on_validation_end(self, trainer: RunView, metrics: dict[str, float]) -> None:
        if self.metric not in metrics:
            raise ConfigError([Problem("metric", self.metric, allowed=", ".join(metrics))])
        if self.improve(metrics[self.metric]):
            trainer.request_save(is_best=True)


def rewind_lines(trainer: RunView, file: LineFile) -> None:
    """Drop the lines of a file that the run writes again, with a copy of lines that belong to another run.

    Raises CheckpointError if the file lacks lines that the checkpoint counts on, unless `resume_changes` allows it.
    """
    step, training, resumed_from = trainer.global_step, trainer.config.training, trainer.resumed_from
    # A checkpoint of another folder counts on the log there.
    is_own = resumed_from is None or resumed_from.parent == Path(training.checkpoint_dir or "")
    is_repeated = trainer.output_dir is not None and repeats_all_launches(trainer.output_dir)
    keep_copy = (step == 0 and not is_repeated) or trainer.was_rewound
    # Without a history, not even a line of step 0 (`eval_at_start`) is this run's.
    last = step if step or trainer.metrics.metrics else -1
    if message := file.rewind(last, is_own, "log" in training.resume_changes, keep_copy):
        trainer.say(message)
