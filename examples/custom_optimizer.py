"""Your own optimizer, schedule, loss and callback, without changing the package.

From Python, pass objects, as `main` does:

    python examples/custom_optimizer.py            minutes
    python examples/custom_optimizer.py --smoke    seconds

In YAML, name each as module:name; it must be importable from the working directory:

    cd examples && python -m fundamentallm.train --config quickstart --output_dir runs/lion \
        --training.optimizer custom_optimizer:Lion --training.learning_rate 3e-4 \
        --training.lr_scheduler custom_optimizer:inverse_square_root \
        --training.loss custom_optimizer:PolyLoss --training.loss_options '{epsilon: 0.5}' \
        --callbacks '["custom_optimizer:StopWhenGood"]'
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pydoc_data.topics import topics  # English prose bundled with CPython

import torch
import torch.nn.functional as F

from fundamentallm import (
    Callback,
    Config,
    DataConfig,
    LoggingCallback,
    ModelConfig,
    Trainer,
    TrainingConfig,
    Transformer,
    create_dataloaders,
    create_tokenizer,
)


class Lion(torch.optim.Optimizer):
    """Steps by the sign of an interpolated momentum (Chen et al., arXiv:2302.06675).

    Any class with torch's constructor works. It gets the parameter groups, each with its weight decay, `lr`, and
    `training.optimizer_options` as further keyword arguments.
    """

    def __init__(self, params, lr: float, beta1: float = 0.9, beta2: float = 0.99, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update the parameters. Their state is saved by parameter name, like that of torch's optimizers."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(momentum.lerp(p.grad, 1 - group["beta1"]).sign_(), alpha=-group["lr"])
                momentum.lerp_(p.grad, 1 - group["beta2"])


def inverse_square_root(progress: float, sharpness: float = 10.0) -> float:
    """Maps the progress of the run (0 to 1) to a fraction: 0 is the minimum learning rate, 1 the peak."""
    return (1 + sharpness * progress) ** -0.5


class PolyLoss(torch.nn.Module):
    """Cross entropy plus epsilon * (1 - p), where p is the target's probability (Leng et al., arXiv:2204.12511).

    A loss maps (logits, targets) to the sum over the targets that are not -100; the trainer divides it. In validation,
    this one is plain cross entropy, so that its runs compare with others.
    """

    def __init__(self, epsilon: float = 1.0) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the sum over targets; logits have shape (..., V), targets (...)."""
        nll = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none", ignore_index=-100)
        return (nll + self.epsilon * (1 - (-nll).exp()) if self.training else nll).sum()  # 0 where ignored


class StopWhenGood(Callback):
    """Stops the run once the validation loss is low enough. The run is saved, and the same command would resume it."""

    def __init__(self, val_loss: float = 1.5) -> None:
        self.val_loss = val_loss

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Called after each validation."""
        if metrics["val_loss"] < self.val_loss:
            trainer.request_stop(f"val_loss {metrics['val_loss']:.3f} is below {self.val_loss}")


def main(max_steps: int) -> None:
    """Train a small character-level model with all of them, and save nothing."""
    text = "\n\n".join(topics.values())[:100_000]
    tokenizer = create_tokenizer("char", text)
    config = Config(
        model=ModelConfig(vocab_size=tokenizer.get_vocab_size(), d_model=64, num_heads=4, num_layers=2),
        data=DataConfig(sequence_length=64),
        training=TrainingConfig(batch_size=16, max_steps=max_steps),
    )
    loaders = create_dataloaders(text, tokenizer, config)
    model = Transformer(config.model)
    optimizer = Lion(model.parameters(), lr=1e-3)
    trainer = Trainer(
        model,
        config.training,
        *loaders,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: inverse_square_root(step / max_steps)),
        loss_fn=PolyLoss(epsilon=0.5),
        callbacks=[LoggingCallback(), StopWhenGood(2.0)],
    )
    history = trainer.train()
    print(f"validation loss {history['val_loss'][-1]:.3f} after {trainer.global_step} steps of Lion with PolyLoss")


if __name__ == "__main__":
    main(max_steps=20 if "--smoke" in sys.argv[1:] else 1000)
