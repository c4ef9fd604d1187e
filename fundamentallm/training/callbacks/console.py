"""What a run shows: the progress bar and the log lines."""

from __future__ import annotations

import math
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

from fundamentallm.run.json_lines import append, keep_file
from fundamentallm.training.callbacks.base import Callback

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer


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
