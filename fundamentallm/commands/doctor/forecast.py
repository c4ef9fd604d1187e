"""A short trial run that is measured, and the estimate of the whole run that follows from it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.commands.output import plural
from fundamentallm.commands.trial import limit_validation, run_until
from fundamentallm.config.schema import TrainingConfig
from fundamentallm.config.units import duration_text, size_text
from fundamentallm.training.trainer import Trainer

MIN_STEPS, MAX_STEPS, SECONDS = 4, 30, 3.0
WARMUP_STEPS = 2
"""Steps that are not timed: allocations and kernel selection make them slower."""


class Measured(NamedTuple):
    """What a trial run of a few steps measured."""

    total_steps: int  # of the whole run
    step_seconds: float
    micro_batch_size: int
    forecast: list[tuple[str, str]]  # (title, text) of each line of the estimate for the whole run


def measure(trainer: Trainer, training: TrainingConfig) -> Measured:
    """Run a few steps and part of a validation; `training` has the intervals of the whole run."""
    run = run_until(trainer, lambda run: len(run.losses) >= (MIN_STEPS if run.seconds > SECONDS else MAX_STEPS))
    durations = [after - before for before, after in zip(run.times, run.times[1:], strict=False)]
    step_seconds = median(durations[WARMUP_STEPS:] or durations)
    forecast = list(_forecast(trainer, training, step_seconds, run.lines[-1]))
    return Measured(trainer.total_steps, step_seconds, trainer.samples.micro_batch_size, forecast)


def _forecast(
    trainer: Trainer, training: TrainingConfig, step_seconds: float, line: dict[str, float]
) -> Iterator[tuple[str, str]]:
    """Yields (title, text) of each line; `line` is the last log line."""
    steps, device, seconds, best = trainer.total_steps, trainer.accelerator.device.type, 0.0, ""
    text = f"{plural(steps, 'step')} of {duration_text(step_seconds)}"
    if trainer.val_samples is not None:
        all_rows, rows, started = trainer.val_samples.num_samples, limit_validation(trainer), time.perf_counter()
        trainer.validate()
        once = (time.perf_counter() - started) / rows * all_rows
        intervals = training.eval_every_n_steps, (training.eval_every_n_epochs or 0) * trainer.steps_per_epoch
        validations = 1 + sum((steps - 1) // interval for interval in intervals if interval)  # the last step's too
        seconds, best = validations * once, ", the best"
        text += f", {plural(validations, 'validation')} of {duration_text(once)}"
    yield "parameters", f"{sum(parameter.numel() for parameter in trainer.model.parameters()):,}"
    yield "speed", f"{line['tokens'] / line['step'] / step_seconds:,.0f} tokens per second on {device}, 1 process"
    yield "whole run", f"{duration_text(seconds + steps * step_seconds)}: {text}"
    yield "peak memory", f"{size_text(line.get('memory_gb', 0.0) * 1e9)} on {device}"
    checkpoint = CheckpointManager(trainer.config.training.checkpoint_dir or "").get_latest()
    size = sum(file.stat().st_size for file in checkpoint.iterdir()) if checkpoint else 0
    kept = training.keep_last_n
    total = kept + bool(best) + 1
    yield "checkpoint", size_text(size)
    yield "disk", f"{size_text(total * size)} for up to {total} checkpoints (last {kept}{best}, the one being written)"
