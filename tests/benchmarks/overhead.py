"""Measures what a trainer costs besides the model: processor time of an optimizer step, ours and that of other loops.

    python -m tests.benchmarks.overhead [--sizes toy default] [--rounds 7] [--turns 20]

Each side trains the same Transformer on the same text, on one thread of a CPU, with fused AdamW, a cosine schedule,
clipping, a progress bar and log lines. The toy size shows the cost of a step best; the default size (`ModelConfig`'s
defaults, 2,048 tokens a step) shows what a user may notice.

Each side has its own process, and the sides take turns, so other work on the machine affects all of them alike. Two
processes of one side differ by several per cent for as long as they live, so each round starts new ones. A ratio is the
median over the rounds, once of the fastest tenth of the turns and once of their median. Sides that are not installed
are skipped.
"""

import argparse
import importlib.metadata
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
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
from tests.integration.runs import prose

LEARNING_RATE = 1e-3
REFERENCE = "torch by hand"
ENDLESS = 10**9
"""Steps of a run: a side ends when it has had its turns."""


@dataclass(frozen=True)
class Size:
    """A model, its batches, and how long a turn is."""

    model: dict[str, int]
    length: int
    """Tokens in a sequence."""
    batch: int
    """Sequences in a step."""
    every: int
    """Steps between log lines."""
    windows: int
    """Log lines in a turn."""


SIZES = {
    "toy": Size({"d_model": 32, "num_heads": 2, "num_layers": 2}, length=16, batch=4, every=10, windows=5),
    "default": Size({}, length=256, batch=8, every=2, windows=1),
}


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """A dataset as one writes it by hand: one sample at a time."""

    def __init__(self, text: str, tokenizer: Any, length: int) -> None:
        self.tokens, self.length = torch.tensor(tokenizer.encode(text).ids), length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.tokens[index * self.length : (index + 1) * self.length + 1]
        return window[:-1], window[1:]


class Clock:
    """Takes the time at log lines, and hands over to the next side after a turn."""

    def __init__(self, turns: Connection, size: Size) -> None:
        self.turns, self.size, self.marks = turns, size, [0.0]
        self.text = prose(400_000)
        self.tokenizer = create_tokenizer("char", self.text)
        self.shape = ModelConfig(self.tokenizer.get_vocab_size(), **size.model)

    def mark(self) -> None:
        """Note a log line; at the end of a turn, send its seconds a step and wait for the next turn."""
        self.marks.append(time.process_time())
        if len(self.marks) > self.size.windows + 1:  # the first window warms the caches
            self.turns.send((self.marks[-1] - self.marks[1]) / (self.size.every * self.size.windows))
            self.turns.recv()
            self.marks = [time.process_time()]

    def samples(self) -> Samples:
        return Samples(self.text, self.tokenizer, self.size.length)

    def stock_loader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.samples(), batch_size=self.size.batch, shuffle=True, drop_last=True)

    def model_and_optimizer(self) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        torch.manual_seed(0)
        model = Transformer(self.shape)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ENDLESS)


def ours(clock: Clock) -> None:
    class Marks(Callback):
        def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            clock.mark()

    with tempfile.TemporaryDirectory() as folder:
        training = TrainingConfig(
            batch_size=clock.size.batch, max_steps=ENDLESS, learning_rate=LEARNING_RATE, eval_every_n_epochs=None,
            save_every_n_epochs=None, log_every_n_steps=clock.size.every,
        )  # fmt: skip
        config = Config(folder, clock.shape, DataConfig(sequence_length=clock.size.length), training)
        loader, _ = create_dataloaders(clock.text, clock.tokenizer, config)
        torch.manual_seed(0)
        Trainer(
            Transformer(clock.shape), config, loader, None, [*default_callbacks(config, Path(folder), False), Marks()]
        ).train()


