"""The checks of `doctor`, in their order. Each makes its own trial runs and returns what it found."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import random
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import release_memory
from torch import Tensor
from torch.utils.data import DataLoader

from fundamentallm.commands import trial
from fundamentallm.commands.doctor.forecast import Measured, measure
from fundamentallm.commands.output import plural
from fundamentallm.config.schema import Config
from fundamentallm.distributed.batches import to_device
from fundamentallm.signals import raise_if_interrupted
from fundamentallm.training.metrics import MEASURED
from fundamentallm.training.trainer import Trainer

STEPS = 3
"""Length of the runs that are compared."""
STOP_AT, KILL_AT, SAVE_EVERY, LOG_EVERY, EVAL_EVERY = 9, 5, 2, 3, 4
"""Steps of kill and resume. A log line averages over steps before and after the kill, which follows a validation."""
SLOW_STEP, START_SECONDS = 10.0, 120.0
"""Seconds per step above which no run is killed and resumed; seconds that a process may take to start."""


class Finding(NamedTuple):
    """Result of a check; status is pass, fail or skipped."""

    status: str
    figure: str


class Check(NamedTuple):
    """A check, and what to do if it fails."""

    make: Callable[[Case], Finding]
    advice: str


class Case:
    """The run that is checked: its config, 'module:name' of the function that makes its Trainer, and an empty folder.

    Each trial run gets a folder of its own in it.
    """

    def __init__(self, config: Config, trainer: str, folder: Path) -> None:
        self.config, self.trainer, self.folder = config, trainer, folder

    def new_config(self, **training: Any) -> Config:
        """Returns the config of a new trial."""
        return trial.trial_config(self.config, Path(tempfile.mkdtemp(dir=self.folder)), **training)

    def make(self, **training: Any) -> Trainer:
        """Returns the Trainer of a new trial. Raises ConfigError if the function makes no usable one."""
        return trial.make_trainer(self.trainer, self.new_config(**training))

    @functools.cached_property
    def measured(self) -> Measured:
        """Measurements of a trial run, made once."""
        return measure(self.make(), self.config.training)


def check_data(case: Case) -> Finding:
    """A sample is the same whenever it is read, and whatever was read before."""
    trainer, num_read = case.make(), 0
    for name, loader in (("training", trainer.train_loader), ("validation", trainer.val_loader)):
        if loader is None:
            continue
        last = len(loader.dataset) - 1  # type: ignore[arg-type]
        indices = sorted({0, min(1, last), last // 3, last // 2, last})
        num_read += len(indices)
        _seed_globals(1)
        first = {index: _read(loader, [index]) for index in indices}
        _seed_globals(2)
        for index in reversed(indices):
            if not _are_equal(first[index], _read(loader, [index])):
                return Finding("fail", f"{name} sample {index} changes when it is read again")
    return Finding("pass", f"{num_read} samples read twice, in two orders: the same each time")


def check_model(case: Case) -> Finding:
    """Two runs are equal to the bit, and evaluation mode draws no random numbers."""
    begins, logs, ends = [], [], []
    for seed in (1, 2):
        _seed_globals(seed)
        trainer = case.make()
        begins.append(_weights(trainer))
        logs.append(trial.run_until(trainer, lambda run: len(run.losses) >= STEPS).lines)
        ends.append(_weights(trainer))
    if names := _differing(begins[0], begins[1]):
        return Finding("fail", f"made twice, the model has other initial weights in {names}")
    if not math.isfinite(logs[0][0]["train_loss"]):
        return Finding("fail", f"the loss of the first batch is {logs[0][0]['train_loss']}")
    if problem := _compare(logs[0], logs[1])[1] or _differing(ends[0], ends[1], "the weights differ in "):
        return Finding("fail", f"the same run made twice: {problem}")
    if len(losses := _losses_by_seed(trainer, training=False)) > 1:
        return Finding("fail", f"in evaluation mode, one batch has the losses {' and '.join(map(str, losses))}")
    return Finding("pass", f"two runs of {plural(len(logs[0]), 'step')}: losses and weights equal to the bit")


def check_micro_batches(case: Case) -> Finding:
    """The size of micro-batches does not change the losses."""
    largest = min(case.measured.micro_batch_size, case.config.training.batch_size or 1)
    smaller = max(1, largest // 3)
    if largest == smaller:
        return Finding("skipped", "a micro-batch of one sequence cannot be split")
    logs = []
    for size in (largest, smaller):
        trainer = case.make(micro_batch_size=size)
        trial.disable_dropout(trainer.model)
        if len(_losses_by_seed(trainer, training=True)) > 1:
            return Finding("skipped", "the model draws random numbers besides dropout: runs agree only on average")
        logs.append(trial.run_until(trainer, lambda run: len(run.losses) >= STEPS).lines)
    error, problem = _compare(logs[0], logs[1], _tolerance(trainer, 1e-5))
    if problem:
        return Finding("fail", f"micro-batches of {largest} and {smaller}: {problem}")
    return Finding("pass", f"of {largest} and {smaller}: losses of {plural(len(logs[0]), 'step')} {_within(error)}")


def check_evaluation(case: Case) -> Finding:
    """The validation loss is the same for any batch size."""
    trainer = case.make()
    if trainer.val_samples is None:
        return Finding("skipped", "there is no validation data")
    losses = {}
    for size in sorted({1, 5, trainer.val_samples.batch_size}):
        trial.limit_validation(trainer, batch_size=size)
        losses[size] = trainer.validate()["val_loss"]
    error = max(_distance(loss, losses[1]) for loss in losses.values())
    if not error <= _tolerance(trainer, 1e-6):
        by_size = ", ".join(f"{loss:.6f} with batch size {size}" for size, loss in losses.items())
        return Finding("fail", f"val_loss is {by_size}")
    return Finding("pass", f"val_loss with batch sizes {', '.join(map(str, losses))} {_within(error)}")


def check_resume(case: Case) -> Finding:
    """A run that is killed and resumed equals an uninterrupted run to the bit."""
    measured = case.measured
    if measured.total_steps <= SAVE_EVERY:
        return Finding("skipped", f"the run has only {plural(measured.total_steps, 'step')}")
    if measured.step_seconds > SLOW_STEP:
        return Finding("skipped", f"a step takes {measured.step_seconds:.0f} s")
    stop_at, kill_at = min(STOP_AT, measured.total_steps), min(KILL_AT, measured.total_steps)
    every = {"save_every_n_steps": SAVE_EVERY, "log_every_n_steps": LOG_EVERY, "eval_every_n_steps": EVAL_EVERY}
    whole, killed = case.new_config(**every), case.new_config(**every)
    timeout = START_SECONDS + 10 * kill_at * measured.step_seconds
    if problem := trial.run_killed(case.trainer, killed, kill_at, timeout):
        return Finding("fail", f"the run to be killed at step {kill_at}: {problem}")
    records, weights = [], []
    for config in (whole, killed):
        trainer = trial.make_trainer(case.trainer, config)
        trial.limit_validation(trainer)
        records.append(trial.run_to(trainer, stop_at))
        weights.append(_weights(trainer))
    resumed_from = records[1].first_step
    later = [line for line in records[0].lines if line["step"] > resumed_from]
    problem = _compare(later, records[1].lines)[1]
    problem = problem or _differing(weights[0], weights[1], "the weights differ in ")
    if resumed_from == 0:
        problem = "it started from scratch, not from a checkpoint"
    if problem:
        return Finding("fail", f"killed at step {kill_at}, resumed from {resumed_from}: {problem}")
    return Finding("pass", f"killed at step {kill_at}, resumed from {resumed_from}: weights and log equal to the bit")


ROWS = (
    "The loss must be the sum over the targets that are not -100, as F.cross_entropy(..., reduction='sum') gives it, "
    "and the loss of a row must depend on that row alone. Look for means, batch normalisation and other statistics "
    "over the batch, and padding that depends on the other rows or is attended to."
)
CHECKS = {
    "data": Check(
        check_data,
        "The dataset or collate_fn uses a random state or counts its calls. Derive its randomness from (seed, index), "
        "as in np.random.default_rng((seed, index)): otherwise a resumed run sees other data.",
    ),
    "model": Check(
        check_model,
        "Call torch.manual_seed(config.training.seed) just before the model is made. Use torch's functions for "
        "randomness, which the trainer seeds at each step, and none in evaluation mode: F.dropout needs "
        "training=self.training. torch.use_deterministic_algorithms(True) finds non-deterministic backward passes.",
    ),
    "micro-batches": Check(check_micro_batches, ROWS),
    "evaluation": Check(check_evaluation, ROWS),
    "kill and resume": Check(
        check_resume,
        "Something changes during training that is neither in the checkpoint nor a function of (seed, step): a buffer "
        "with persistent=False, a callback or schedule without state_dict(), a generator of your own.",
    ),
}


def examine(check: Check, case: Case) -> Finding:
    """Make a check without its output. A check that raises has failed, and one that a signal ended has no result."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            finding = check.make(case)
    except Exception as error:
        raised_at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(raised_at.filename).name}, line {raised_at.lineno}"
        finding = Finding("fail", f"{type(error).__name__}: {error} ({where})")
    finally:
        release_memory()  # of this check's trainers, before the next check and other processes need it
    raise_if_interrupted()  # the code that was checked may have caught it
    return finding


