"""Any module, any data: a convolutional network that tells shapes apart, under the same promise.

    python examples/vision.py            half a minute on a CPU
    python examples/vision.py --smoke    seconds

The pictures are drawn here, so that there is nothing to download; a dataset of torchvision is used in the same way. Of
a model is wanted that it maps inputs to logits (..., classes), of a dataset that it gives (inputs, targets).
"""

import sys

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fundamentallm import Trainer, TrainingConfig

smoke = "--smoke" in sys.argv[1:]


def shapes(number: int, seed: int, size: int = 16) -> TensorDataset:
    """Noisy pictures of disks, squares and crosses, somewhere in the picture, and which of them each is."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(3, (number,), generator=generator)
    x, y = torch.randint(5, size - 5, (2, number, 1, 1), generator=generator)
    across, down = (torch.arange(size)[None, :] - x).abs(), (torch.arange(size)[:, None] - y).abs()
    drawn = torch.stack((across**2 + down**2 <= 16, across.maximum(down) <= 3, across.minimum(down) <= 0))
    noise = torch.randn(number, size, size, generator=generator)
    pictures = drawn[kind, torch.arange(number)] + 0.5 * noise
    return TensorDataset(pictures[:, None], kind)


def accuracy(logits: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """A metric of your own: a sum, and over how many."""
    return (logits.argmax(-1) == targets).sum(), len(targets)


def block(inputs: int, outputs: int) -> list[nn.Module]:
    """Twice as many channels, half the resolution."""
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]


training, validation = shapes(1000 if smoke else 10_000, seed=0), shapes(500, seed=1)
torch.manual_seed(0)
model = nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * 16, 3))
config = TrainingConfig(max_epochs=1 if smoke else 5, learning_rate=3e-3)
loaders = DataLoader(training, 64, shuffle=True), DataLoader(validation, 64)
trainer = Trainer(model, config, *loaders, validation_metrics={"accuracy": accuracy})
history = trainer.train()
print(f"{history['val_accuracy'][-1]:.1%} of the shapes are told apart")
