"""What a trainer costs beside the model: the time of an optimizer step of a tiny model, of ours and of other loops.

    python -m tests.benchmarks.overhead [--rounds 5] [--steps 400]

Every side trains the same Transformer (two blocks of width 32) on the same text, on one thread of a CPU, with fused
AdamW, a cosine schedule, clipping, a progress bar, and a log line every 10 steps. The sides run in turn; a step's time
is the median over each run's stretches of 10 steps, and a ratio that of the rounds' medians. transformers is left out
where it is not installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fundamentallm import Callback, Config, DataConfig, ModelConfig, Trainer, TrainingConfig, Transformer
from fundamentallm.data.loaders import create_dataloaders
from fundamentallm.data.tokenizers import create_tokenizer
from fundamentallm.training.callbacks import default_callbacks
from tests.conftest import reset_accelerate
from tests.integration.runs import prose

LENGTH, BATCH, EVERY = 32, 8, 10
TEXT = prose(400_000)
TOKENIZER = create_tokenizer("char", lambda: [TEXT], lambda: [TEXT])
SHAPE = ModelConfig(TOKENIZER.get_vocab_size(), d_model=32, num_heads=2, num_layers=2)
LEARNING_RATE = 1e-3

Times = list[float]
"""Seconds a step, of each stretch of `EVERY` steps."""


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """As one writes it by hand: a sample at a time."""

    def __init__(self) -> None:
        self.tokens = torch.tensor(TOKENIZER.encode(TEXT).ids)

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // LENGTH

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.tokens[index * LENGTH : (index + 1) * LENGTH + 1]
        return window[:-1], window[1:]


def model_and_optimizer(steps: int) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


class Clock:
    """Notes the time at every `EVERY`th step."""

    def __init__(self) -> None:
        self.marks: Times = []

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def times(self) -> Times:
        return [(after - before) / EVERY for before, after in zip(self.marks, self.marks[1:], strict=False)]


def ours(steps: int) -> Times:
    class Marks(Callback):
        def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            clock.mark()

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingConfig(
            batch_size=BATCH, max_steps=steps, learning_rate=LEARNING_RATE, eval_every_n_epochs=None,
            save_every_n_epochs=None, log_every_n_steps=EVERY,
        )  # fmt: skip
        config = Config(folder, SHAPE, DataConfig(sequence_length=LENGTH), training)
        loader, _ = create_dataloaders(TEXT, TOKENIZER, config)
        torch.manual_seed(0)
        callbacks = [*default_callbacks(config, False), Marks()]
        Trainer(Transformer(SHAPE), config, loader, None, callbacks).train()
    return clock.times()


def loop(
    steps: int, loader: Iterable[tuple[Tensor, Tensor]], scheduler: Any, take_step: Callable[[Tensor, Tensor], Tensor]
) -> Times:
    """What every loop of one's own has beside its step: epochs, a bar, and a log line."""
    step, total, clock = 0, torch.zeros(()), Clock()
    with tqdm(total=steps) as bar:
        while step < steps:
            for inputs, targets in loader:
                total += take_step(inputs, targets).detach()
                step += 1
                bar.update()
                if step % EVERY == 0:
                    bar.set_postfix(loss=total.item() / EVERY, lr=scheduler.get_last_lr()[0])
                    total.zero_()
                    clock.mark()
                if step == steps:
                    break
    return clock.times()


def stock_loader() -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(Samples(), batch_size=BATCH, shuffle=True, drop_last=True)


def by_hand(steps: int) -> Times:
    """The step one would write with torch alone."""
    model, optimizer, scheduler = model_and_optimizer(steps)

    def take_step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss

    return loop(steps, stock_loader(), scheduler, take_step)


def by_accelerate(steps: int) -> Times:
    """accelerate's documented step."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, scheduler, loader = accelerator.prepare(*model_and_optimizer(steps), stock_loader())

    def take_step(inputs: Tensor, targets: Tensor) -> Tensor:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return loss

    return loop(steps, loader, scheduler, take_step)


class WithLoss(nn.Module):
    """A model as transformers' Trainer wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())}


def by_transformers(steps: int) -> Times:
    import transformers

    class Marks(transformers.TrainerCallback):
        def on_log(self, *_: object, **__: object) -> None:
            clock.mark()

    class Named(Dataset[dict[str, Tensor]]):
        samples = Samples()

        def __len__(self) -> int:
            return len(self.samples)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            inputs, targets = self.samples[index]
            return {"inputs": inputs, "targets": targets}

    clock = Clock()
    model, optimizer, scheduler = model_and_optimizer(steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, per_device_train_batch_size=BATCH, max_steps=steps, logging_steps=EVERY, save_strategy="no",
            max_grad_norm=1.0, use_cpu=True, report_to="none", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            WithLoss(model), arguments, train_dataset=Named(), optimizers=(optimizer, scheduler), callbacks=[Marks()]
        )
        trainer.train()
    return clock.times()


SIDES: dict[str, Callable[[int], Times]] = {
    "torch by hand": by_hand,
    "fundamentallm": ours,
    "accelerate": by_accelerate,
}
PEERS: dict[str, Callable[[int], Times]] = {"transformers": by_transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sides = SIDES | {name: side for name, side in PEERS.items() if find_spec(name.replace("-", "_"))}
    rounds: dict[str, Times] = {name: [] for name in sides}
    with Path(os.devnull).open("w") as nowhere:
        for _ in range(options.rounds):
            for name, side in sides.items():
                reset_accelerate()
                with redirect_stdout(nowhere), redirect_stderr(nowhere):
                    rounds[name].append(statistics.median(side(options.steps)))
    reference = rounds["torch by hand"]
    print("| loop | microseconds a step | ratio to torch by hand | from | to |\n| --- | --- | --- | --- | --- |")
    for name, times in rounds.items():
        ratios = [time / other for time, other in zip(times, reference, strict=True)]
        median = statistics.median(ratios)
        print(
            f"| {name} | {statistics.median(times) * 1e6:,.0f} | {median:.2f} | {min(ratios):.2f} | {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
