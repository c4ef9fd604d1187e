"""Trains one config in many layouts, and compares each run with that of one process: one config, one run.

By hand: `python -m tests.integration.layouts [--short] [--steps N]`; it prints a Markdown table, and exits with 1 if a
run is not the reference's. A layout is a number of processes (gloo, on CPU), what each of them holds (the whole model:
DDP; a shard of it: FSDP2; a shard, in each of several replicas: HSDP) and micro-batches, or several of them, one after
the other: the run is stopped and resumed in the next. The samples are those that the processes' datasets were really
asked for; the numbers are those of every step and of every validation, as logged.
"""

import argparse
import io
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from fundamentallm import Callback, LoggingCallback, ModelConfig, Trainer, TrainingConfig, Transformer
from tests.integration.runs import Counting, PartlyIgnored, lines, on_processes, sharded_accelerator

BOUND = 1e-5
"""Largest relative difference of a logged number. Sums in fp32 in another order begin with 1e-7, and training
multiplies that: here, at a large learning rate, tenfold in some 20 steps."""
STEPS = 30
# 51 samples make 4 steps an epoch. The last has 3 samples, one fewer than the largest group has processes; the last
# batch of a validation, 2. Some samples have no target that counts. A run in two parts is stopped within an epoch.
SAMPLES, BATCH_SIZE = 51, 16
VALIDATION_SAMPLES, VALIDATION_BATCH_SIZE = 30, 7
OPTIMIZERS = ("adamw", "muon")
NUMBERS = {"loss": "train_loss", "gradient norm": "grad_norm", "validation": "val_loss"}
"""What is compared, and its key in a log line."""


class Part(NamedTuple):
    """How a run, or a part of one, is laid out.

    Attributes:
        processes: in one gloo group.
        micro_batch_size: as in the config.
        replicas: of the model, each sharded over the processes that share it; None: one on each process.
    """

    processes: int = 1
    micro_batch_size: int | None = None
    replicas: int | None = None

    def __str__(self) -> str:
        words = ["1 process"] if self.processes == 1 else [f"{self.processes} processes", self._kind]
        if self.micro_batch_size is not None:
            share = math.ceil(BATCH_SIZE / self.processes)
            words.append(f"{math.ceil(share / self.micro_batch_size)} micro-batches")
        return ", ".join(words)

    @property
    def _kind(self) -> str:
        if self.replicas is None:
            return "DDP"
        return "FSDP2" if self.replicas == 1 else f"HSDP {self.replicas}x{self.processes // self.replicas}"


Layout = tuple[Part, ...]
REFERENCE: Layout = (Part(),)
LAYOUTS: tuple[Layout, ...] = (
    *((Part(processes),) for processes in (2, 3, 4)),
    *((Part(1, size),) for size in (8, 2)),
    *((Part(*shape),) for shape in ((2, 4), (2, 2), (3, 2), (4, 1))),
    *((Part(processes, replicas=1),) for processes in (2, 3, 4)),
    (Part(2, 2, replicas=1),),
    (Part(4, replicas=2),),
    (Part(4, 2, replicas=2),),
    (Part(1), Part(2)),
    (Part(2), Part(1)),
    (Part(4), Part(3)),
    (Part(1, 2), Part(4, 1), Part(2, 4)),
    (Part(2), Part(2, replicas=1)),
    (Part(2, replicas=1), Part(1)),
    (Part(2, replicas=1), Part(3, replicas=1)),
    (Part(4, replicas=1), Part(4, replicas=2)),
    (Part(4, replicas=2), Part(1), Part(3, replicas=1)),
)
SHORT: tuple[Layout, ...] = (
    (Part(4, 2, replicas=2),),
    (Part(2, replicas=1), Part(3)),
)
"""The rows of the test."""


class Witness(Callback):
    """Notes which samples this process was given for each step, and asks for a stop after one of them."""

    def __init__(self, data: Counting, stop_at: int) -> None:
        self.data, self.stop_at = data, stop_at
        self.samples: list[list[int]] = []

    def on_step_begin(self, trainer: Trainer) -> None:
        batch = trainer.samples.rank_batch(trainer.global_step)
        loaded = self.data.asked[-len(batch.indices) :]  # before it, samples were read for the checks of a launch
        self.samples.append(loaded[: batch.rows])  # without padding

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if trainer.global_step == self.stop_at:
            trainer.request_stop("the next layout's turn")


