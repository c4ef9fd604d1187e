"""The console output of a run: a progress bar and log lines."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

from fundamentallm.config.units import duration_text
from fundamentallm.run.json_lines import append
from fundamentallm.training.callbacks.base import Callback, RunView, rewind_lines


def shows_bar() -> bool:
    """Whether a progress bar can move: on a terminal, or in a notebook that has ipywidgets."""
    return sys.stderr.isatty() or issubclass(tqdm, tqdm_notebook)


class ProgressCallback(Callback):
    """Shows a progress bar over the optimizer steps on the main process, if the output is a terminal or a notebook.

    The bar shows loss, learning rate, tokens per second, MFU (if the device's peak is known), memory and time left.

    Examples:
        >>> from fundamentallm import ProgressCallback
        >>> callbacks = [ProgressCallback()]  # for a Trainer
    """

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def on_train_begin(self, trainer: RunView) -> None:
        """Open the bar at the step that the run resumes from."""
        self._bar = tqdm(
            total=trainer.total_steps,
            initial=trainer.global_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not (trainer.is_main_process and shows_bar()),
        )

    def on_log(self, trainer: RunView, metrics: dict[str, float]) -> None:
        """Move the bar."""
        if self._bar is None:
            return
        shown = [
            f"loss {metrics['train_loss']:.4f}",
            f"lr {metrics['learning_rate']:.2e}",
            f"{_short(metrics['tokens_per_second'])} tok/s",
        ]
        if "mfu" in metrics:
            shown.append(f"{metrics['mfu']:.1%} MFU")
        if "memory_gb" in metrics:
            shown.append(f"{metrics['memory_gb']:.3g} GB")
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: RunView) -> None:
        """Close the bar at the last step done."""
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)
            self._bar.close()


class LoggingCallback(Callback):
    """Prints log lines on the main process and, with a path, appends them to a file of JSON lines in full precision.

    A resumed run continues the file: lines after the step it resumes from are dropped, because those steps are
    repeated. Numbers that JSON lacks are stored as the texts "NaN", "Infinity" and "-Infinity".

    Examples:
        >>> from fundamentallm import LoggingCallback
        >>> callbacks = [LoggingCallback("log.jsonl")]  # for a Trainer
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = Path(path) if path else None

    def on_train_begin(self, trainer: RunView) -> None:
        """Print what is about to run, and rewind the file to the step that the run resumes from."""
        if not trainer.is_main_process:
            return
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        device, processes = trainer.accelerator.device.type, trainer.accelerator.num_processes
        trainer.say(
            f"{_short(parameters)} parameters, {processes} process{'es' * (processes > 1)} on {device}, "
            f"{trainer.total_steps - trainer.global_step} steps of "
            f"{trainer.samples.sizes_from(trainer.global_step)} sequences"
        )
        if self.path:
            rewind_lines(trainer, self.path)

    def on_log(self, trainer: RunView, metrics: dict[str, float]) -> None:
        """Write a training line. It is not printed if there is a progress bar, which shows the same."""
        suffix = f"  left {duration_text(trainer.seconds_left)}" if math.isfinite(trainer.seconds_left) else ""
        self._write(trainer, metrics, suffix, is_printed=not shows_bar())

    def on_validation_end(self, trainer: RunView, metrics: dict[str, float]) -> None:
        """Write a validation line."""
        self._write(trainer, {"step": trainer.global_step, "epoch": trainer.epochs_done, **metrics})

    def _write(self, trainer: RunView, line: dict[str, float], suffix: str = "", is_printed: bool = True) -> None:
        if not trainer.is_main_process:
            return
        if is_printed:
            # Names with a slash are measured for each block of the model and would fill the screen.
            names = [name for name in line if name not in ("step", "samples", "tokens") and "/" not in name]
            numbers = "  ".join(f"{name} {_rounded(line[name])}" for name in names)
            trainer.say(f"step {line['step']}  {numbers}{suffix}")
        if self.path:
            append(self.path, {**line, "time": round(time.time(), 3)})


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _short(number: float) -> str:
    """Returns 1.23M for 1234567."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
