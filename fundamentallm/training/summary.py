"""A trainer in a few lines: what a notebook shows where one is the value of a cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fundamentallm.training.schedulers import StepSchedule

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer


def summary(trainer: Trainer) -> str:
    """Where the run is, what it trains, on what and how; the host does not wait for the device."""
    training, validation = trainer.config, trainer.val_samples
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    processes = trainer.accelerator.num_processes
    latest = {name: trainer.metrics.get_latest(name) for name in ("train_loss", "val_loss")}
    rate = f"learning rate {float(trainer.scheduler.get_last_lr()[0]):.3g}"
    is_own = isinstance(trainer.scheduler, StepSchedule)
    schedule = training.lr_scheduler if is_own else type(trainer.scheduler).__name__
    lines = {
        "model": f"{type(trainer.model).__name__}, {parameters:,} parameters, precision {training.mixed_precision}",
        "device": f"{trainer.accelerator.device}, {processes} process{'es' * (processes > 1)}",
        "data": f"{trainer.samples.num_samples:,} samples, {trainer.samples.sizes_from(trainer.global_step)} in a step"
        + ("" if validation is None else f"; validation {validation.num_samples:,}"),
        "optimizer": f"{type(trainer.optimizer).__name__}, {schedule}, {rate}",
        "latest": ", ".join(f"{name} {value:.4g}" for name, value in latest.items() if value is not None) or "nothing",
        "saved in": training.checkpoint_dir or "nothing is saved",
    }
    head = f"Trainer at step {trainer.global_step:,} of {trainer.total_steps:,}, epoch {trainer.epochs_done:.3g}"
    return "\n".join([head, *(f"  {name:9}  {text}" for name, text in lines.items())])
