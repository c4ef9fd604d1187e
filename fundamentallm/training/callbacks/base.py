"""Callbacks observe the training; they never change its numbers. `CallbackList` calls them in order."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer

logger = logging.getLogger(__name__)


class Callback:
    """Base class; every hook does nothing. Hooks run on every process, and their exceptions propagate.

    A hook may call `trainer.request_stop(reason)` and `trainer.request_save()`, both of which take effect at
    the end of the optimizer step, after all hooks.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from fundamentallm import Callback, Trainer, TrainingConfig
        >>> numbers = torch.arange(300).reshape(30, 10) % 3
        >>> loader = DataLoader(TensorDataset(numbers, (numbers + 1) % 3), batch_size=4)
        >>> class StopWhenGood(Callback):
        ...     def on_log(self, trainer, metrics):
        ...         if metrics["train_loss"] < 0.5:
        ...             trainer.request_stop("it is good enough")
        >>> model = nn.Sequential(nn.Embedding(3, 8), nn.Linear(8, 3))
        >>> config = TrainingConfig(max_steps=1000, learning_rate=0.1, log_every_n_steps=5)
        >>> history = Trainer(model, config, loader, callbacks=[StopWhenGood()]).train()
        stopped at step ... of 1000: it is good enough
    """

    def on_train_begin(self, trainer: Trainer) -> None:
        """Once, before the first step of this start; the state is restored already."""

    def on_train_end(self, trainer: Trainer) -> None:
        """Once, after the last step and the final checkpoint."""

    def on_train_abort(self, trainer: Trainer) -> None:
        """Instead of `on_train_end`, where an exception ends the training; other processes may be gone already."""

    def on_epoch_begin(self, trainer: Trainer) -> None:
        """Before an epoch's first step, and again where a run resumes within an epoch."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """After an epoch's last step and its validation, before its checkpoint."""

    def on_step_begin(self, trainer: Trainer) -> None:
        """Before each optimizer step; the next one's number is `trainer.global_step + 1`."""

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        """After each optimizer step, with its mean loss over all targets of all processes.

        The loss is read from the device only where some callback overrides this hook.
        """

    def measure(self, trainer: Trainer) -> dict[str, float]:
        """Further numbers of a log line, by name, asked for before `on_log`; the host may wait for the device."""
        return {}

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After every `log_every_n_steps`-th step and the last one, with a line of metrics.jsonl."""

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After each validation during training, with `val_loss` and its companions."""

    def state_dict(self) -> dict[str, Any]:
        """What a restart must know; tensors and JSON. Empty: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class CallbackList:
    """Callbacks in the order in which they are called; a hook may add and remove some, from the next hook on.

    Examples:
        >>> from fundamentallm import CallbackList, LoggingCallback, ProgressCallback
        >>> callbacks = CallbackList([LoggingCallback()])
        >>> callbacks.add(ProgressCallback())  # as trainer.callbacks.add does
        >>> [type(callback).__name__ for callback in callbacks.callbacks]
        ['LoggingCallback', 'ProgressCallback']
    """

    def __init__(self, callbacks: list[Callback] | None = None) -> None:
        self.callbacks = list(callbacks or [])

    def add(self, callback: Callback) -> None:
        """Append a callback."""
        self.callbacks.append(callback)

    def remove(self, callback: Callback) -> None:
        """Take a callback out. Raises ValueError if it is not in the list."""
        self.callbacks.remove(callback)

    def on_train_begin(self, trainer: Trainer) -> None:
        """See `Callback`."""
        for callback in tuple(self.callbacks):
            callback.on_train_begin(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        """See `Callback`."""
        for callback in tuple(self.callbacks):
            callback.on_train_end(trainer)

    def on_train_abort(self, trainer: Trainer) -> None:
        """See `Callback`; what fails here must not hide why the training has ended."""
        for callback in tuple(self.callbacks):
            try:
                callback.on_train_abort(trainer)
            except Exception as error:
                logger.warning("%s failed as the training was aborted: %s", type(callback).__name__, error)

    def on_epoch_begin(self, trainer: Trainer) -> None:
        """See `Callback`."""
        for callback in tuple(self.callbacks):
            callback.on_epoch_begin(trainer)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """See `Callback`."""
        for callback in tuple(self.callbacks):
            callback.on_epoch_end(trainer)

    def on_step_begin(self, trainer: Trainer) -> None:
        """See `Callback`."""
        for callback in tuple(self.callbacks):
            callback.on_step_begin(trainer)

    def measure(self, trainer: Trainer) -> dict[str, float]:
        """What all of them measure."""
        measured: dict[str, float] = {}
        for callback in tuple(self.callbacks):
            measured |= callback.measure(trainer)
        return measured

    @property
    def wants_step_loss(self) -> bool:
        """Whether any callback overrides `on_step_end`."""
        return any(type(callback).on_step_end is not Callback.on_step_end for callback in self.callbacks)

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        """See `Callback`."""
        for callback in tuple(self.callbacks):
            callback.on_step_end(trainer, loss)

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """See `Callback`."""
        for callback in tuple(self.callbacks):
            callback.on_log(trainer, metrics)

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """See `Callback`."""
        for callback in tuple(self.callbacks):
            callback.on_validation_end(trainer, metrics)

    def _named(self) -> dict[str, Callback]:
        """By class name, numbered where a class is there twice."""
        named: dict[str, Callback] = {}
        for callback in self.callbacks:
            name = kind = type(callback).__name__
            while name in named:
                name = f"{kind}_{int(name.removeprefix(kind + '_')) + 1 if name != kind else 2}"
            named[name] = callback
        return named

    def state_dict(self) -> dict[str, Any]:
        """The state of each callback that has any."""
        return {name: state for name, callback in self._named().items() if (state := callback.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore each callback that is in the saved state; one that is on one side only is named in a warning."""
        named = self._named()
        for name in named.keys() & state.keys():
            named[name].load_state_dict(state[name])
        for name in sorted(name for name in named.keys() - state.keys() if named[name].state_dict()):
            logger.warning("the callback %s starts afresh: it is not in the checkpoint.", name)
        for name in sorted(state.keys() - named.keys()):
            logger.warning("the callback %s is in the checkpoint and not in this run.", name)
