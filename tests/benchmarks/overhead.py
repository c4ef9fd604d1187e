"""What a trainer costs beside the model: the time of an optimizer step of a tiny model, of ours and of other loops.

    python -m tests.benchmarks.overhead [--rounds 7] [--turns 20]

Every side trains the same Transformer (two blocks of width 32) on the same text, on one thread of a CPU, with fused
AdamW, a cosine schedule, clipping, a progress bar, and a log line every 10 steps. Each has a process of its own, and
they take turns of 50 steps: whatever else the machine does hits all of them alike. Two processes of one side differ by
several per cent for as long as they live, so that there are rounds with new ones: a ratio is the median over the
rounds, once of the lowest tenth of the turns and once of their median. Peers that are not installed are left out.
"""

from __future__ import annotations

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
from importlib.util import find_spec
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fundamentallm import Callback, Config, DataConfig, ModelConfig, Trainer, TrainingConfig, Transformer
from fundamentallm.data.loaders import create_dataloaders
from fundamentallm.data.tokenizers import create_tokenizer
from fundamentallm.training.callbacks.from_config import default_callbacks
from tests.integration.runs import prose

LENGTH, BATCH, EVERY, STRETCHES = 16, 4, 10, 5
LEARNING_RATE = 1e-3
REFERENCE = "torch by hand"
FOR_EVER = 10**9
"""Steps: a side is ended when it has had its turns."""


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """As one writes it by hand: a sample at a time."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        self.tokens = torch.tensor(tokenizer.encode(text).ids)

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // LENGTH

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.tokens[index * LENGTH : (index + 1) * LENGTH + 1]
        return window[:-1], window[1:]


class Clock:
    """Told of every `EVERY`th step; hands over to the next side after a turn."""

    def __init__(self, turns: Connection) -> None:
        self.turns, self.marks = turns, [0.0]
        self.text = prose(400_000)
        self.tokenizer = create_tokenizer("char", self.text)
        self.shape = ModelConfig(self.tokenizer.get_vocab_size(), d_model=32, num_heads=2, num_layers=2)

    def mark(self) -> None:
        self.marks.append(time.process_time())
        if len(self.marks) > STRETCHES + 1:  # the first stretch warms the caches
            self.turns.send((self.marks[-1] - self.marks[1]) / (EVERY * STRETCHES))
            self.turns.recv()
            self.marks = [time.process_time()]

    def samples(self) -> Samples:
        return Samples(self.text, self.tokenizer)

    def stock_loader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.samples(), batch_size=BATCH, shuffle=True, drop_last=True)

    def model_and_optimizer(self) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        torch.manual_seed(0)
        model = Transformer(self.shape)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FOR_EVER)


def ours(clock: Clock) -> None:
    class Marks(Callback):
        def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            clock.mark()

    with tempfile.TemporaryDirectory() as folder:
        training = TrainingConfig(
            batch_size=BATCH, max_steps=FOR_EVER, learning_rate=LEARNING_RATE, eval_every_n_epochs=None,
            save_every_n_epochs=None, log_every_n_steps=EVERY,
        )  # fmt: skip
        config = Config(folder, clock.shape, DataConfig(sequence_length=LENGTH), training)
        loader, _ = create_dataloaders(clock.text, clock.tokenizer, config)
        torch.manual_seed(0)
        Trainer(Transformer(clock.shape), config, loader, None, [*default_callbacks(config, False), Marks()]).train()


def loop(
    clock: Clock,
    loader: Iterable[tuple[Tensor, Tensor]],
    scheduler: Any,
    take_step: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """What every loop of one's own has beside its step: epochs, a bar, and a log line."""
    step, total = 0, torch.zeros(())
    with tqdm(total=FOR_EVER) as bar:
        while True:
            for inputs, targets in loader:
                total += take_step(inputs, targets).detach()
                step += 1
                bar.update()
                if step % EVERY == 0:
                    bar.set_postfix(loss=total.item() / EVERY, lr=scheduler.get_last_lr()[0])
                    total.zero_()
                    clock.mark()