# ---- helpers ---------------------------------------------------------------------------------------------


def _seed_globals(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _read(loader: DataLoader[Any], indices: Sequence[int]) -> Any:
    """Returns the collated batch of some samples, read in this process."""
    return next(iter(DataLoader(loader.dataset, batch_sampler=[list(indices)], collate_fn=loader.collate_fn)))


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_are_equal(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_are_equal, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


@torch.no_grad()
def _losses_by_seed(trainer: Trainer, training: bool) -> set[float]:
    """Returns the distinct losses of one batch under three seeds: one if the model draws no random numbers."""
    batch = _read(trainer.train_loader, range(min(2, trainer.samples.num_samples)))
    batch, losses = to_device(batch, trainer.accelerator.device), set()
    trainer.model_with_loss.train(training)
    for seed in range(3):
        torch.manual_seed(seed)
        losses.add(float(trainer.model_with_loss(batch)))
    return losses


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def _differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor], before: str = "") -> str:
    """Returns the first few names of tensors that are not equal to the bit, or "" if all are equal."""
    names = [name for name in one if not torch.equal(one[name], other[name])]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return before + ", ".join(names[:4]) + more if names else ""


def _compare(
    expected: Sequence[Mapping[str, float]], got: Sequence[Mapping[str, float]], allowed: float = 0.0
) -> tuple[float, str]:
    """Returns the largest relative difference of the losses in two logs, and the first number that differs, in words.

    Without an allowed difference, all numbers that do not depend on the clock must be equal to the bit.
    """
    if len(expected) != len(got):
        return math.inf, f"{len(expected)} log lines and {len(got)}"
    largest = 0.0
    for one, other in zip(expected, got, strict=True):
        for name in ("train_loss", "grad_norm") if allowed else sorted(one.keys() - MEASURED):
            if one[name] == other.get(name):
                continue
            apart = _distance(one[name], other.get(name, math.nan))
            # The gradient norm shows a wrong scale of the gradients, which optimizers that normalise them hide.
            if not apart <= allowed * (100 if name == "grad_norm" else 1):
                return apart, f"{name} of step {one['step']} is {one[name]} and {other.get(name)}"
            largest = max(largest, apart if name != "grad_norm" else 0.0)
    return largest, ""


def _tolerance(trainer: Trainer, exact: float) -> float:
    """Returns the allowed relative difference: `exact` in float32, otherwise the rounding error of 16 bits."""
    return exact if trainer.accelerator.mixed_precision == "no" else 1e-2


def _distance(one: float, other: float) -> float:
    """Returns the relative difference of two numbers, or infinity if one of them is not finite."""
    result = 0.0 if one == other else abs(one - other) / max(abs(one), abs(other))
    return result if math.isfinite(result) else math.inf


def _within(error: float) -> str:
    return f"within {error:.0e}" if error else "to the bit"
