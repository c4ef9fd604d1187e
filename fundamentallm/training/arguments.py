"""What a Trainer is given: completed, checked, and described."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from fundamentallm.config.schema import Config, TrainingConfig, unknown_metric
from fundamentallm.data.loaders import step_sampler
from fundamentallm.data.sampler import StepSampler
from fundamentallm.distributed.accelerator import check_accelerator, create_accelerator
from fundamentallm.distributed.compilation import is_compiled
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.training.callbacks.trackers import tracker_names
from fundamentallm.training.evaluation import metric_names


def whole_config(config: Config | TrainingConfig, batch_size: int | None) -> Config:
    """Returns a whole config, resolved, with the loader's batch size if it has none of its own.

    `batch_size` is None if a batch sampler decides.

    Raises:
        ConfigError: if it is something else.
    """
    if not isinstance(config, (Config, TrainingConfig)):
        advice = "TrainingConfig(**settings) makes one of a dict."  # type: ignore[unreachable]  # not in a notebook
        raise ConfigError(Problem("config", config, "a Config or a TrainingConfig", advice))
    if isinstance(config, TrainingConfig):
        return Config(training=config.resolved())
    training = replace(config.resolved().training, batch_size=config.training.batch_size or batch_size)
    return replace(config.resolved(), training=training)


def use_accelerator(
    accelerator: Accelerator | None, config: Config, output_dir: Path | None, batch_size: int | None
) -> tuple[Accelerator, Config]:
    """Makes or checks the Accelerator. What its launcher decided becomes part of the config.

    Raises:
        ConfigError: if the two contradict each other, or the launch is not one run.
    """
    training = config.training
    launch = training.mixed_precision, training.smallest_batch_size(batch_size), training.compile
    if accelerator is not None:
        check_accelerator(accelerator, *launch)
    else:
        folder = None if output_dir is None else str(output_dir)
        accelerator = create_accelerator(*launch, config.trackers, folder)
    compiled = is_compiled(accelerator, training.compile)
    training = replace(training, mixed_precision=accelerator.mixed_precision, compile=compiled)
    return accelerator, replace(config, training=training)


def make_samplers(
    config: TrainingConfig,
    accelerator: Accelerator,
    group: HostGroup,
    train_loader: DataLoader[Any],
    val_loader: DataLoader[Any] | None,
) -> tuple[StepSampler, StepSampler | None]:
    """Returns which samples this process computes in each step, and in validation.

    Raises:
        ConfigError: if the order of a loader cannot be resumed, or is not the same on all processes.
    """
    at_once = None if config.micro_batch_size == "auto" else config.micro_batch_size
    # With compile, micro-batches are padded to one size, so that a compiled model sees one shape.
    process = accelerator.process_index, accelerator.num_processes, at_once, bool(config.compile)
    with group.barrier_with_errors():
        samples = step_sampler("train_loader", train_loader, config.seed, *process, config.batch_size_schedule)
        val_samples = None if val_loader is None else step_sampler("val_loader", val_loader, 0, *process)
    for name, each in (("train_loader", samples), ("val_loader", val_samples)):
        found = group.all_gather(None if each is None else (each.num_samples, each.batch_size, each.sampler))
        if len(set(found)) > 1:
            advice = "Give all processes the whole data in one order: each takes its part of every batch by itself."
            described = "; ".join(f"process {rank}: {data}" for rank, data in enumerate(found))
            raise ConfigError(Problem(name, described, "the same on all processes", advice, text=described))
    return samples, val_samples


def count_steps(config: TrainingConfig, samples: StepSampler) -> int:
    """Returns the step at which the run ends: max_steps or the end of max_epochs, whichever comes first.

    Raises ConfigError for a stream, of which nobody knows where it ends, without max_steps or with max_epochs.
    """
    if samples.stream is not None:
        reason = "and the length of a stream is not known"
        if config.max_steps is None:
            raise ConfigError(Problem("training.max_steps", None, "a number of optimizer steps", reason=reason))
        if config.max_epochs is not None:
            raise ConfigError(Problem("training.max_epochs", config.max_epochs, "null", reason=reason))
    ends = [math.inf if config.max_steps is None else config.max_steps]
    if config.max_epochs is not None:
        # If the passes were made before these batches begin, the run ends at their beginning.
        is_ahead = config.max_epochs > samples.start.epoch
        ends.append(samples.steps_before_epoch(config.max_epochs) if is_ahead else samples.start.step)
    return int(min(ends))


def check_arguments(
    config: Config,
    accelerator: Accelerator,
    samples: StepSampler,
    val_loader: DataLoader[Any] | None,
    validation_metrics: Collection[str],
    optimizer: Optimizer | None,
    scheduler: LRScheduler | None,
) -> None:
    """Raises ConfigError listing every contradiction between a Trainer's arguments and its config."""
    problems: list[str] = []
    training = config.training
    is_batched = samples.order is not None and samples.order.is_batched
    if training.batch_size not in (None, None if is_batched else samples.batch_size):
        advice = "Set one of them, or both to the same value."
        allowed = "null, since the batch sampler decides"
        if not is_batched:
            allowed = f"{samples.batch_size}, the train_loader's batch_size"
        problems.append(Problem("training.batch_size", training.batch_size, allowed, advice))
    if scheduler is not None and scheduler.optimizer is not optimizer:
        problems.append("The scheduler was made for another optimizer; pass its optimizer too.")
    if isinstance(scheduler, ReduceLROnPlateau) and val_loader is None:
        problems.append(Problem("scheduler", type(scheduler).__name__, advice="It needs a val_loader; give one."))
    if optimizer is not None and training.parameter_groups:
        advice = "An optimizer is given: give it the groups, or set parameter_groups to []."
        problems.append(Problem("training.parameter_groups", training.parameter_groups, advice=advice))
    metrics = metric_names(val_loader, validation_metrics)
    if training.early_stopping_metric not in metrics:
        problems.append(unknown_metric(training.early_stopping_metric, metrics))
    if training.early_stopping_patience and val_loader is None:
        advice = "There is no val_loader: give one, or set early_stopping_patience to null."
        value = training.early_stopping_patience
        problems.append(Problem("training.early_stopping_patience", value, allowed="null", advice=advice))
    given = tracker_names(accelerator)
    if not set(config.trackers) <= set(given):
        advice = "Make the Accelerator with all of them (create_accelerator does), or set trackers to []."
        problems.append(Problem("trackers", config.trackers, f"the Accelerator's log_with, {given}", advice))
    if problems:
        raise ConfigError(problems)
