"""Train any module on any data: a convolutional network that classifies shapes.

    python examples/vision.py            half a minute on a CPU
    python examples/vision.py --smoke    seconds

The images are generated, so nothing is downloaded; a torchvision dataset works the same way. The model must map inputs
to logits (..., classes), and the dataset must yield (inputs, targets).
"""

import sys

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fundamentallm import Trainer, TrainingConfig

smoke = "--smoke" in sys.argv[1:]


def shapes(number: int, seed: int, size: int = 16) -> TensorDataset:
    """Returns noisy images of a disk, a square or a cross at a random position, with its class."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(3, (number,), generator=generator)
    x, y = torch.randint(5, size - 5, (2, number, 1, 1), generator=generator)
    across, down = (torch.arange(size)[None, :] - x).abs(), (torch.arange(size)[:, None] - y).abs()
    drawn = torch.stack((across**2 + down**2 <= 16, across.maximum(down) <= 3, across.minimum(down) <= 0))
    noise = torch.randn(number, size, size, generator=generator)
    images = drawn[kind, torch.arange(number)] + 0.5 * noise
    return TensorDataset(images[:, None], kind)


def accuracy(logits: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Returns the number of correct predictions, and of how many: a metric is a sum and a count."""
    return (logits.argmax(-1) == targets).sum(), len(targets)


def block(inputs: int, outputs: int) -> list[nn.Module]:
    """Returns layers that halve the resolution."""
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]


training, validation = shapes(1000 if smoke else 10_000, seed=0), shapes(500, seed=1)
torch.manual_seed(0)
model = nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * 16, 3))
config = TrainingConfig(max_epochs=1 if smoke else 5, learning_rate=3e-3)
loaders = DataLoader(training, 64, shuffle=True), DataLoader(validation, 64)
trainer = Trainer(model, config, *loaders, validation_metrics={"accuracy": accuracy})
history = trainer.train()
print(f"{history['val_accuracy'][-1]:.1%} of the shapes are classified correctly")
