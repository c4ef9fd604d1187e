"""How the cost of an optimizer step grows with layers, width, context, vocabulary and number of processes.

    python -m tests.benchmarks.growth [--axes width context] [--seconds 3]

One setting of a small model is varied at a time, in real runs of the Trainer in float32, one thread for each process.
The cost is CPU time, that of all processes together, of a run's cheapest step (its first two left out), so that
whatever else the machine does counts little; wall-clock time is the median. Beside it are the operations that
`fundamentallm estimate` counts. A row is marked where the cost has grown more than 1.25 times as much as they since the
row before.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fundamentallm import Callback, Config, DataConfig, ModelConfig, Trainer, TrainingConfig, Transformer
from fundamentallm.commands.estimate import count
from fundamentallm.data.loaders import create_dataloaders
from tests.integration.runs import on_processes

BASE = {"layers": 4, "width": 128, "context": 128, "vocabulary": 2048, "processes": 1}
AXES = {
    "layers": (1, 2, 4, 8, 16),
    "width": (32, 64, 128, 256, 512),
    "context": (32, 64, 128, 256, 512, 1024),
    "vocabulary": (256, 512, 1023, 1024, 2048, 8192, 32768),
    "processes": (1, 2, 4),
}
"""A vocabulary of 1024 is the first whose logits are made in chunks."""
BATCH, HEAD = 8, 32
WARM_UP, AT_LEAST, AT_MOST = 2, 5, 50
"""Steps of each run."""
SURPRISE = 1.25


class Point(NamedTuple):
    """One run: a value on its axis, and what an optimizer step of it took."""

    value: int
    cpu_seconds: float
    wall_seconds: float
    flops: int


def config_of(values: dict[str, int]) -> Config:
    """A run with these values; the batch counts sequences over all processes, and stays the same."""
    model = ModelConfig(values["vocabulary"], values["width"], values["width"] // HEAD, num_layers=values["layers"])
    training = TrainingConfig(batch_size=BATCH, max_steps=AT_MOST, save_every_n_epochs=None, hang_minutes=None)
    return Config(
        model=model, data=DataConfig(sequence_length=values["context"], train_split=1.0), training=training
    ).resolved()


class Clock(Callback):
    """Notes the times at the end of each step, and ends the run when there are enough."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.marks: list[tuple[float, float]] = []

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        self.marks.append((time.process_time(), time.perf_counter()))
        # Of the same clock on all processes: the first one's to stop takes the others along.
        if len(self.marks) >= WARM_UP + AT_LEAST and self.marks[-1][1] - self.marks[WARM_UP - 1][1] > self.seconds:
            trainer.request_stop("measured")

    def times(self) -> tuple[float, float]:
        """Least CPU and median wall-clock seconds of a step."""
        steps = list(itertools.pairwise(self.marks[WARM_UP - 1 :]))
        cpu, wall = ([after[i] - before[i] for before, after in steps] for i in (0, 1))
        return min(cpu), statistics.median(wall)


def run(_: int, values: dict[str, int], seconds: float, folder: str) -> None:
    """Train on this process, and leave its times in the folder."""
    torch.set_num_threads(1)
    config, clock = config_of(values), Clock(seconds)
    tokens = np.random.default_rng(0).integers(values["vocabulary"], size=2 * BATCH * values["context"] + 1)
    loader, _none = create_dataloaders(tokens, None, config)
    torch.manual_seed(0)
    # A TrainingConfig by itself: nothing is saved.
    training = TrainingConfig(batch_size=BATCH, max_steps=AT_MOST, log_every_n_steps=AT_MOST, hang_minutes=None)
    trainer = Trainer(Transformer(config.model), training, loader, callbacks=[clock])
    trainer.train()
    Path(folder, str(trainer.accelerator.process_index)).write_text(json.dumps(clock.times()))


def measure(axis: str, value: int, seconds: float) -> Point:
    """The base, but for one value."""
    values = BASE | {axis: value}
    with tempfile.TemporaryDirectory() as folder:
        on_processes(values["processes"], run, values, seconds, folder)
        found = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    assert len(found) == values["processes"]
    config = config_of(values)
    flops = count(config).flops_per_token * (config.training.batch_size or 0) * config.data.sequence_length
    return Point(value, sum(cpu for cpu, _ in found), max(wall for _, wall in found), flops)


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """p of the power law c * value^p that fits best, by least squares of logarithms."""
    return float(np.polyfit(np.log(values), np.log(costs), 1)[0])


def table(axis: str, points: Sequence[Point]) -> Iterable[str]:
    """Markdown: the points, and below them the exponents."""
    values = [point.value for point in points]
    yield f"| {axis} | CPU ms a step | wall ms a step | GFLOP a step | GFLOP/s | grown by | FLOPs grown by | |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for before, point in zip([None, *points], points, strict=False):
        grown = flops = math.nan
        if before is not None:
            grown, flops = point.cpu_seconds / before.cpu_seconds, point.flops / before.flops
        mark = "more than its FLOPs" if grown > SURPRISE * flops else ""
        growth = "| | " if before is None else f"| {grown:.2f} | {flops:.2f} "
        yield (
            f"| {point.value:,} | {1e3 * point.cpu_seconds:,.1f} | {1e3 * point.wall_seconds:,.1f} | "
            f"{point.flops / 1e9:,.2f} | {point.flops / point.cpu_seconds / 1e9:,.1f} {growth}| {mark} |"
        )
    fits = (exponent(values, costs) for costs in ([p.cpu_seconds for p in points], [float(p.flops) for p in points]))
    yield "| exponent | {:.2f} | | {:.2f} | | | | |".format(*fits)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="all by default")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run, at least [3]")
    options = parser.parse_args(arguments)
    base = ", ".join(f"{name} {value:,}" for name, value in BASE.items())
    print(f"{base}; {BATCH} sequences a step, AdamW, float32, torch {torch.__version__}")
    for axis in options.axes:
        found = list[Point]()
        for value in AXES[axis]:
            with tempfile.TemporaryFile("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                found.append(measure(axis, value, options.seconds))
        print("", *table(axis, found), sep="\n", flush=True)


if __name__ == "__main__":
    main()