def train(
    processes: int, folder: str, number: int, part: Part, optimizer: str, dropout: float, steps: int, stop_at: int
) -> None:
    """One part of a run, on one of its processes, which notes its samples in a file of its own."""
    accelerator = None if part.replicas is None else sharded_accelerator(part.replicas)
    torch.manual_seed(0)
    config = TrainingConfig(
        optimizer=optimizer,
        learning_rate=1e-2,
        warmup_steps=5,
        max_steps=steps,
        micro_batch_size=part.micro_batch_size,
        log_every_n_steps=1,
        eval_every_n_steps=5,
        checkpoint_dir=str(Path(folder) / "checkpoints"),
        save_every_n_epochs=None,
    )
    model = ModelConfig(vocab_size=20, d_model=16, num_heads=2, num_kv_heads=1, num_layers=2, dropout=dropout)
    data = Counting(SAMPLES)
    witness = Witness(data, stop_at)
    trainer = Trainer(
        Transformer(model),
        config,
        DataLoader(data, batch_size=BATCH_SIZE, shuffle=True),
        DataLoader(PartlyIgnored(VALIDATION_SAMPLES), batch_size=VALIDATION_BATCH_SIZE),
        [LoggingCallback(Path(folder) / "metrics.jsonl"), witness],
        accelerator=accelerator,
    )
    assert trainer.accelerator.num_processes == processes
    assert all(isinstance(p, DTensor) == (part.replicas is not None) for p in trainer.model.parameters())
    trainer.train()
    place = trainer.accelerator.process_index
    (Path(folder) / f"samples_{number}_{place}.json").write_text(json.dumps(witness.samples))


class Run(NamedTuple):
    """What a run was, by what it has written.

    Attributes:
        numbers: logged at every step, or validation, by name.
        samples: of each step's batch, over all processes, in order.
    """

    numbers: dict[str, list[float]]
    samples: list[list[int]]


def run(folder: Path, layout: Layout, optimizer: str, steps: int, dropout: float = 0.0) -> Run:
    """Train in each part of the layout for an equal number of steps."""
    samples: list[list[int]] = []
    for number, part in enumerate(layout):
        stop_at = steps * (number + 1) // len(layout)
        with redirect_stdout(io.StringIO()):
            on_processes(part.processes, train, str(folder), number, part, optimizer, dropout, steps, stop_at)
        shares = [json.loads((folder / f"samples_{number}_{i}.json").read_text()) for i in range(part.processes)]
        samples += [list(itertools.chain(*of_step)) for of_step in zip(*shares, strict=True)]
    written = lines(folder)
    return Run({name: [line[key] for line in written if key in line] for name, key in NUMBERS.items()}, samples)


class Difference(NamedTuple):
    """Of a run from the reference: of its numbers, relative and the largest; and the first step of other samples."""

    numbers: dict[str, float]
    other_samples_at: int | None

    @property
    def is_within_bound(self) -> bool:
        return max(self.numbers.values()) <= BOUND and self.other_samples_at is None


def difference(one: Run, reference: Run) -> Difference:
    pairs = enumerate(zip(one.samples, reference.samples, strict=True), start=1)
    return Difference(
        {name: _largest(one.numbers[name], expected) for name, expected in reference.numbers.items()},
        next((step for step, (mine, other) in pairs if mine != other), None),
    )


def _largest(values: list[float], expected: list[float]) -> float:
    return max(abs(value - other) / abs(other) for value, other in zip(values, expected, strict=True))


class Row(NamedTuple):
    """A layout's differences, by optimizer."""

    layout: Layout
    differences: dict[str, Difference]

    @property
    def is_within_bound(self) -> bool:
        return all(found.is_within_bound for found in self.differences.values())

    def __str__(self) -> str:
        found = self.differences.values()
        first = min((each.other_samples_at for each in found if each.other_samples_at is not None), default=None)
        samples = "the same" if first is None else f"others from step {first} on"
        numbers = [f"{value:.1e}" for each in found for value in each.numbers.values()]
        return markdown([" → ".join(map(str, self.layout)), samples, *numbers])


def markdown(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def compare(
    layouts: Iterable[Layout], steps: int, folder: Path, optimizers: Iterable[str] = OPTIMIZERS
) -> Iterator[Row]:
    """Run each layout with each optimizer, and the reference first."""
    references = {name: run(folder / name, REFERENCE, name, steps) for name in optimizers}
    for number, layout in enumerate(layouts):
        runs = {name: run(folder / f"{name}_{number}", layout, name, steps) for name in references}
        yield Row(layout, {name: difference(done, references[name]) for name, done in runs.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few rows only, those of the test")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    titles = ["layout", "samples", *(f"{optimizer}: {name}" for optimizer in OPTIMIZERS for name in NUMBERS)]
    print(markdown(titles), markdown(["---"] * len(titles)), sep="\n", flush=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="layouts-") as folder:
        for row in compare(SHORT if arguments.short else LAYOUTS, arguments.steps, Path(folder)):
            print(row, flush=True)
            rows.append(row)
    broken = sum(not row.is_within_bound for row in rows)
    print(f"\n{arguments.steps} steps each; {broken} of {len(rows)} layouts differ by more than {BOUND:.0e}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
