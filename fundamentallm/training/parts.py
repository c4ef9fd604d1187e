"""The parts of a training, made from its settings."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fundamentallm.config import TrainingConfig
from fundamentallm.training.early_stopping import EarlyStopping
from fundamentallm.training.optimizers import create_optimizer
from fundamentallm.training.schedulers import create_scheduler


def make_optimizer(config: TrainingConfig, model: nn.Module) -> Optimizer:
    """The optimizer of `config` over a model that is on its device already."""
    return create_optimizer(
        model,
        config.optimizer,
        config.learning_rate,
        config.weight_decay,
        adam_learning_rate=config.adam_learning_rate,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        momentum=config.momentum,
        muon_momentum=config.muon_momentum,
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
