"""Train on questions and answers, with the loss on the answers only: a model that learns to add.

    python examples/supervised_pairs.py           a minute on a CPU
    python examples/supervised_pairs.py --smoke   seconds, too short to learn much

Any dataset of (inputs, targets) works. Targets of -100 are ignored: here the question and the padding. The loss of a
step is divided by the number of the other targets, however they are spread over the samples. If the pairs are rows of
text, you need no dataset of your own: see `data.prompt_field`.
"""

import random
import sys

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fundamentallm import ModelConfig, Trainer, TrainingConfig, Transformer, generate

smoke = "--smoke" in sys.argv[1:]
CHARACTERS = "0123456789+=;"  # the last one ends an answer, and is the padding
LENGTH = len("99+99=198;")


class Sums(Dataset[tuple[Tensor, Tensor]]):
    """Sums of two numbers below 100, such as 17+25=42;"""

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        a, b = self.pairs[index]
        question, answer = f"{a}+{b}=", f"{a + b};"
        tokens = torch.tensor([CHARACTERS.index(c) for c in (question + answer).ljust(LENGTH, ";")])
        targets = tokens[1:].clone()
        targets[: len(question) - 1] = -100
        targets[len(question + answer) - 1 :] = -100
        return tokens[:-1], targets


pairs = [(a, b) for a in range(100) for b in range(100)]
random.Random(0).shuffle(pairs)
train_loader = DataLoader(Sums(pairs[1000:]), batch_size=64, shuffle=True)
val_loader = DataLoader(Sums(pairs[:1000]), batch_size=64)

torch.manual_seed(0)
model = Transformer(ModelConfig(vocab_size=len(CHARACTERS), d_model=64, num_heads=4, num_layers=2))
config = TrainingConfig(max_steps=30 if smoke else 2000, optimizer="muon", learning_rate=5e-3, log_every_n_steps=100)
Trainer(model, config, train_loader, val_loader).train()

for a, b in pairs[:5]:
    question = [CHARACTERS.index(c) for c in f"{a}+{b}="]
    answer = generate(model, question, max_new_tokens=4, context=LENGTH, temperature=0)
    print(f"{a}+{b}=" + "".join(CHARACTERS[token] for token in answer).partition(";")[0])