def by_hand(clock: Clock) -> None:
    """The step one would write with torch alone."""
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
    """accelerate's documented step."""
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
    """A model as transformers' Trainer wants it."""

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
            folder, per_device_train_batch_size=BATCH, max_steps=FOR_EVER, logging_steps=EVERY, save_strategy="no",
            max_grad_norm=1.0, use_cpu=True, report_to="none", dataloader_pin_memory=False,
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
            if trainer.global_step % EVERY == 0:
                clock.mark()

    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_steps=-1, max_epochs=-1, log_every_n_steps=EVERY, gradient_clip_val=1.0,
            enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder, callbacks=[Marks()],
            logger=lightning.pytorch.loggers.CSVLogger(folder),
        )  # fmt: skip
        trainer.fit(Module(), clock.stock_loader())


def by_pytorch_accelerated(clock: Clock) -> None:
    from pytorch_accelerated import Trainer as Accelerated
    from pytorch_accelerated.callbacks import ProgressBarCallback, TrainerCallback

    class Marks(TrainerCallback):
        steps = 0

        def on_train_step_end(self, trainer: Any, **_: object) -> None:
            self.steps += 1
            if self.steps % EVERY == 0:
                clock.mark()

    model, optimizer, scheduler = clock.model_and_optimizer()
    trainer = Accelerated(
        model=model,
        loss_func=lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten()),
        optimizer=optimizer,
        callbacks=[ProgressBarCallback(), Marks()],
    )
    trainer.train(
        train_dataset=clock.samples(), num_epochs=FOR_EVER, per_device_batch_size=BATCH, gradient_clip_value=1.0,
        create_scheduler_fn=lambda optimizer: scheduler, train_dataloader_kwargs={"num_workers": 0},
    )  # fmt: skip


SIDES: dict[str, Callable[[Clock], None]] = {
    REFERENCE: by_hand,
    "fundamentallm": ours,
    "accelerate": by_accelerate,
    "transformers": by_transformers,
    "lightning": by_lightning,
    "pytorch-accelerated": by_pytorch_accelerated,
}


class Terminal(io.StringIO):
    """What bars draw themselves on."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


def run_side(name: str, turns: Connection) -> None:
    """In a process of its own: that side, from turn to turn."""
    torch.set_num_threads(1)
    turns.recv()
    with redirect_stdout(Terminal()), redirect_stderr(Terminal()):
        SIDES[name](Clock(turns))


def quietest(times: list[float]) -> float:
    """The lowest tenth's upper end: what the machine's other work, which only adds, has touched least."""
    return statistics.quantiles(times, n=10)[0]


def one_round(sides: list[str], turns: int) -> dict[str, list[float]]:
    """Seconds of a step, of each side in each turn, with new processes."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    pipes, processes = {}, []
    for name in sides:
        pipes[name], theirs = Pipe()
        processes.append(get_context("spawn").Process(target=run_side, args=(name, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that the end of the process is the end of the pipe
    for turn in range(turns + 1):  # the first one starts up
        for name, pipe in pipes.items():
            pipe.send("your turn")
            seconds = pipe.recv()
            if turn:
                times[name].append(seconds)
    for process in processes:
        process.kill()  # they would go on for ever
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="with new processes [7]")
    parser.add_argument("--turns", type=int, default=20, help="of each side in a round [20]")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="[all]")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sides = [name for name in options.sides if name in list(SIDES)[:3] or find_spec(name.replace("-", "_"))]
    if sides[0] != REFERENCE:
        parser.error(f"the first side is {sides[0]!r}; allowed: {REFERENCE!r}, to which the others are compared.")
    rounds = [one_round(sides, options.turns) for _ in range(options.rounds)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", *sides[1:]))
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {versions}\n")
    print("| loop | microseconds a step | ratio | of the medians | lowest and highest of the rounds |")
    print("| --- | --- | --- | --- | --- |")
    for name in sides:
        quiet = [quietest(times[name]) / quietest(times[REFERENCE]) for times in rounds]
        usual = [statistics.median(times[name]) / statistics.median(times[REFERENCE]) for times in rounds]
        microseconds = statistics.median(quietest(times[name]) for times in rounds) * 1e6
        print(
            f"| {name} | {microseconds:,.0f} | {statistics.median(quiet):.3f} | {statistics.median(usual):.3f} "
            f"| {min(quiet):.2f} to {max(quiet):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
