"""The console output of a run: a progress bar and log lines."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fundamentallm.run.folder import LineFile
from fundamentallm.training.callbacks.base import Callback, RunView, rewind_lines
from fundamentallm.training.metrics import MEASURED


class ProgressCallback(Callback):
    """Shows a progress bar over the optimizer steps on the main process, if the output is a terminal or a notebook.

    It moves with each step, and shows the loss of the last log line.

    Examples:
        >>> from fundamentallm import ProgressCallback
        >>> callbacks = [ProgressCallback()]  # for a Trainer
    """

    def __init__(self) -> None:
        self._bar: tqdm[Any] = tqdm(disable=True)

    def on_train_begin(self, trainer: RunView) -> None:
        # None: unless it is a terminal or a notebook. stderr is None if it was closed.
        disable = None if trainer.is_main_process and sys.stderr is not None else True
        total, initial = trainer.total_steps, trainer.global_step
        self._bar = tqdm(
            total=total, initial=initial, desc="training", unit="step", dynamic_ncols=True, disable=disable
        )

    def on_step_begin(self, trainer: RunView) -> None:
        # `on_step_end` would make the host wait for the device.
        self._bar.update(trainer.global_step - self._bar.n)

    def on_log(self, trainer: RunView, metrics: dict[str, float]) -> None:
        self._bar.set_postfix_str(f"loss {metrics['train_loss']:.3f}", refresh=False)

    def on_train_end(self, trainer: RunView) -> None:
        self._bar.update(trainer.global_step - self._bar.n)
        self._bar.close()

    on_train_abort = on_train_end


class LoggingCallback(Callback):
    """Prints log lines on the main process and, with a path, appends them to a file of JSON lines in full precision.

    A resumed run continues the file: lines after the step it resumes from are dropped. A resume fails if lines that the
    checkpoint counts on are missing. Numbers that JSON lacks are the texts "NaN", "Infinity" and "-Infinity".

    Examples:
        >>> from fundamentallm import LoggingCallback
        >>> callbacks = [LoggingCallback("log.jsonl")]  # for a Trainer
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = Path(path) if path else None
        self._file = LineFile(self.path, MEASURED) if self.path else None

    def on_train_begin(self, trainer: RunView) -> None:
        if not trainer.is_main_process:
            return
        accelerator, group, sizes = trainer.accelerator, trainer.optimizer.param_groups[0], trainer.samples.sizes
        parameters = _short(sum(parameter.numel() for parameter in trainer.model.parameters()))
        processes = f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)}"
        rate = float(group.get("initial_lr", group["lr"]))  # which the schedule multiplies
        output = "" if trainer.output_dir is None else f"; everything is written to {trainer.output_dir}"
        trainer.say(
            f"{parameters} parameters in {accelerator.mixed_precision.replace('no', 'float32')}, {processes} on "
            f"{accelerator.device.type}, {type(trainer.optimizer).__name__} with peak learning rate {rate:.1e}\n"
            f"{trainer.total_steps - trainer.global_step} steps of {sizes[0]}{f' to {sizes[-1]}' * (len(sizes) > 1)} "
            f"sequences{output}"
        )
        training = trainer.config.training
        if trainer.samples.stream is not None and training.checkpoint_dir and training.save_every_n_steps is None:
            trainer.say("warning: a stream has no epochs: without training.save_every_n_steps, only the end is saved.")
        if self._file is not None:
            rewind_lines(trainer, self._file)

    def on_log(self, trainer: RunView, metrics: dict[str, float]) -> None:
        self._write(trainer, metrics, trainer.seconds_left)

    def on_validation_end(self, trainer: RunView, metrics: dict[str, float]) -> None:
        self._write(trainer, {"step": trainer.global_step, "epoch": trainer.epochs_done, **metrics})

    def state_dict(self) -> dict[str, Any]:
        return {} if self._file is None else self._file.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.load_state_dict(state)

    def _write(self, trainer: RunView, line: dict[str, float], seconds_left: float = math.nan) -> None:
        if trainer.is_main_process:
            trainer.say(console_line(line, trainer.total_steps, seconds_left))
            if self._file is not None:
                self._file.append({**line, "time": round(time.time(), 3)})


SHOWN = {
    "train_loss": lambda value: f"loss {value:.3f}",
    "learning_rate": lambda value: f"lr {value:.1e}",
    "grad_norm": lambda value: f"grad {value:.2f}",
    "tokens_per_second": lambda value: f"{_short(value)} tok/s",
    "mfu": lambda value: f"{value:.0%} MFU",
    "memory_gb": lambda value: f"{value:.2f} GB",
    "bad_steps": lambda value: f"{value:.0f} bad steps" if value else "",
    "skipped_spikes": lambda value: f"{value:.0f} spikes skipped" if value else "",
}
"""How a number of a log line is printed. Others are printed with their names."""


def console_line(line: dict[str, float], total_steps: int, seconds_left: float = math.nan) -> str:
    """Returns a log line as the console shows it, aligned with the others.

    Examples:
        >>> console_line({"step": 60, "train_loss": 4.7568, "learning_rate": 4e-4, "grad_norm": 0.788}, 120, 12.3)
        'step  60/120 | loss 4.757 | lr 4.0e-04 | grad 0.79 | 0:12 left'
    """
    total = f"{total_steps}"
    parts = [f"step {line['step']:>{len(total)}}/{total}"]
    for name, value in line.items():
        # Names with a slash, such as numbers of each layer, would fill the screen.
        if name not in ("step", "epoch", "samples", "tokens") and "/" not in name:
            parts.append(SHOWN[name](value) if name in SHOWN else f"{name} {value:.4g}")
    if math.isfinite(seconds_left):
        parts.append(f"{tqdm.format_interval(seconds_left).removeprefix('0')} left")
    return " | ".join(part for part in parts if part)


def _short(number: float) -> str:
    """Returns 1.23M for 1234567, and 120 for 119.9."""
    return tqdm.format_sizeof(number).replace("G", "B")
