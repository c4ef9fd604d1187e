"""Callbacks observe the training; they never change its numbers. `CallbackList` calls them in order."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

from fundamentallm.config import Config, TrainingConfig
from fundamentallm.errors import ConfigError
from fundamentallm.training.early_stopping import improves, saved_best
from fundamentallm.training.json_lines import append, rewind

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


def shows_bar() -> bool:
    """Whether somebody sees a bar move: on a terminal, or in a notebook that has ipywidgets. In a file it is noise."""
    return sys.stderr.isatty() or issubclass(tqdm, tqdm_notebook)


class ProgressCallback(Callback):
    """A tqdm bar over the optimizer steps, on a terminal or in a notebook, on the main process: loss, learning rate,
    tokens per second, the part of the devices' peak used (where it is known), memory, time left.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from fundamentallm import ProgressCallback, Trainer, TrainingConfig
        >>> numbers = torch.arange(300).reshape(30, 10) % 3
        >>> loader = DataLoader(TensorDataset(numbers, (numbers + 1) % 3), batch_size=4)
        >>> history = Trainer(nn.Embedding(3, 3), TrainingConfig(), loader, callbacks=[ProgressCallback()]).train()
    """

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def on_train_begin(self, trainer: Trainer) -> None:
        """Open the bar at the step the run goes on from."""
        self._bar = tqdm(
            total=trainer.total_steps,
            initial=trainer.global_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not (trainer.is_main_process and shows_bar()),
        )

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {metrics['train_loss']:.4f}, lr {metrics['learning_rate']:.2e}, "
                f"{_short(metrics['tokens_per_second'])} tok/s"
                + (f", {metrics['mfu']:.1%} MFU" if "mfu" in metrics else "")
                + (f", {metrics['memory_gb']:.3g} GB" if "memory_gb" in metrics else ""),
                refresh=False,
            )
            self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: Trainer) -> None:
        """Close the bar where the run ended."""
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)
            self._bar.close()


class LoggingCallback(Callback):
    """Log lines on the console and, with a path, as JSON lines in full precision; on the main process.

    A resumed run goes on in the same file: lines after the step it resumes from are dropped, since those
    steps are made again. Numbers that JSON lacks are the texts "NaN", "Infinity" and "-Infinity".

    Examples:
        >>> import json
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from fundamentallm import LoggingCallback, Trainer, TrainingConfig
        >>> numbers = torch.arange(300).reshape(30, 10) % 3
        >>> loader = DataLoader(TensorDataset(numbers, (numbers + 1) % 3), batch_size=4)
        >>> config = TrainingConfig(max_steps=20, log_every_n_steps=10)
        >>> history = Trainer(nn.Embedding(3, 3), config, loader, callbacks=[LoggingCallback("log.jsonl")]).train()
        9 parameters, 1 process on cpu, 20 steps of 4 sequences
        step 10  ...
        >>> [json.loads(line)["step"] for line in open("log.jsonl")]
        [10, 20]
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = Path(path) if path else None

    def on_train_begin(self, trainer: Trainer) -> None:
        """Say what is about to run; bring the file back to the step the run goes on from."""
        if not trainer.is_main_process:
            return
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        device, processes = trainer.accelerator.device.type, trainer.accelerator.num_processes
        sizes = trainer.samples.sizes_from(trainer.global_step)
        tqdm.write(
            f"{_short(parameters)} parameters, {processes} process{'es' * (processes > 1)} on {device}, "
            f"{trainer.total_steps - trainer.global_step} steps of {sizes} sequences"
        )
        if self.path:
            keep_file(trainer, self.path, lambda line: "val_loss" in line)

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """A training line; where there is a progress bar, that shows the same."""
        left = f"  left {_time(trainer.seconds_left)}" if math.isfinite(trainer.seconds_left) else ""
        self._write(trainer, metrics, console=not shows_bar(), more=left)

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """A validation line."""
        self._write(trainer, {"step": trainer.global_step, "epoch": trainer.epochs_done, **metrics}, console=True)

    def _write(self, trainer: Trainer, metrics: dict[str, float], console: bool, more: str = "") -> None:
        if not trainer.is_main_process:
            return
        if console:
            left_out = ("step", "samples", "tokens")
            # Nor what is measured of each block of the model, which would fill the screen.
            shown = {key: value for key, value in metrics.items() if key not in left_out and "/" not in key}
            numbers = "  ".join(f"{key} {_shown(value)}" for key, value in shown.items())
            tqdm.write(f"step {metrics['step']}  {numbers}{more}")
        if self.path:
            append(self.path, metrics)


