"""The checks of `doctor`, in their order. Each makes its own trial runs and returns what it found."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fundamentallm.commands import trial
from fundamentallm.commands.doctor.forecast import Measured, measure
from fundamentallm.commands.output import plural
from fundamentallm.config.schema import IGNORE_INDEX, Config
from fundamentallm.config.units import size_text
from fundamentallm.data.sampler import StepSampler
from fundamentallm.training.metrics import MEASURED
from fundamentallm.training.trainer import Trainer

STEPS = 3
"""Length of the runs that are compared."""
STOP_AT, KILL_AT, SAVE_EVERY, LOG_EVERY, EVAL_EVERY = 9, 5, 2, 3, 4
"""Steps of kill and resume. A log line averages over steps before and after the kill, which follows a validation."""
SLOW_STEP, START_SECONDS = 10.0, 120.0
"""Seconds per step above which no run is repeated in other processes; seconds that a process may take to start."""
OVERFIT_ROWS, OVERFIT_STEPS, OVERFIT_SECONDS, OVERFIT_TO = 4, 2000, 15.0, 0.5
"""Sequences to overfit, most steps and seconds to spend, and the fraction of the first loss to reach."""
OVERFIT_WARMUP, OVERFIT_MIN_STEPS = 10, 50
"""Longest warm-up meanwhile, and the number of steps below which a slow decrease is no failure."""


class Finding(NamedTuple):
    """Result of a check; status is pass, fail or skipped."""

    status: str
    figure: str


class Check(NamedTuple):
    """A check, and what to do if it fails."""

    make: Callable[[Case], Finding]
    advice: str


class Case:
    """The run that is checked.

    Args:
        config: the user's config, resolved.
        trainer: 'module:name' of a function from a Config to a Trainer.
        folder: an empty folder; each trial run gets a folder of its own in it.
    """

    def __init__(self, config: Config, trainer: str, folder: Path) -> None:
        self.config, self.trainer, self.folder = config, trainer, folder

    def new_config(self, **training: Any) -> Config:
        """Returns the config of a new trial."""
        return trial.trial_config(self.config, Path(tempfile.mkdtemp(dir=self.folder)), **training)

    def make(self, dropout: bool = True, **training: Any) -> Trainer:
        """Returns the Trainer of a new trial. Raises ConfigError if the function makes no usable one."""
        return trial.make_trainer(self.trainer, self.new_config(**training), dropout)

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
    if names := _differing(*begins):
        return Finding("fail", f"made twice, the model has other initial weights in {_listed(names)}")
    if not math.isfinite(logs[0][0]["train_loss"]):
        return Finding("fail", f"the loss of the first batch is {logs[0][0]['train_loss']}")
    if problem := _compare(logs[0], logs[1])[1] or _listed(_differing(*ends), "the weights differ in "):
        return Finding("fail", f"the same run made twice: {problem}")
    if len(losses := _losses_by_seed(trainer, training=False)) > 1:
        return Finding("fail", f"in evaluation mode, one batch has the losses {' and '.join(map(str, losses))}")
    return Finding("pass", f"two runs of {plural(len(logs[0]), 'step')}: losses and weights equal to the bit")


def check_loss(case: Case) -> Finding:
    """The loss is a sum over targets: the losses of two parts of a batch add up to that of the whole."""
    trainer = case.make()
    inputs, targets = _batch(trainer, rows=8)
    if (rows := len(targets)) < 2:
        return Finding("skipped", "the training data has a single sample")
    trainer.model_with_loss.eval()
    cut = max(1, rows // 3)
    whole, *parts = (_loss(trainer, inputs[s], targets[s]) for s in (slice(None), slice(cut), slice(cut, None)))
    if whole.dim():
        return Finding("fail", f"the loss has shape {tuple(whole.shape)}, not that of a scalar")
    if (error := _distance(whole, sum(parts))) > _tolerance(trainer, 1e-5):
        sums = f"{parts[0]:.4f} and {parts[1]:.4f} when computed in two parts"
        return Finding("fail", f"in evaluation mode the loss of {rows} rows is {whole:.4f}, but {sums}")
    if (nothing := float(_loss(trainer, inputs, torch.full_like(targets, IGNORE_INDEX)))) != 0:
        return Finding("fail", f"the loss of a batch without targets (all {IGNORE_INDEX}) is {nothing}")
    return Finding("pass", f"the sum over targets: parts add up to the whole, {_within(error)}")


def check_gradients(case: Case) -> Finding:
    """Every trainable parameter gets a gradient that is not all zero within a few steps."""
    names, steps = case.measured.without_gradient, plural(case.measured.steps, "step")
    if names:
        return Finding("fail", f"no gradient in {steps} reached {_listed(names)}")
    return Finding("pass", f"every trainable parameter got one within {steps}")


def check_micro_batches(case: Case) -> Finding:
    """The size of micro-batches does not change the losses."""
    trainer = case.make(dropout=False)
    largest = min(case.measured.micro_batch_size, trainer.batch_size)
    smaller = max(1, largest // 3)
    if largest == smaller:
        return Finding("skipped", "a micro-batch of one sequence cannot be split")
    if len(_losses_by_seed(trainer)) > 1:
        return STOCHASTIC
    makers = (case.make(dropout=False, micro_batch_size=size) for size in (largest, smaller))
    one, other = (trial.run_until(trainer, lambda run: len(run.losses) >= STEPS).lines for trainer in makers)
    error, problem = _compare(one, other, _tolerance(trainer, 1e-5))
    if problem:
        return Finding("fail", f"micro-batches of {largest} and {smaller}: {problem}")
    return Finding("pass", f"of {largest} and {smaller}: losses of {plural(len(one), 'step')} {_within(error)}")


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


def check_two_processes(case: Case) -> Finding:
    """Two processes train as one does; on the CPU, whatever the device of the run is."""
    measured, logs = case.measured, []
    on_cpu = measured.device == "cpu"
    if on_cpu and measured.step_seconds > SLOW_STEP:
        return Finding("skipped", f"a step takes {measured.step_seconds:.0f} s on this CPU")
    # Weights, gradients and two moments in each of two processes.
    needed, memory = 2 * 16 * measured.parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        return Finding("skipped", f"it needs {size_text(needed)} of this machine's {size_text(memory)} memory")
    if len(_losses_by_seed(case.make(dropout=False))) > 1:
        return STOCHASTIC
    steps = min(STEPS, measured.total_steps)
    timeout = START_SECONDS + 10 * steps * (measured.step_seconds if on_cpu else SLOW_STEP)
    for count, name in ((1, "one process"), (2, "two processes")):
        config = case.new_config(mixed_precision="no")
        run = trial.Trial(case.trainer, config, steps, dropout=False, on_cpu=True)
        if problem := trial.run_processes(count, run, timeout):
            can_judge = on_cpu or count == 2  # some models run on a GPU only
            return Finding("fail" if can_judge else "skipped", f"{name} on the CPU: {problem}")
        logs.append(_read_log(config))
    error, problem = _compare(logs[0], logs[1], 1e-5)
    if problem:
        return Finding("fail", f"one process and two: {problem}")
    return Finding("pass", f"on the CPU: losses of {plural(steps, 'step')} as on one process, {_within(error)}")


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
    timeout = START_SECONDS + 10 * stop_at * measured.step_seconds
    ended = trial.run_processes(1, trial.Trial(case.trainer, killed, stop_at, kill_at), timeout)
    if "SIGKILL" not in ended:
        return Finding("fail", f"the run to be killed ended otherwise: {ended}")
    weights = []
    for config in (whole, killed):
        trainer = trial.make_trainer(case.trainer, config)
        trial.limit_validation(trainer)
        resumed_from = trial.run_logged(trainer, stop_at).first_step
        weights.append(_weights(trainer))
    problem = _compare(_read_log(whole), _read_log(killed))[1] or _listed(
        _differing(*weights), "the weights differ in "
    )
    if resumed_from == 0:
        problem = "it started from scratch, not from a checkpoint"
    if problem:
        return Finding("fail", f"killed at step {kill_at}, resumed from {resumed_from}: {problem}")
    return Finding("pass", f"killed at step {kill_at}, resumed from {resumed_from}: weights and log equal to the bit")


def check_overfitting(case: Case) -> Finding:
    """The loss on a few sequences, repeated over and over, falls well below its first value."""
    warmup = min(case.config.training.warmup_steps, OVERFIT_WARMUP)
    steps = max(case.measured.total_steps, OVERFIT_STEPS)
    trainer = case.make(dropout=False, max_steps=steps, max_epochs=None, warmup_steps=warmup)
    rows = min(OVERFIT_ROWS, trainer.samples.num_samples)
    trainer.samples = StepSampler(rows, rows, seed=None, micro_batch_size=case.measured.micro_batch_size)

    def is_enough(run: trial.Record) -> bool:
        has_learned = run.losses[-1] < OVERFIT_TO * run.losses[0]
        return has_learned or len(run.losses) >= OVERFIT_STEPS or run.seconds > OVERFIT_SECONDS

    losses = trial.run_until(trainer, is_enough).losses
    figure = f"loss {losses[0]:.4g} -> {losses[-1]:.4g} in {plural(len(losses), 'step')} on {plural(rows, 'sequence')}"
    if losses[-1] < OVERFIT_TO * losses[0]:
        return Finding("pass", figure)
    if len(losses) < OVERFIT_MIN_STEPS and losses[-1] < losses[0]:
        return Finding("skipped", f"{figure}: too slow to judge in {OVERFIT_SECONDS:.0f} s")
    return Finding("fail", figure)


STOCHASTIC = Finding("skipped", "the model draws random numbers besides dropout: runs agree only on average")
ROWS = "The loss of a row must depend on that row alone, and be summed. Look for batch normalisation and other "
ROWS += "statistics over the batch, padding that depends on the other rows or is attended to, and means."
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
    "loss": Check(
        check_loss,
        "Return the sum over the targets that are not -100, as F.cross_entropy(..., reduction='sum') does. The trainer "
        f"divides once, by the number of targets of the whole step. {ROWS}",
    ),
    "gradients": Check(
        check_gradients,
        "Use these parameters in the forward pass (without detach() or no_grad()), remove them, or freeze them with "
        "requires_grad_(False): they do not learn, and a run on several processes fails.",
    ),
    "micro-batches": Check(check_micro_batches, ROWS),
    "evaluation": Check(check_evaluation, ROWS),
    "two processes": Check(
        check_two_processes,
        "Each process computes a part of the batch. Look for anything that depends on the process (its rank, a random "
        "state, the time), for a collective call that one process skips, and for rows that influence each other.",
    ),
    "kill and resume": Check(
        check_resume,
        "Something changes during training that is neither in the checkpoint nor a function of (seed, step): a buffer "
        "with persistent=False, a callback or schedule without state_dict(), a generator of your own.",
    ),
    "overfits": Check(
        check_overfitting,
        f"The loss should fall below {OVERFIT_TO:g} of its first value. Try a training.learning_rate ten times higher "
        "or lower, and check that the targets follow from the inputs.",
    ),
}


# ---- helpers ---------------------------------------------------------------------------------------------


def _seed_globals(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _read(loader: DataLoader[Any], indices: Sequence[int]) -> Any:
    """Returns the collated batch of some samples, read in this process."""
    read_all = getattr(loader.dataset, "__getitems__", None)
    samples = read_all(indices) if read_all else [loader.dataset[index] for index in indices]
    return samples if isinstance(samples, tuple) else loader.collate_fn(samples)


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_are_equal(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_are_equal, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def _batch(trainer: Trainer, rows: int) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets of the first training samples, on the device."""
    inputs, targets = _read(trainer.train_loader, range(min(rows, trainer.samples.num_samples)))
    return inputs.to(trainer.accelerator.device), targets.to(trainer.accelerator.device)


