"""A run that tests drive by hand: it satisfies `RunView` without a Trainer."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from fundamentallm import Config, TokenDataset, TrainingConfig, create_tokenizer
from fundamentallm.data.loaders import ValidationLoaders
from fundamentallm.data.sampler import StepSampler
from fundamentallm.training.metrics import MetricTracker

TEXT = "to be or not to be " * 20
TOKENIZER = create_tokenizer("char", TEXT)
DATASET = TokenDataset(np.array(TOKENIZER.encode(TEXT).ids), 8, TOKENIZER)


@dataclass
class Stub:
    """A run of three steps that a test drives by hand."""

    output_dir: Path | None
    accelerator: Accelerator
    model: nn.Module
    config: Config = field(
        default_factory=lambda: Config(training=TrainingConfig(log_every_n_steps=1), sample_tokens=4)
    )
    train_loader: DataLoader[Any] = field(default_factory=lambda: DataLoader(DATASET, batch_size=4))
    val_loader: ValidationLoaders | None = field(default_factory=lambda: DataLoader(DATASET, batch_size=4))
    samples: StepSampler = field(default_factory=lambda: StepSampler(len(DATASET), 4, 0))
    metrics: MetricTracker = field(default_factory=MetricTracker)
    total_steps: int = 3
    was_rewound: bool = False
    resumed_from: Path | None = None
    global_step: int = 0
    epochs_done: float = 0.0
    seconds_left: float = 60.0
    is_main_process: bool = True
    said: list[str] = field(default_factory=list)
    saves: list[tuple[int, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.samples.data = DATASET
        self.optimizer: Optimizer = SGD(self.model.parameters(), lr=0.1)

    def say(self, text: str) -> None:
        self.said.append(text)

    def request_stop(self, reason: str) -> None:
        raise AssertionError(reason)

    def request_save(self, is_best: bool = False) -> None:
        self.saves.append((self.global_step, is_best))

    def averaged_weights(self) -> AbstractContextManager[None]:
        return nullcontext()


def make_stub(folder: Path | None) -> Stub:
    """A stub with a small model over the characters of `TEXT`."""
    torch.manual_seed(0)
    size = TOKENIZER.get_vocab_size()
    model = nn.Sequential(nn.Embedding(size, 8), nn.Linear(8, size))
    return Stub(folder, Accelerator(cpu=True), model)


def line(step: int) -> dict[str, float]:
    """A log line as the Trainer makes it."""
    return {
        **{"step": step, "epoch": 0.1 * step, "train_loss": 3.0 / step, "learning_rate": 0.1, "grad_norm": 1.0},
        **{"tokens_per_second": 1e4, "bad_steps": 0},
    }
