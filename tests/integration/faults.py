"""Runs for the doctor, named by --trainer: a sound one, and one for each planted fault."""

import contextlib
import random
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fundamentallm import Config, Trainer, TrainingConfig
from fundamentallm.data.datasets import Batch
from tests.integration.runs import PartlyIgnored

VOCABULARY = 20


class Small(nn.Module):
    """A bigram model with a dropout that no config sets, whose logits a fault may disturb."""

    def __init__(self, disturb: Callable[[Any, Tensor], Tensor] = lambda _, logits: logits) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(16, VOCABULARY)
        self.register_buffer("passes", torch.zeros(()), persistent=False)
        self.disturb = disturb

    def forward(self, inputs: Tensor) -> Tensor:
        return self.disturb(self, self.head(self.dropout(self.embedding(inputs))))


class Noisy(Dataset[Batch]):
    """Draws by a generator of its own, which no run seeds."""

    def __init__(self) -> None:
        self.inner, self.generator = PartlyIgnored(), torch.Generator().manual_seed(1)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Batch:
        inputs, targets = self.inner[index]
        return (inputs + torch.randint(VOCABULARY, (), generator=self.generator)) % VOCABULARY, targets


def sound(
    config: Config,
    make_model: Callable[[], nn.Module] = Small,
    data: type[Any] = PartlyIgnored,
    validates: bool = True,
    **arguments: Any,
) -> Trainer:
    torch.manual_seed(config.training.seed)
    size = config.training.batch_size
    val_loader = DataLoader(PartlyIgnored(20), batch_size=size) if validates else None
    return Trainer(make_model(), config, DataLoader(data(), size, shuffle=True), val_loader, **arguments)


def faulty(disturb: Callable[[Any, Tensor], Tensor], **arguments: Any) -> Callable[[Config], Trainer]:
    return partial(sound, make_model=partial(Small, disturb), **arguments)


def forget(model: Any, logits: Tensor) -> Tensor:
    """Counts training passes where no checkpoint looks; equal from call to call within a step's first passes."""
    model.passes += model.training
    return logits * (2.0 if model.passes > 4 else 1.0)


def ignore_signals(_: Any, logits: Tensor) -> Tensor:
    with contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGTERM)
    return logits


def fail(_: Any, logits: Tensor) -> Tensor:
    raise ZeroDivisionError("planted")


def unseeded_weights(config: Config) -> Trainer:
    model = Small()
    return sound(config, lambda: model)


def elsewhere(config: Config) -> Trainer:
    return sound(Config(output_dir="elsewhere", training=TrainingConfig(batch_size=config.training.batch_size)))


draws = random.Random()
no_validation = partial(sound, validates=False)
own_generator_data = partial(sound, data=Noisy)
infinite_loss = partial(sound, loss_fn=lambda logits, targets: logits.sum() * torch.inf)
unseeded_model = faulty(lambda model, logits: logits * draws.uniform(0.9, 1.1) if model.training else logits)
dropout_in_evaluation = faulty(lambda _, logits: F.dropout(logits, 0.1))
batch_statistics = faulty(lambda _, logits: logits - logits.mean(dim=0))
two_faults = faulty(lambda _, logits: logits - logits.mean(dim=0), data=Noisy)
forgetful_model, deaf_model, broken_model = map(faulty, (forget, ignore_signals, fail))
not_a_trainer = str
