"""The parts of a training, made from its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fundamentallm.config import TrainingConfig
from fundamentallm.training.accelerator import device_name
from fundamentallm.training.early_stopping import EarlyStopping
from fundamentallm.training.optimizers import create_optimizer
from fundamentallm.training.schedulers import create_scheduler
from fundamentallm.training.throughput import Throughput, known_peak, model_flops_per_token

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer


def make_optimizer(config: TrainingConfig, model: nn.Module) -> Optimizer:
    """The optimizer of `config` over a model that is on its device already."""
    return create_optimizer(
        model,
        config.optimizer,
        config.learning_rate,
        config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        momentum=config.momentum,
        **config.optimizer_options,
    )


def make_schedule(config: TrainingConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """The schedule of `config` over a run of `total_steps` optimizer steps, at its beginning."""
    return create_scheduler(
        optimizer,
        config.lr_scheduler,
        1,
        total_steps,
        config.warmup_steps,
        min_lr_ratio=config.min_lr_ratio,
        **config.lr_scheduler_options,
    )


def make_early_stopping(config: TrainingConfig) -> EarlyStopping | None:
    """Early stopping as `config` says; None where it has no patience set."""
    if config.early_stopping_patience is None:
        return None
    return EarlyStopping(
        config.early_stopping_patience,
        config.early_stopping_metric,
        config.early_stopping_mode,
        config.early_stopping_min_delta,
    )


def make_throughput(trainer: Trainer) -> Throughput:
    """The clock of a run on its devices; their peak is the config's, or known by their name."""
    accelerator, device = trainer.accelerator, trainer.accelerator.device
    peak = trainer.config.peak_tflops or known_peak(device_name(device), accelerator.mixed_precision)
    if peak is None:
        return Throughput()
    length = len(trainer.train_loader.dataset[0][0])
    return Throughput(peak * accelerator.num_processes, model_flops_per_token(trainer.model, length))
