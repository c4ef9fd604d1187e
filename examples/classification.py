"""Train a classifier of transformers on its own loss, with accuracy and F1.

    python examples/classification.py            a minute on a CPU
    python examples/classification.py --smoke    seconds

The task is made up, so nothing is downloaded: which of two words occurs more often? A `datasets` dataset and
`DataCollatorWithPadding` take the place of `sentences` and `collate` in the same way.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from fundamentallm import Trainer, TrainingConfig

smoke = "--smoke" in sys.argv[1:]


def sentences(number: int, seed: int) -> Any:
    """Returns a list of sentences of 8 to 24 words, as ids, and whether word 1 occurs more often than word 2."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 25, (number,), generator=generator).tolist()
    ids = [torch.randint(1, 6, (length,), generator=generator) for length in lengths]
    return [{"input_ids": row, "label": int((row == 1).sum() > (row == 2).sum())} for row in ids]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Pads to the longest sentence of the batch."""
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": ids != 0, "labels": torch.tensor([row["label"] for row in rows])}


class Collected:
    """A metric of all predictions at once. It is exact on any number of processes, since each row is seen once.

    `compute` maps predictions and references to a number: `lambda p, r: f1.compute(predictions=p, references=r)["f1"]`
    with `f1 = evaluate.load("f1")`, or a function of scikit-learn. A metric of torchmetrics adds up over processes by
    itself: its adapter is a class whose `update` calls `metric.update(outputs.logits.argmax(-1), batch["labels"])`.
    """

    def __init__(self, compute: Callable[[list[int], list[int]], float]) -> None:
        self.of_all = compute
        self.reset()

    def reset(self) -> None:
        """Called before a validation."""
        self.rows: list[tuple[int, int]] = []

    def update(self, outputs: Any, batch: dict[str, Any]) -> None:
        """Called for each micro-batch of this process."""
        self.rows += zip(outputs.logits.argmax(-1).tolist(), batch["labels"].tolist(), strict=True)

    def compute(self) -> float:
        """Called on every process at the end."""
        predictions, references = zip(*gather_object(self.rows), strict=True)
        return self.of_all(list(predictions), list(references))


def f1(predictions: list[int], references: list[int]) -> float:
    """The harmonic mean of precision and recall."""
    hits = sum(p and r for p, r in zip(predictions, references, strict=True))
    return 2 * hits / max(sum(predictions) + sum(references), 1)


def accuracy(outputs: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """A mean is a sum and a count."""
    return (outputs.logits.argmax(-1) == batch["labels"]).sum(), len(batch["labels"])


torch.manual_seed(0)
shape = BertConfig(vocab_size=6, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
trainer = Trainer(
    BertForSequenceClassification(shape),
    TrainingConfig(max_steps=20 if smoke else 400, learning_rate=3e-3, eval_every_n_steps=10 if smoke else 100),
    DataLoader(sentences(4096, seed=0), batch_size=32, shuffle=True, collate_fn=collate),
    DataLoader(sentences(256, seed=1), batch_size=64, collate_fn=collate),
    validation_metrics={"accuracy": accuracy, "f1": Collected(f1)},
)
trainer.train()
print(trainer.validate())
