"""Leave out the data that made a loss spike: resume from before it with `data.skip`.

    python examples/skip_spike.py
    python examples/skip_spike.py --smoke     finishes in seconds

A part of the training data is noise, which is planted here. The first run is trained on it. The second one resumes from
the last checkpoint before the noise and leaves it out; everything else comes in the order of the first run.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from fundamentallm import Config, DataConfig, ModelConfig, TokenDataset, Trainer, TrainingConfig, Transformer

smoke = "--smoke" in sys.argv[1:]
STEPS, BATCH, LENGTH, VOCABULARY = (40 if smoke else 400), 8, 32, 50
NOISE = STEPS // 2, STEPS // 2 + STEPS // 20  # steps, from 0, whose samples are noise

tokens = np.arange(STEPS * BATCH * LENGTH + 1) ** 2 % VOCABULARY
noise = slice(NOISE[0] * BATCH * LENGTH, NOISE[1] * BATCH * LENGTH)
tokens[noise] = np.random.default_rng(0).integers(0, VOCABULARY, len(tokens[noise]))
loader = DataLoader(TokenDataset(tokens, LENGTH), BATCH)  # in the order of the data, so that the noise is together


def train(name: str, skip: list[list[int]], resume: str = "auto") -> dict[int, float]:
    """Trains in the folder runs/NAME. Returns the training loss of each step."""
    config = Config(
        output_dir=f"runs/{name}",
        model=ModelConfig(vocab_size=VOCABULARY, d_model=64, num_heads=4, num_layers=2),
        data=DataConfig(skip=skip),
        training=TrainingConfig(
            max_steps=NOISE[1] + 3, learning_rate=3e-3, save_every_n_steps=STEPS // 10, keep_last_n=20,
            log_every_n_steps=1, resume=resume,
        ),
    )  # fmt: skip
    torch.manual_seed(config.training.seed)
    history = Trainer(Transformer(config.model), config, loader).train()
    return {int(step): loss for step, loss in zip(history["step"], history["train_loss"], strict=True)}


first = train("with_noise", skip=[])
begin = next(step for step in sorted(first) if first[step] > 1.5 * first.get(step - 1, first[step]))
end = max(step for step in first if first[step] > 1.5 * first[begin - 1])
checkpoints = Path("runs/with_noise/checkpoints").glob("step_*")
saved = max(path for path in checkpoints if int(path.name.removeprefix("step_")) < begin)
second = train("without_noise", skip=[[begin, end]], resume=str(saved))
print(f"steps {begin} to {end} are left out, from {saved.name} on\nstep  with noise  without")
for step in range(begin, end + 4):
    print(f"{step:4}  {first[step]:10.3f}  {second[step]:7.3f}")
