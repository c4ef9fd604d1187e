"""Runs for the doctor, named by --trainer: a sound one, and one for each planted fault."""

import contextlib
import random
import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fundamentallm import Config, Trainer, TrainingConfig
from fundamentallm.data.datasets import Batch
from tests.integration.runs import SEQUENCE, PartlyIgnored

VOCABULARY = 20


class Small(nn.Module):
    """A bigram model with a dropout that no config sets; faults override `disturb`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.disturb(self.head(self.dropout(self.embedding(inputs))))  # type: ignore[no-any-return]

    def disturb(self, logits: Tensor) -> Tensor:
        return logits


def _trainer(
    config: Config, make_model: Callable[[], nn.Module] = Small, data: Any = None, **arguments: Any
) -> Trainer:
    torch.manual_seed(config.training.seed)
    size = config.training.batch_size
    train_loader = DataLoader(PartlyIgnored() if data is None else data, batch_size=size, shuffle=True)
    val_loader = DataLoader(PartlyIgnored(20), batch_size=size)
    return Trainer(make_model(), config, train_loader, val_loader, **arguments)


def sound(config: Config) -> Trainer:
    return _trainer(config)


def no_validation(config: Config) -> Trainer:
    torch.manual_seed(config.training.seed)
    return Trainer(Small(), config, DataLoader(PartlyIgnored(), batch_size=config.training.batch_size))


class _Noisy(Dataset[Batch]):
    def __init__(self, draw: Callable[[], int]) -> None:
        self.inner, self.draw = PartlyIgnored(), draw

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Batch:
        inputs, targets = self.inner[index]
        return (inputs + self.draw()) % VOCABULARY, targets


def own_generator_data(config: Config) -> Trainer:
    generator = torch.Generator().manual_seed(1)
    return _trainer(config, data=_Noisy(lambda: int(torch.randint(VOCABULARY, (), generator=generator))))


class _Unseeded(Small):
    draws = random.Random()

    def disturb(self, logits: Tensor) -> Tensor:
        return logits * self.draws.uniform(0.9, 1.1) if self.training else logits


def unseeded_model(config: Config) -> Trainer:
    return _trainer(config, _Unseeded)


class _DropoutInEvaluation(Small):
    def disturb(self, logits: Tensor) -> Tensor:
        return F.dropout(logits, 0.1)


def dropout_in_evaluation(config: Config) -> Trainer:
    return _trainer(config, _DropoutInEvaluation)


class _BatchStatistics(Small):
    def disturb(self, logits: Tensor) -> Tensor:
        return logits - logits.mean(dim=0)


def batch_statistics(config: Config) -> Trainer:
    return _trainer(config, _BatchStatistics)


def infinite_loss(config: Config) -> Trainer:
    return _trainer(config, loss_fn=lambda logits, targets: logits.sum() * torch.inf)


def unseeded_weights(config: Config) -> Trainer:
    model = Small()
    return _trainer(config, lambda: model)


class _Forgetful(Small):
    """Counts its training passes where no checkpoint looks; equal from call to call within a step's first passes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()), persistent=False)

    def disturb(self, logits: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
        return logits * (2.0 if self.passes > 4 else 1.0)


def forgetful_model(config: Config) -> Trainer:
    return _trainer(config, _Forgetful)


class _Deaf(Small):
    def disturb(self, logits: Tensor) -> Tensor:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        return logits


def deaf_model(config: Config) -> Trainer:
    return _trainer(config, _Deaf)


class _Broken(Small):
    def disturb(self, logits: Tensor) -> Tensor:
        raise ZeroDivisionError("planted")


def broken_model(config: Config) -> Trainer:
    return _trainer(config, _Broken)


def two_faults(config: Config) -> Trainer:
    generator = torch.Generator().manual_seed(1)
    noisy = _Noisy(lambda: int(torch.randint(VOCABULARY, (), generator=generator)))
    return _trainer(config, _BatchStatistics, data=noisy)


def not_a_trainer(config: Config) -> dict[str, int]:
    return {"step": SEQUENCE}


def elsewhere(config: Config) -> Trainer:
    return _trainer(Config(output_dir="elsewhere", training=TrainingConfig(batch_size=config.training.batch_size)))
