"""Any module, any data: a convolutional network that tells shapes apart, under the same promise.

    python examples/vision.py            half a minute on a CPU
    python examples/vision.py --smoke    seconds

The pictures are drawn here, so that there is nothing to download; a dataset of torchvision is used in the same way. Of
a model is wanted that it maps inputs to logits (..., classes), of a dataset that it gives (inputs, targets).
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fundamentallm import Callback, Trainer, TrainingConfig

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


class Accuracy(Callback):
    """Counts, after each validation, how often the likeliest class is the right one."""

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Called with `val_loss`."""
        pictures, kind = validation.tensors
        trainer.model.eval()
        with torch.no_grad():
            right = trainer.model(pictures.to(trainer.accelerator.device)).argmax(-1).cpu() == kind
        trainer.model.train()
        trainer.say(f"accuracy {right.float().mean():.1%}")


def block(inputs: int, outputs: int) -> list[nn.Module]:
    """Twice as many channels, half the resolution."""
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]


training, validation = shapes(1000 if smoke else 10_000, seed=0), shapes(500, seed=1)
torch.manual_seed(0)
model = nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * 16, 3))
config = TrainingConfig(max_epochs=1 if smoke else 5, learning_rate=3e-3)
trainer = Trainer(model, config, DataLoader(training, 64, shuffle=True), DataLoader(validation, 64))
trainer.callbacks.add(Accuracy())
trainer.train()
