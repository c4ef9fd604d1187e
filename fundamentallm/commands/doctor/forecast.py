"""A short real run that is watched: which gradients arrive, how fast it is, and what the whole run will take."""

from __future__ import annotations

import functools
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fundamentallm.commands.trial import Until, few_rows, run_until, use_validation
from fundamentallm.config.schema import Config, TrainingConfig
from fundamentallm.training.trainer import Trainer

AT_LEAST, AT_MOST, SECONDS = 4, 30, 3.0
"""Steps of a rehearsal: at least, at most, and for how long."""


@dataclass(frozen=True)
class Rehearsal:
    """What a few steps have shown."""

    device: str
    steps: int
    total_steps: int
    steps_per_epoch: int
    parameters: int
    without_gradient: tuple[str, ...]
    """Trainable parameters whose gradient never came, or was zero at every step."""
    step_seconds: float
    tokens_per_step: float
    validation_seconds: float
    """One validation of the whole validation data; 0 where there is none."""
    peak_bytes: int
    checkpoint_bytes: int
    has_validation: bool


def rehearse(trainer: Trainer) -> Rehearsal:
    """Run a few steps of the training and a little validation."""
    device, model = trainer.accelerator.device, trainer.model
    waiting = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    _watch_gradients(model, waiting)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run = run_until(trainer, _enough)
    return Rehearsal(
        device=device.type,
        steps=len(run.losses),
        total_steps=trainer.total_steps,
        steps_per_epoch=trainer.samples.steps_per_epoch,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        without_gradient=tuple(name for name, _ in model.named_parameters() if name in waiting),
        step_seconds=_step_seconds(run),
        tokens_per_step=run.lines[-1]["tokens"] / run.lines[-1]["step"],
        validation_seconds=_validation_seconds(trainer),
        peak_bytes=_peak_bytes(device),
        checkpoint_bytes=sum(
            tensor.nbytes for part in trainer.state.parts.values() for tensor in _tensors(part.state_dict())
        ),
        has_validation=trainer.val_loader is not None,
    )


def forecast(config: Config, seen: Rehearsal) -> Iterator[tuple[str, str]]:
    """(title, text) of each line about the whole run."""
    training = config.training
    validations = _validations(seen, training) if seen.has_validation else 0
    seconds = seen.total_steps * seen.step_seconds + validations * seen.validation_seconds
    steps = f"{seen.total_steps:,} step{'s' * (seen.total_steps != 1)} of {_duration(seen.step_seconds)}"
    if validations:
        steps += f", {validations:,} validation{'s' * (validations > 1)} of {_duration(seen.validation_seconds)}"
    kept = training.keep_last_n + seen.has_validation + 1
    folder = Path(training.checkpoint_dir or config.output_dir).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    needed = kept * seen.checkpoint_bytes
    yield "parameters", f"{seen.parameters:,}"
    yield "speed", f"{seen.tokens_per_step / seen.step_seconds:,.0f} tokens per second on {seen.device}, 1 process"
    yield "whole run", f"{_duration(seconds)}: {steps}"
    yield "peak memory", f"{_size(seen.peak_bytes)} of {'device' if seen.device == 'cuda' else 'main'} memory"
    yield "checkpoint", f"{_size(seen.checkpoint_bytes)}"
    yield (
        "disk",
        f"{_size(needed)} for up to {kept} checkpoints (last {training.keep_last_n}"
        f"{', best' * seen.has_validation}, the one being written); {_size(free)} free"
        + ("" if needed < free else ": NOT ENOUGH. Free some, or lower training.keep_last_n."),
    )


def _enough(run: Until) -> bool:
    steps, seconds = len(run.losses), run.times[-1] - run.times[0]
    return steps >= AT_MOST or (steps >= AT_LEAST and seconds > SECONDS)


def _watch_gradients(model: nn.Module, waiting: set[str]) -> None:
    """Take each parameter's name out of `waiting` once it gets a gradient that is not all zero."""

    def look(name: str, parameter: Tensor) -> None:
        if name in waiting and parameter.grad is not None and parameter.grad.any():
            waiting.discard(name)

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(functools.partial(look, name))  # type: ignore[no-untyped-call]


def _step_seconds(run: Until) -> float:
    """Median of a step, the first ones left out where there are others: they warm up."""
    durations = [after - before for before, after in zip(run.times, run.times[1:], strict=False)]
    return median(durations[2:] or durations)


def _validation_seconds(trainer: Trainer) -> float:
    loader = trainer.val_loader
    if loader is None:
        return 0.0
    rows = few_rows(loader)
    use_validation(trainer, loader, rows, loader.batch_size or 1)
    started = time.perf_counter()
    trainer.validate()
    samples: int = len(loader.dataset)  # type: ignore[arg-type]
    return (time.perf_counter() - started) / rows * samples


def _validations(seen: Rehearsal, training: TrainingConfig) -> int:
    """How often the whole run validates."""
    by_step, by_epoch = training.eval_every_n_steps, training.eval_every_n_epochs
    every = [by_step or 0, (by_epoch or 0) * seen.steps_per_epoch]
    steps = range(1, seen.total_steps + 1)
    return sum(step == seen.total_steps or any(n and step % n == 0 for n in every) for step in steps)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)


def _size(count: float) -> str:
    """12345678 as 12.3 MB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def _duration(seconds: float) -> str:
    """5400 as 1 h 30 min."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"