def keep_file(trainer: Trainer, path: Path, is_of_validation: Callable[[dict[str, Any]], bool]) -> None:
    """Bring a file of lines back to the step that the run goes on from; where lines would be lost, it is kept aside.

    Made again, and dropped, are the lines of later steps, and where that step's validation is due, those it makes.
    """
    step, validation_due = trainer.global_step, trainer.state["progress"].validation_due

    def is_made_again(line: dict[str, Any]) -> bool:
        return bool(line["step"] > step or (line["step"] == step and validation_due and is_of_validation(line)))

    aside = rewind(path, is_made_again, keep_all=trainer.global_step == 0 or trainer.was_rewound)
    if aside is not None:
        trainer.say(f"{path} had lines that would be lost; it is kept as {aside}")


class SaveBestCallback(Callback):
    """Saves a checkpoint, marked as the best, whenever a validation metric improves.

    Args:
        metric: name of the validation metric.
        mode: 'min' where smaller is better, 'max' where larger is.

    Raises:
        ConfigError: if mode is neither.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from fundamentallm import SaveBestCallback, Trainer, TrainingConfig
        >>> numbers = torch.arange(300).reshape(30, 10) % 3
        >>> loader = DataLoader(TensorDataset(numbers, (numbers + 1) % 3), batch_size=4)
        >>> config = TrainingConfig(max_steps=8, eval_every_n_steps=4, checkpoint_dir="checkpoints", learning_rate=0.1)
        >>> trainer = Trainer(nn.Embedding(3, 3), config, loader, loader, callbacks=[SaveBestCallback()])
        >>> history = trainer.train()
        >>> trainer.checkpoint_manager.get_best().name
        'step_00000008'
    """

    def __init__(
        self, metric: str = TrainingConfig.early_stopping_metric, mode: str = TrainingConfig.early_stopping_mode
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError(f"mode is {mode!r}; allowed: min, max.")
        self.metric, self.mode = metric, mode
        self.best_value: float | None = None

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Ask for a checkpoint if the metric improved."""
        if self.metric not in metrics:
            raise ConfigError(f"the metric is {self.metric!r}; allowed: {', '.join(metrics)}.")
        if improves(metrics[self.metric], self.best_value, self.mode):
            self.best_value = metrics[self.metric]
            trainer.request_save(is_best=True)

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and of what."""
        return {"metric": self.metric, "mode": self.mode, "best_value": self.best_value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved best value."""
        best = saved_best(state["best_value"])
        if (state["metric"], state["mode"]) == (self.metric, self.mode):
            self.best_value = best
        else:
            logger.warning("the best starts afresh: it was of %s (%s) before.", state["metric"], state["mode"])


def default_callbacks(config: Config | TrainingConfig, has_validation: bool) -> list[Callback]:
    """A progress bar, log lines (in the output_dir of a whole `Config`), and keeping the best checkpoint."""
    training = config.training if isinstance(config, Config) else config
    path = Path(config.output_dir) / "metrics.jsonl" if isinstance(config, Config) else None
    callbacks: list[Callback] = [ProgressCallback(), LoggingCallback(path)]
    if has_validation and training.checkpoint_dir is not None:
        callbacks.append(SaveBestCallback(training.early_stopping_metric, training.early_stopping_mode))
    return callbacks


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _short(number: float) -> str:
    """1234567 as 1.23M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _time(seconds: float) -> str:
    """4000 as 1:06:40."""
    return str(timedelta(seconds=round(seconds)))
