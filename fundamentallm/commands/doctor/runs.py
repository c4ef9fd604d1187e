"""Checks of whole runs: micro-batches, validation, processes, kill and resume, learning by heart."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.checkpoint.reading import load_checkpoint
from fundamentallm.checkpoint.snapshot import MODEL_KEY
from fundamentallm.commands.doctor.case import (
    Case,
    Finding,
    counted,
    distance,
    draws_random_numbers,
    listed,
    tolerance,
    within,
)
from fundamentallm.commands.trial import (
    Until,
    few_rows,
    forward_rows,
    run_children,
    run_until,
    trial_config,
    use_validation,
    without_dropout,
    write_trial,
)
from fundamentallm.data.loaders import step_sampler
from fundamentallm.training.metrics import MEASURED

LAYOUT_STEPS = 3
"""Steps in which different layouts of the same batches are compared."""
STOP_AT, KILL_AT, SAVE_EVERY, LOG_EVERY, EVAL_EVERY = 9, 5, 2, 3, 4
"""Steps of kill and resume. A log line's window spans the restart, and a validation comes before the kill."""
SLOW_STEP = 10.0
"""Seconds of a step on the CPU from which on two processes there, and a killed run, are not tried."""
START_SECONDS = 120.0
"""How long a child may take besides its steps."""
OVERFIT_ROWS, OVERFIT_STEPS, OVERFIT_SECONDS, OVERFIT_TO = 4, 2000, 15.0, 0.5
"""Sequences to learn by heart, most steps and seconds for it, and the part of the first loss to get below."""
OVERFIT_WARMUP, OVERFIT_ENOUGH = 10, 50
"""Longest warm-up then, and the steps from which on a loss that has not fallen so far tells something."""
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Lines = list[dict[str, Any]]
"""Lines of metrics.jsonl."""


