"""Losses of small runs, written down once: what a refactoring must not move.

A change that is meant to move them (initial weights, order of samples, arithmetic of a step) rewrites the file:

    python -m tests.golden.test_golden_losses
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fundamentallm import Config, DataConfig, ModelConfig, Trainer, TrainingConfig, Transformer, create_dataloaders

GOLDEN = Path(__file__).with_name("losses.json")
RUNS = {
    "adamw_cosine": {"training": {"warmup_steps": 3}},
    "adamw_no_qk_norm_tied": {"model": {"qk_norm": False, "tie_embeddings": True}},
    "muon_wsd": {"training": {"optimizer": "muon", "lr_scheduler": "wsd", "warmup_steps": 3}},
    "sgd_linear_unclipped": {
        "training": {"optimizer": "sgd", "lr_scheduler": "linear", "gradient_clip_norm": None, "learning_rate": 0.3}
    },
    "adam_restarts_label_smoothing": {
        "training": {"optimizer": "adam", "lr_scheduler": "cosine_with_restarts", "loss": "label_smoothing"}
    },
}


def tokens() -> np.ndarray:
    """Four thousand tokens, each one of two that follow from the one before."""
    rng = np.random.Generator(np.random.PCG64(0))
    sequence = [1]
    for extra in rng.integers(0, 2, 4000):
        sequence.append(int(3 * sequence[-1] + extra) % 32)
    return np.array(sequence)


def losses(name: str) -> dict[str, list[float]]:
    """Training and validation losses of one of the runs."""
    settings = RUNS[name]
    shape = {"vocab_size": 32, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2}
    training = {"batch_size": 8, "max_steps": 30, "learning_rate": 1e-2, "log_every_n_steps": 1}
    config = Config(
        model=ModelConfig(**{**shape, **settings.get("model", {})}),
        data=DataConfig(sequence_length=32),
        training=TrainingConfig(**{**training, "eval_every_n_steps": 10, **settings.get("training", {})}),
    )
    train_loader, val_loader = create_dataloaders(tokens(), None, config)
    torch.manual_seed(0)
    trainer = Trainer(Transformer(config.model), config.training, train_loader, val_loader, callbacks=[])
    trainer.train()
    return {key: trainer.metrics.get_history()[key] for key in ("train_loss", "val_loss")}


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_written_down(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    for key, values in losses(name).items():
        # Other processors round otherwise, and thirty steps let it grow; any real change is larger by far.
        assert values == pytest.approx(golden[key], rel=2e-4), key


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.write_text(json.dumps({name: losses(name) for name in RUNS}, indent=1) + "\n")
