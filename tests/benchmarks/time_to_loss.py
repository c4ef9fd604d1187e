"""Time to a loss: nanoGPT's recipe for a CPU against `examples/shakespeare.yaml`, on the same cores.

    python -m tests.benchmarks.time_to_loss --text my.txt [--recipe examples/shakespeare.yaml] [--threads 2]

The reference is a model like nanoGPT's in its published settings for a CPU (4 layers, 4 heads, width 128, context 64,
batch 12, 2000 steps, AdamW from 1e-3 to 1e-4, no dropout; github.com/karpathy/nanoGPT, "only have a macbook"), in our
Trainer. Against it run the recipe, and the recipe stretched to as many steps as the reference's time allows.

The sides take turns, a twentieth of each run at a time, so that whatever else the machine does meets all of them alike.
Seconds are those of training alone: reading, validating and saving are left out on every side, and compiling, where a
recipe does, shows in the first step. Losses are over the whole validation part, in nats per token, each model at its
own context length. Without `--text` the text is the one that Python carries. It takes six minutes on two idle cores;
where others use the cores too, take `--threads 1` and look at the processor's seconds, since threads that wait for one
another spin.
"""

import argparse
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fundamentallm import Callback, Config, DataConfig, Trainer, TrainingConfig, Transformer
from fundamentallm.config.command_line import parse_config
from fundamentallm.config.schema import BUILT_IN_CORPUS
from fundamentallm.data.corpus import Corpus, load_corpus
from fundamentallm.data.loaders import create_dataloaders

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 128, 4, 4, 64, 12
REFERENCE = TrainingConfig(
    batch_size=BATCH, max_steps=2000, learning_rate=1e-3, min_lr_ratio=0.1, warmup_steps=100, adam_beta2=0.99,
    weight_decay=0.1, gradient_clip_norm=1.0,
)  # fmt: skip
TURNS = 20


class GPTBlock(nn.Module):
    """GPT-2's: LayerNorm, attention, LayerNorm, GELU; without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.attended = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attended(y.transpose(1, 2).reshape(b, t, -1))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """A model like nanoGPT's: learned positions, tied embedding, GPT-2's initial weights."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(GPTBlock() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH, bias=False), nn.Linear(WIDTH, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes_residual = name.endswith(("attended.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if writes_residual else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of `ids` (B, T)."""
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(places))))  # type: ignore[no-any-return]


@dataclass
class Time:
    """Seconds spent in training."""

    wall: float = 0.0
    processor: float = 0.0
    first_step: float = 0.0
    _since: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    def stop(self, step: int) -> None:
        self.wall += time.perf_counter() - self._since[0]
        self.processor += time.process_time() - self._since[1]
        if step == 1:
            self.first_step = self.wall


class Side:
    """A run that is made in turns: the first of one step, the others a part of the rest."""

    def __init__(self, name: str, steps: int, turns: int = TURNS) -> None:
        self.name, self.steps, self.time, self.loss = name, steps, Time(), math.nan
        self.pauses = {1, *(steps * turn // turns for turn in range(1, turns + 1))}
        self.turns: Iterator[None] = self.train()

    def train(self) -> Iterator[None]:
        """Train, yielding at each pause; leaves the validation loss."""
        raise NotImplementedError


class InTrainer(Side):
    """A model in our Trainer."""

    def __init__(self, name: str, model: nn.Module, config: Config, corpus: Corpus, turns: int = TURNS) -> None:
        training = replace(config.training, eval_every_n_epochs=None, eval_every_n_steps=None, checkpoint_dir=None)
        loaders = create_dataloaders(corpus, None, replace(config, training=training))
        self.trainer = Trainer(model, training, *loaders, callbacks=[Pauses(self)])
        super().__init__(name, self.trainer.total_steps, turns)

    def train(self) -> Iterator[None]:
        while not self.trainer.is_finished:
            self.trainer.train()
            yield
        self.loss = self.trainer.metrics.get_latest("val_loss") or math.nan


class Pauses(Callback):
    """Stops a side's Trainer at each pause; what follows the last step, validation, is not timed."""

    def __init__(self, side: Side) -> None:
        self.side = side

    def on_train_begin(self, trainer: Trainer) -> None:
        self.side.time.start()

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        if trainer.global_step in self.side.pauses:
            self.side.time.stop(trainer.global_step)
            trainer.request_stop("the other sides' turn")


def reference_config() -> Config:
    return Config(data=DataConfig(sequence_length=CONTEXT), training=REFERENCE)


def reference_model(corpus: Corpus) -> GPT:
    torch.manual_seed(REFERENCE.seed)
    return GPT(corpus.tokenizer.get_vocab_size())


def reference(corpus: Corpus, turns: int = TURNS) -> InTrainer:
    return InTrainer("nanoGPT-like", reference_model(corpus), reference_config(), corpus, turns)


def recipe(name: str, config: Config, corpus: Corpus, steps: int | None = None, turns: int = TURNS) -> InTrainer:
    """The recipe, or the same stretched to `steps`."""
    model = replace(config.model, vocab_size=corpus.tokenizer.get_vocab_size())
    training = replace(config.training, max_steps=steps or config.training.max_steps)
    torch.manual_seed(training.seed)
    return InTrainer(name, Transformer(model), replace(config, model=model, training=training), corpus, turns)


def steps_in_the_same_time(config: Config, corpus: Corpus) -> int:
    """How many steps of the recipe take as long as the whole reference, by a trial of 60 steps of both."""
    whole, turns = REFERENCE.max_steps or 0, 100
    sides = reference(corpus, turns), recipe("trial", config, corpus, whole, turns)
    for _ in range(4):  # the first is of one step
        for side in sides:
            next(side.turns)
    one, other = (side.time.processor - side.time.first_step for side in sides)
    return round(whole * one / other)


def run(config: Config, cache: str) -> list[Side]:
    """All sides, in turns to their ends; the reference first."""
    corpus = load_corpus(replace(config.data, cache_dir=cache))
    longer = steps_in_the_same_time(config, corpus)
    sides = [
        reference(corpus),
        recipe("recipe", config, corpus),
        recipe("recipe, longer", config, corpus, longer),
    ]
    for turn in range(TURNS + 2):  # the first is of one step, and after the last comes validation
        print(f"turn {turn} of {TURNS + 1}", file=sys.__stderr__, flush=True)
        for side in sides:
            next(side.turns, None)
    return sides


def table(sides: list[Side]) -> str:
    base = sides[0].time
    rows = ["| run | steps | seconds | of the reference's | processor seconds | of the reference's | first step "
            "| validation loss |", "| --- " * 8 + "|"]  # fmt: skip
    for side in sides:
        mine = side.time
        rows.append(
            f"| {side.name} | {side.steps} | {mine.wall:.1f} | {mine.wall / base.wall:.3f} | {mine.processor:.1f} "
            f"| {mine.processor / base.processor:.3f} | {mine.first_step:.2f} | {side.loss:.4f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=BUILT_IN_CORPUS, help="a text file")
    parser.add_argument("--recipe", default=str(Path(__file__).parents[2] / "examples/shakespeare.yaml"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("fundamentallm").setLevel(logging.ERROR)  # nothing is to be saved
    with (
        tempfile.TemporaryDirectory() as cache,
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        sides = run(parse_config(["--config", options.recipe, "--data.source", options.text]), cache)
    print(table(sides))


if __name__ == "__main__":
    main()
