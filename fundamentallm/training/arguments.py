"""What a Trainer is given: completed, checked, and compared between processes."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from fundamentallm.config.registry import not_one_of
from fundamentallm.config.saved import flat_settings
from fundamentallm.config.schema import Config, TrainingConfig
from fundamentallm.data.loaders import unwrapped
from fundamentallm.data.sampler import StepSampler
from fundamentallm.distributed.accelerator import check_accelerator, create_accelerator
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import ConfigError, Problem, raise_all
from fundamentallm.training.callbacks.trackers import tracker_names
from fundamentallm.training.metrics import metric_names

OF_ONE_MACHINE = {
    *("output_dir", "trackers", "tracker_options", "model.init_from", "model.pretrained"),
    *("data.source", "data.validation_source", "data.tokenizer", "data.cache_dir", "data.num_workers"),
    *("training.checkpoint_dir", "training.resume", "training.peak_tflops"),
}
"""Settings that may differ between processes: folders of a machine, and what its hardware allows."""


def complete(
    config: Config | TrainingConfig, accelerator: Accelerator | None, train_loader: Any
) -> tuple[Config, Accelerator, Path | None]:
    """Returns the whole config, resolved; the Accelerator, made or checked; and the folder of the run, if it has one.

    What the launcher decided becomes part of the config, as do the loader's batch size and end-of-text token.
    """
    if not isinstance(config, (Config, TrainingConfig)):
        advice = "TrainingConfig(**settings) makes one of a dict."  # type: ignore[unreachable]  # not in a notebook
        raise ConfigError(Problem("config", config, "a Config or a TrainingConfig", advice))
    _, batch_size, _ = unwrapped(train_loader)
    if isinstance(config, Config):
        given, config = config.training.batch_size, config.resolved()
        training, output_dir = replace(config.training, batch_size=given or batch_size), Path(config.output_dir)
    else:
        training, output_dir = config.resolved(), None
        config = Config()
    launch = training.mixed_precision, training.smallest_batch_size(batch_size)
    if accelerator is not None:
        check_accelerator(accelerator, *launch)
    else:
        accelerator = create_accelerator(*launch, config.trackers, None if output_dir is None else str(output_dir))
    by_launcher = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    compiled = by_launcher if training.compile is None else training.compile
    training = replace(training, mixed_precision=accelerator.mixed_precision, compile=compiled)
    dataset = getattr(train_loader, "dataset", None)
    dataset = getattr(dataset, "dataset", dataset)  # of a Subset
    data = config.data.resolved(getattr(dataset, "end_of_text", None) is not None)
    return replace(config, data=data, training=training), accelerator, output_dir


def check_alike(
    group: HostGroup,
    config: Config,
    optimizer: Optimizer | None,
    samples: Sequence[Mapping[str, StepSampler]],
    content: Sequence[str | None],
) -> None:
    """Compares settings, a caller's optimizer, and order and content of the data over all processes.

    Both sequences are of training and validation; samples are by the name of the set. Raises ConfigError on all
    processes, naming what differs.
    """
    given = {name: repr(value) for name, value in flat_settings(asdict(config)).items() if name not in OF_ONE_MACHINE}
    given["optimizer"] = repr(optimizer)
    for name, samplers, digest in zip(("train_loader", "val_loader"), samples, content, strict=True):
        described = []
        for key, sampler in samplers.items():
            order = sampler.sampler or f"drop_last={sampler.drop_last}, seed={sampler.seed}"
            size = f"{sampler.num_samples} samples in batches of {sampler.batch_size}"
            described.append(f"{key} {size}, {order}".lstrip())
        given[name] = "; ".join(described) or "not given"
        given[f"the content of {name}"] = str(digest)
    first, *others = group.all_gather(given)
    problems = {}
    for rank, other in enumerate(others, start=1):
        for name in [name for name in first if other[name] != first[name]]:
            allowed = f"{first[name]}, as on process 0"
            advice = "Give all processes the same: each takes its part of every batch by itself."
            problems[name] = Problem(name, None, allowed, advice, text=f"{other[name]} on process {rank}")
    if problems:
        raise ConfigError([*problems.values()])


def count_steps(config: TrainingConfig, samples: StepSampler) -> int:
    """Returns the step at which the run ends: max_steps or the end of max_epochs, whichever comes first."""
    last = math.inf if config.max_steps is None else config.max_steps
    if config.max_epochs is None:
        return int(last)
    # If the passes were made before these batches begin, the run ends at their beginning.
    is_ahead = config.max_epochs > samples.start.epoch
    return int(min(last, samples.steps_before_epoch(config.max_epochs) if is_ahead else samples.start.step))


def check_setup(
    config: Config,
    accelerator: Accelerator,
    samples: StepSampler,
    loaders: Mapping[str, DataLoader[Any]],
    validation_metrics: Collection[str],
    optimizer: Optimizer | None,
    scheduler: LRScheduler | None,
) -> None:
    """Raises ConfigError listing every contradiction between a Trainer's arguments and its config."""
    problems: list[str] = []
    training = config.training
    is_batched = samples.order is not None and samples.order.is_batched
    if training.batch_size not in (None, None if is_batched else samples.batch_size):
        allowed = f"{samples.batch_size}, the train_loader's batch_size"
        allowed = "null, since the batch sampler decides" if is_batched else allowed
        problems.append(Problem("training.batch_size", training.batch_size, allowed, "Set one of them."))
    if training.micro_batch_size == "auto" and accelerator.is_fsdp2:
        reason = "and under FSDP2 a process that runs out of memory would leave the others waiting for its shards"
        advice = "Set a number; `fundamentallm estimate` predicts what fits."
        problems.append(Problem("training.micro_batch_size", "auto", advice=advice, reason=reason))
    if samples.stream is not None and (training.max_steps is None or training.max_epochs is not None):
        name, allowed = ("max_steps", "a number") if training.max_steps is None else ("max_epochs", "null")
        reason = "and the length of a stream is not known"
        problems.append(Problem(f"training.{name}", getattr(training, name), allowed, reason=reason))
    if scheduler is not None and scheduler.optimizer is not optimizer:
        problems.append("The scheduler was made for another optimizer; pass its optimizer too.")
    if isinstance(scheduler, ReduceLROnPlateau) and not loaders:
        problems.append(Problem("scheduler", type(scheduler).__name__, advice="It needs a val_loader; give one."))
    if optimizer is not None and training.parameter_groups:
        advice = "An optimizer is given: give it the groups, or set parameter_groups to []."
        problems.append(Problem("training.parameter_groups", training.parameter_groups, advice=advice))
    metrics = metric_names(loaders, validation_metrics, training.eval_max_samples)
    if training.early_stopping_metric not in metrics:
        problems.append(not_one_of("early_stopping_metric", training.early_stopping_metric, metrics))
    for name, allowed in {
        "early_stopping_patience": "null",
        "eval_at_start": "false",
        "eval_max_samples": "null",
    }.items():
        if (value := getattr(training, name)) and not loaders:
            advice = f"There is no val_loader: give one, or set {name} to {allowed}."
            problems.append(Problem(f"training.{name}", value, allowed, advice))
    given = tracker_names(accelerator)
    if not set(config.trackers) <= set(given):
        advice = "Make the Accelerator with all of them (create_accelerator does), or set trackers to []."
        problems.append(Problem("trackers", config.trackers, f"the Accelerator's log_with, {given}", advice))
    raise_all(problems)