def check_micro_batches(case: Case) -> Finding:
    """Micro-batches of another size change neither losses nor weights."""
    trainer = case.make(dropout=False)
    largest = min(trainer.samples.micro_batch_size, trainer.samples.rank_batch(0).rows)
    smaller = max(1, largest // 3)
    if smaller == largest:
        return Finding("skipped", "a micro-batch of one sequence cannot be split")
    with without_dropout(trainer.model):
        if draws_random_numbers(trainer, *forward_rows(trainer)):
            return _stochastic()
    sizes, runs, weights = (largest, smaller), [], []
    for size in sizes:
        trainer = case.make(dropout=False, micro_batch_size=size)
        with without_dropout(trainer.model):
            runs.append(run_until(trainer, lambda run: len(run.losses) >= LAYOUT_STEPS).lines)
        weights.append(torch.cat([p.detach().double().flatten().cpu() for p in trainer.model.parameters()]))
    # Optimizers that normalise turn rounding noise in a gradient that is truly zero into whole steps of a few
    # weights, hence weights as a whole, and less strictly.
    apart = float((weights[0] - weights[1]).norm() / weights[0].norm())
    losses, problem = _compare(runs[0], runs[1], tolerance(trainer, 1e-5))
    if problem or apart > tolerance(trainer, 1e-3):
        return Finding(
            "fail",
            f"micro-batches of {sizes[0]} and {sizes[1]}: " + (problem or f"weights apart by {apart:.0e}"),
            "A row's loss must depend on that row alone, and be summed: look for statistics over the batch, padding "
            "that differs with the rows beside it, and means.",
        )
    return Finding("pass", f"of {sizes[0]} and {sizes[1]}: losses of {counted(len(runs[0]), 'step')} {within(losses)}")


def check_evaluation(case: Case) -> Finding:
    """The validation loss is the same for any batch size."""
    trainer = case.make()
    loader = trainer.val_loader
    if loader is None:
        return Finding("skipped", "there is no validation data")
    found = {}
    for size in sorted({1, 5, loader.batch_size or 1}):
        use_validation(trainer, loader, few_rows(loader), size)
        found[size] = trainer.validate()["val_loss"]
    apart = max(distance(loss, found[1]) for loss in found.values())
    if not apart <= tolerance(trainer, 1e-6):
        return Finding(
            "fail",
            "val_loss is " + ", ".join(f"{loss:.6f} with batch size {size}" for size, loss in found.items()),
            "A row's loss must depend on that row alone, and be summed over targets: look for padding that counts, "
            "attention to padding, statistics over the batch, and means.",
        )
    return Finding("pass", f"val_loss with batch sizes {', '.join(map(str, found))} {within(apart)}")


def check_two_processes(case: Case) -> Finding:
    """Two processes train as one does; on the CPU, whatever the device of the run."""
    seen = case.rehearsal
    steps = min(LAYOUT_STEPS, seen.total_steps)
    if seen.device == "cpu" and seen.step_seconds > SLOW_STEP:
        return Finding("skipped", f"a step takes {seen.step_seconds:.0f} s on this CPU")
    # Weights, gradients and two moments in each of two processes.
    needed, memory = 2 * 16 * seen.parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        return Finding("skipped", f"it would need {needed / 1e9:.0f} GB of this machine's {memory / 1e9:.0f} GB memory")
    trainer = case.make(dropout=False)
    with without_dropout(trainer.model):
        if draws_random_numbers(trainer, *forward_rows(trainer)):
            return _stochastic()
    timeout = START_SECONDS + 10 * steps * (seen.step_seconds if seen.device == "cpu" else SLOW_STEP)
    found = []
    for processes in (1, 2):
        folder = case.new_folder()
        config = trial_config(case.config, folder, dropout=False, mixed_precision="no")
        write_trial(folder, case.trainer, config, stop_at=steps, dropout=False)
        try:
            ended = run_children(folder, _cpu_processes(processes), timeout)
        except TimeoutError as error:
            if processes == 1:
                return Finding("skipped", f"{error}: it is too slow on this CPU")
            return Finding(
                "fail",
                f"two processes on the CPU: {error}, and one had",
                "One waits for the other: look for what only one of them does, or does another number of times.",
            )
        if ended.code and processes == 1 and seen.device != "cpu":
            return Finding("skipped", f"the run does not work on the CPU: {ended.output}")
        if ended.code:
            return Finding(
                "fail",
                f"{processes} process{'es' * (processes > 1)} on the CPU: {ended.output}",
                "That is the end of what the real run in a process of its own wrote.",
            )
        found.append(_metrics(folder))
    losses, problem = _compare(found[0], found[1], 1e-5)
    if problem:
        return Finding(
            "fail",
            f"one process and two: {problem}",
            "A process computes its share of each batch: look for what depends on the process (its index, the state "
            "of a generator, the time) or on which rows are computed together.",
        )
    return Finding("pass", f"on the CPU: losses of {counted(steps, 'step')} as on one process, {within(losses)}")


def check_resume(case: Case) -> Finding:
    """A run that is killed and started again ends as one that was not."""
    seen = case.rehearsal
    if seen.total_steps <= SAVE_EVERY:
        return Finding("skipped", f"the run has {counted(seen.total_steps, 'step')} only")
    if seen.step_seconds > SLOW_STEP:
        return Finding("skipped", f"a step takes {seen.step_seconds:.0f} s")
    free = shutil.disk_usage(case.folder).free
    if 8 * seen.checkpoint_bytes > free:
        return Finding(
            "skipped", f"{case.folder.parent} has too little space for checkpoints; set TMPDIR to a roomier one"
        )
    stop_at, kill_at = min(STOP_AT, seen.total_steps), min(KILL_AT, seen.total_steps)
    folders = [case.new_folder(), case.new_folder()]
    intervals: dict[str, Any] = {
        "save_every_n_steps": SAVE_EVERY,
        "log_every_n_steps": LOG_EVERY,
        "eval_every_n_steps": EVAL_EVERY,
    }
    timeout = START_SECONDS + 10 * stop_at * seen.step_seconds
    for folder, killed in zip(folders, (None, kill_at), strict=True):
        write_trial(folder, case.trainer, trial_config(case.config, folder, **intervals), stop_at, killed)
    for folder, expected in ((folders[0], 0), (folders[1], -signal.SIGKILL), (folders[1], 0)):
        ended = run_children(folder, [os.environ], timeout)
        if ended.code != expected:
            names = {0: "the run", -signal.SIGKILL: "the run to be killed"}
            which = "the run started again" if (folders[1] / "killed").exists() else names[expected]
            return Finding(
                "fail",
                f"{which} ended with code {ended.code}: {ended.output}",
                "That is the end of what it wrote, in a process of its own.",
            )
    started_at = json.loads((folders[1] / "outcome.json").read_text(encoding="utf-8"))["started_at"]
    if problem := _difference(*folders) or ("it started afresh, from no checkpoint" if started_at == 0 else None):
        return Finding(
            "fail",
            f"killed at step {kill_at}, resumed from {started_at}: {problem}",
            "Something changes during training that neither a checkpoint holds nor (seed, step) gives: a buffer with "
            "persistent=False, a callback or schedule without state_dict(), a generator of one's own.",
        )
    return Finding("pass", f"killed at step {kill_at}, resumed from {started_at}: weights and log equal to the bit")


def check_overfitting(case: Case) -> Finding:
    """The loss on a few sequences, seen again and again, falls well below where it began."""
    steps = max(case.rehearsal.total_steps, OVERFIT_STEPS)
    warmup = min(case.config.training.warmup_steps, OVERFIT_WARMUP)
    trainer = case.make(dropout=False, max_steps=steps, max_epochs=None, warmup_steps=warmup)
    loader = trainer.train_loader
    indices = trainer.samples.batch(0)[:OVERFIT_ROWS]
    subset: Subset[Any] = Subset(loader.dataset, indices)
    trainer.train_loader = DataLoader(subset, batch_size=len(indices), collate_fn=loader.collate_fn)
    trainer.samples = step_sampler("train_loader", trainer.train_loader, 0, 0, 1, trainer.samples.micro_batch_size)

    def enough(run: Until) -> bool:
        seconds = run.times[-1] - run.times[0]
        learnt = run.losses[-1] < OVERFIT_TO * run.losses[0]
        return learnt or len(run.losses) >= OVERFIT_STEPS or seconds > OVERFIT_SECONDS

    with without_dropout(trainer.model):
        losses = run_until(trainer, enough).losses
    effort = f"{counted(len(losses), 'step')} on {counted(len(indices), 'sequence')}"
    figure = f"loss {losses[0]:.4g} -> {losses[-1]:.4g} in {effort}"
    if losses[-1] < OVERFIT_TO * losses[0]:
        return Finding("pass", figure)
    if len(losses) < OVERFIT_ENOUGH and losses[-1] < losses[0]:
        return Finding("skipped", f"{figure}: too slow here to tell in {OVERFIT_SECONDS:.0f} s")
    return Finding(
        "fail",
        figure,
        f"It should fall below {OVERFIT_TO:g} of where it began. Try training.learning_rate ten times higher and lower "
        f"(it is {case.config.training.learning_rate:g}), and look whether the targets follow from the inputs.",
    )


def _stochastic() -> Finding:
    return Finding("skipped", "the model draws random numbers besides dropout, so that layouts agree on average only")


def _cpu_processes(count: int) -> list[Mapping[str, str]]:
    """The environments of processes on the CPU, as torchrun would set them."""
    common = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES and not k.startswith("ACCELERATE_")}
    # As many threads for one as for each of two, so that the same kernels run.
    common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))
    common["ACCELERATE_USE_CPU"] = "true"
    if count == 1:
        return [common]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    return [common | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _metrics(folder: Path) -> Lines:
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


def _compare(expected: Lines, got: Lines, allowed: float) -> tuple[float, str | None]:
    """(largest relative distance of the losses, what is wrong if it is above `allowed`) of two runs."""
    if len(expected) != len(got):
        return math.inf, f"{len(expected)} log lines and {len(got)}"
    largest = 0.0
    for one, other in zip(expected, got, strict=True):
        # The norm is what tells where an optimizer that normalises gradients hides their scale.
        for name, factor in (("train_loss", 1), ("val_loss", 1), ("grad_norm", 100)):
            if name not in one:
                continue
            apart = distance(one[name], other[name])
            if not apart <= allowed * factor:
                values = f"{float(one[name]):.7g} and {float(other[name]):.7g}"
                return apart, f"{name} of step {one['step']} is {values}, apart by {apart:.0e}"
            largest = max(largest, apart if name != "grad_norm" else 0.0)
    return largest, None


def _difference(one: Path, other: Path) -> str | None:
    """The first difference of two finished runs, to the bit."""
    whole, resumed = _metrics(one), _metrics(other)
    if len(whole) != len(resumed):
        return f"{len(resumed)} log lines; {len(whole)} in the run that was not"
    for expected, got in zip(whole, resumed, strict=True):
        for name in expected:
            if expected[name] != got.get(name):
                return f"{name} of step {expected['step']} is {got.get(name)}; {expected[name]} in the run that was not"
    weights = [load_checkpoint(_newest(folder))[MODEL_KEY] for folder in (one, other)]
    different = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    return f"the weights differ in {listed(different)}" if different else None


def _newest(folder: Path) -> Path:
    newest = CheckpointManager(folder / "run" / "checkpoints").get_latest()
    if newest is None:
        raise FileNotFoundError("the trial run has saved no checkpoint")
    return newest