@torch.no_grad()
def _loss(trainer: Trainer, inputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the loss of a batch, summed over targets."""
    loss: Tensor = trainer.model_with_loss(inputs, targets)
    return loss.double().cpu()


def _losses_by_seed(trainer: Trainer, training: bool = True) -> set[float]:
    """Returns the distinct losses of one batch under three seeds: one if the model draws no random numbers."""
    batch, losses = _batch(trainer, rows=2), set()
    trainer.model_with_loss.train(training)
    for seed in range(3):
        torch.manual_seed(seed)
        losses.add(float(_loss(trainer, *batch).sum()))
    return losses


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def _differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of tensors that are not equal to the bit."""
    return [name for name in one if not torch.equal(one[name], other[name])]


def _read_log(config: Config) -> list[dict[str, Any]]:
    text = (Path(config.output_dir) / trial.LOG).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _compare(
    expected: Sequence[Mapping[str, Any]], got: Sequence[Mapping[str, Any]], allowed: float = 0.0
) -> tuple[float, str]:
    """Returns the largest relative difference of the losses in two logs, and the first number that differs, in words.

    Without an allowed difference, all numbers that do not depend on the clock must be equal to the bit.
    """
    if len(expected) != len(got):
        return math.inf, f"{len(expected)} log lines and {len(got)}"
    largest = 0.0
    for one, other in zip(expected, got, strict=True):
        for name in ("train_loss", "val_loss", "grad_norm") if allowed else sorted(one.keys() - MEASURED):
            if one.get(name) == other.get(name):
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


def _distance(one: float | Tensor, other: float | Tensor) -> float:
    """Returns the relative difference of two numbers, or infinity if one of them is not finite."""
    one, other = float(one), float(other)
    result = 0.0 if one == other else abs(one - other) / max(abs(one), abs(other))
    return result if math.isfinite(result) else math.inf


def _within(error: float) -> str:
    return f"within {error:.0e}" if error else "to the bit"


def _listed(names: Sequence[str], before: str = "", at_most: int = 4) -> str:
    """Returns the first few names and how many more there are, or nothing if there are none."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return before + ", ".join(names[:at_most]) + more if names else ""
