"""The parts of a training, made from its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fundamentallm.config import TrainingConfig
from fundamentallm.errors import ConfigError
from fundamentallm.training.accelerator import device_name
from fundamentallm.training.average import WeightAverage
from fundamentallm.training.early_stopping import EarlyStopping
from fundamentallm.training.micro_batch import MicroBatch
from fundamentallm.training.optimizers import create_optimizer
from fundamentallm.training.parameter_groups import split_groups
from fundamentallm.training.schedulers import create_scheduler
from fundamentallm.training.throughput import Throughput, known_peak, model_flops_per_token

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer


def make_optimizer(config: TrainingConfig, model: nn.Module) -> Optimizer:
    """The optimizer of `config` over a model that is on its device already."""
    optimizer = create_optimizer(
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
    if config.parameter_groups:
        split_groups(optimizer, model, config.parameter_groups)
    return optimizer


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


def make_average(config: TrainingConfig, model: nn.Module, optimizer: Optimizer) -> WeightAverage | None:
    """The moving average of the weights that `optimizer` trains; None where `config` asks for none."""
    return None if config.ema_decay is None else WeightAverage(model, optimizer, config.ema_decay)


def make_micro_batch(config: TrainingConfig, accelerator: Accelerator) -> MicroBatch | None:
    """What finds the micro-batches' size; None where `config` says it.

    Raises:
        ConfigError: where it could not be found.
    """
    if config.micro_batch_size != "auto":
        return None
    if accelerator.is_fsdp2:
        raise ConfigError(
            "training.micro_batch_size is auto and the model is sharded (FSDP2), where a process that runs out of "
            "memory would leave the others waiting for its slices; set a number. (`fundamentallm estimate` foretells "
            "what fits.)"
        )
    return MicroBatch(accelerator.device, accelerator.num_processes)


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