def loop(
    clock: Clock,
    loader: Iterable[tuple[Tensor, Tensor]],
    scheduler: Any,
    take_step: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Run the parts that every hand-written loop has: epochs, a bar, and a log line."""
    step, total = 0, torch.zeros(())
    with tqdm(total=ENDLESS) as bar:
        while True:
            for inputs, targets in loader:
                total += take_step(inputs, targets).detach()
                step += 1
                bar.update()
                if step % clock.size.every == 0:
                    bar.set_postfix(loss=total.item() / clock.size.every, lr=scheduler.get_last_lr()[0])
                    total.zero_()
                    clock.mark()


def by_hand(clock: Clock) -> None:
    """A step written with torch alone."""
    model, optimizer, scheduler = clock.model_and_optimizer()

    def take_step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss

    loop(clock, clock.stock_loader(), scheduler, take_step)


def by_accelerate(clock: Clock) -> None:
    """The step that accelerate documents."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, scheduler, loader = accelerator.prepare(*clock.model_and_optimizer(), clock.stock_loader())

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

    loop(clock, loader, scheduler, take_step)


class WithLoss(nn.Module):
    """A model as transformers' Trainer takes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())}


def by_transformers(clock: Clock) -> None:
    import transformers

    class Marks(transformers.TrainerCallback):
        def on_log(self, *_: object, **__: object) -> None:
            clock.mark()

    class Named(Dataset[dict[str, Tensor]]):
        samples = clock.samples()

        def __len__(self) -> int:
            return len(self.samples)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            inputs, targets = self.samples[index]
            return {"inputs": inputs, "targets": targets}

    model, optimizer, scheduler = clock.model_and_optimizer()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, per_device_train_batch_size=clock.size.batch, max_steps=ENDLESS, logging_steps=clock.size.every,
            save_strategy="no", max_grad_norm=1.0, use_cpu=True, report_to="none", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            WithLoss(model), arguments, train_dataset=Named(), optimizers=(optimizer, scheduler), callbacks=[Marks()]
        )
        trainer.train()


def by_lightning(clock: Clock) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.optimizer, self.scheduler = clock.model_and_optimizer()

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            inputs, targets = batch
            loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
            self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            return {
                "optimizer": self.optimizer,
                "lr_scheduler": {"scheduler": self.scheduler, "interval": "step"},
            }

    class Marks(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: object, **__: object) -> None:
            if trainer.global_step % clock.size.every == 0:
                clock.mark()

    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_steps=-1, max_epochs=-1, log_every_n_steps=clock.size.every,
            gradient_clip_val=1.0, enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder,
            callbacks=[Marks()], logger=lightning.pytorch.loggers.CSVLogger(folder),
        )  # fmt: skip
        trainer.fit(Module(), clock.stock_loader())


SIDES: dict[str, Callable[[Clock], None]] = {
    REFERENCE: by_hand,
    "fundamentallm": ours,
    "accelerate": by_accelerate,
    "transformers": by_transformers,
    "lightning": by_lightning,
}


class Terminal(io.StringIO):
    """A stream for progress bars."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


def run_side(name: str, size: str, turns: Connection) -> None:
    """Run a side in a process of its own, turn by turn."""
    torch.set_num_threads(1)
    turns.recv()
    with redirect_stdout(Terminal()), redirect_stderr(Terminal()):
        SIDES[name](Clock(turns, SIZES[size]))


def fastest_tenth(times: list[float]) -> float:
    """Returns the upper end of the fastest tenth. Other work on the machine only adds time, and least to these."""
    return statistics.quantiles(times, n=10)[0]


def one_round(sides: list[str], size: str, turns: int) -> dict[str, list[float]]:
    """Returns the seconds a step of each side in each turn, with new processes."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    pipes, processes = {}, []
    for name in sides:
        pipes[name], other_end = Pipe()
        processes.append(get_context("spawn").Process(target=run_side, args=(name, size, other_end), daemon=True))
        processes[-1].start()
        other_end.close()  # so that the pipe ends with the process
    for turn in range(turns + 1):  # the first one starts up
        for name, pipe in pipes.items():
            pipe.send("your turn")
            seconds = pipe.recv()
            if turn:
                times[name].append(seconds)
    for process in processes:
        process.kill()  # their runs are endless
    return times


def print_table(sides: list[str], size: str, rounds: list[dict[str, list[float]]]) -> None:
    print(f"\n| loop, {size} | ms a step | ratio | of the medians | lowest and highest of the rounds |")
    print("| --- | --- | --- | --- | --- |")
    for name in sides:
        ratios = [fastest_tenth(times[name]) / fastest_tenth(times[REFERENCE]) for times in rounds]
        medians = [statistics.median(times[name]) / statistics.median(times[REFERENCE]) for times in rounds]
        milliseconds = statistics.median(fastest_tenth(times[name]) for times in rounds) * 1e3
        print(
            f"| {name} | {milliseconds:,.3f} | {statistics.median(ratios):.3f} | {statistics.median(medians):.3f} "
            f"| {min(ratios):.3f} to {max(ratios):.3f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="[all]")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, with new processes each [7]")
    parser.add_argument("--turns", type=int, default=20, help="turns of each side in a round [20]")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="[all]")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sides = [name for name in options.sides if name in list(SIDES)[:3] or find_spec(name)]
    if sides[0] != REFERENCE:
        parser.error(f"the first side is {sides[0]!r}; allowed: {REFERENCE!r}, to which the others are compared.")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", *sides[1:]))
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {versions}")
    for size in options.sizes:
        print_table(sides, size, [one_round(sides, size, options.turns) for _ in range(options.rounds)])


if __name__ == "__main__":
    main()
