"""The checks of `doctor`, in their order. Each makes its own trial runs and returns what it found."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from accelerate.utils import release_memory, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fundamentallm.commands.trial import Record, make_trainer, run_until, trial_config
from fundamentallm.config.schema import Config
from fundamentallm.config.units import duration_text, size_text
from fundamentallm.data.sampler import StepSampler
from fundamentallm.data.streams import is_stream
from fundamentallm.distributed.batches import to_device
from fundamentallm.signals import raise_if_interrupted
from fundamentallm.training.callbacks.base import Callback, RunView
from fundamentallm.training.callbacks.console import LoggingCallback, ProgressCallback
from fundamentallm.training.callbacks.curves import VisualizationCallback
from fundamentallm.training.metrics import MEASURED
from fundamentallm.training.trainer import Trainer

STEPS = 3
"""Length of the runs that are compared."""
STOP_AT, CRASH_AT, SAVE_EVERY, LOG_EVERY, EVAL_EVERY = 9, 5, 2, 3, 4
"""Steps of the resumed run. A log line averages over steps before and after the crash, which follows a validation."""
VALIDATION_ROWS = 48


class Finding(NamedTuple):
    """Result of a check; status is pass, fail or skipped."""

    status: str
    figure: str


@dataclass
class Case:
    """The run that is checked. Each trial run gets a folder of its own in `folder`."""

    config: Config
    trainer: str
    """'module:name' of the function that makes the Trainer."""
    folder: Path

    def new_config(self, **training: Any) -> Config:
        """Returns the config of a new trial."""
        return trial_config(self.config, Path(tempfile.mkdtemp(dir=self.folder)), **training)

    def make(self, **training: Any) -> Trainer:
        """Returns the Trainer of a new trial. Raises ConfigError if the function makes no usable one."""
        return make_trainer(self.trainer, self.new_config(**training))


def check_data(case: Case) -> Finding:
    """A sample is the same whenever it is read, and whatever was read before."""
    trainer, num_read = case.make(), 0
    for name, loader in (("training", trainer.train_loader), ("validation", trainer.val_loader)):
        if loader is None or is_stream(loader.dataset):  # read in its order alone, as "kill and resume" does
            continue
        last = len(loader.dataset) - 1  # type: ignore[arg-type]
        indices = sorted({0, min(1, last), last // 3, last // 2, last})
        num_read += len(indices)
        set_seed(1)
        first = {index: _read(loader, [index]) for index in indices}
        set_seed(2)
        for index in reversed(indices):
            if not _are_equal(first[index], _read(loader, [index])):
                return Finding("fail", f"{name} sample {index} changes when it is read again")
    return Finding("pass", f"{num_read} samples read twice, in two orders: the same each time")


def check_model(case: Case) -> Finding:
    """Two runs are equal to the bit, and evaluation mode draws no random numbers."""
    begins, logs, ends = [], [], []
    for seed in (1, 2):
        set_seed(seed)
        trainer = case.make()
        begins.append(_weights(trainer))
        logs.append(_few_steps(trainer))
        ends.append(_weights(trainer))
    if problem := _changed_weights(*begins):
        return Finding("fail", f"the model was made twice, and {problem}")
    if not math.isfinite(logs[0][0]["train_loss"]):
        return Finding("fail", f"the loss of the first batch is {logs[0][0]['train_loss']}")
    if problem := _difference(logs[0], logs[1]) or _changed_weights(*ends):
        return Finding("fail", f"the same run was made twice, and {problem}")
    if len(losses := _losses_by_seed(trainer, training=False)) > 1:
        return Finding("fail", f"in evaluation mode, one batch has the losses {' and '.join(map(str, losses))}")
    return Finding("pass", f"two runs of {len(logs[0])} steps: losses and weights equal to the bit")


def check_micro_batches(case: Case) -> Finding:
    """The size of micro-batches does not change the losses."""
    trainer = case.make()
    _disable_dropout(trainer.model)
    if len(_losses_by_seed(trainer, training=True)) > 1:
        return Finding("skipped", "the model draws random numbers besides dropout: runs agree only on average")
    expected = _few_steps(trainer)
    largest = min(trainer.samples.micro_batch_size, case.config.training.batch_size or 1)
    if largest == 1:
        return Finding("skipped", "a micro-batch of one sequence cannot be split")
    smaller = max(1, largest // 3)
    trainer = case.make(micro_batch_size=smaller)
    _disable_dropout(trainer.model)
    tolerance = _tolerance(trainer, 1e-5)
    if problem := _difference(expected, _few_steps(trainer), tolerance):
        return Finding("fail", f"micro-batches of {largest} and {smaller}: {problem}")
    return Finding("pass", f"of {largest} and {smaller}: losses of {STEPS} steps equal within {tolerance:.0e}")


def check_evaluation(case: Case) -> Finding:
    """The validation loss is the same for any batch size."""
    trainer = case.make()
    if trainer.val_samples is None:
        return Finding("skipped", "there is no validation data")
    losses, tolerance = {}, _tolerance(trainer, 1e-6)
    for size in sorted({1, 5, trainer.val_samples.batch_size}):
        _limit_validation(trainer, batch_size=size)
        losses[size] = trainer.validate()["val_loss"]
    if not all(math.isclose(loss, losses[1], rel_tol=tolerance) for loss in losses.values()):
        by_size = ", ".join(f"{loss:.6f} with batch size {size}" for size, loss in losses.items())
        return Finding("fail", f"val_loss is {by_size}")
    return Finding("pass", f"val_loss with batch sizes {', '.join(map(str, losses))} equal within {tolerance:.0e}")


def check_resume(case: Case) -> Finding:
    """A run that ends without saving and is resumed equals an uninterrupted run to the bit."""
    every = {"save_every_n_steps": SAVE_EVERY, "log_every_n_steps": LOG_EVERY, "eval_every_n_steps": EVAL_EVERY}
    trainer = case.make(**every)
    stop_at, crash_at = min(STOP_AT, trainer.total_steps), min(CRASH_AT, trainer.total_steps)
    if crash_at <= SAVE_EVERY:
        return Finding("skipped", f"the run has only {crash_at} steps")
    whole, weights = _run_to(stop_at, trainer), _weights(trainer)
    config = case.new_config(**every)
    trainer = make_trainer(case.trainer, config)
    with contextlib.suppress(_CrashError):
        _run_to(stop_at, trainer, _Crash(crash_at))
    assert trainer.checkpoint_manager is not None
    trainer.checkpoint_manager.wait()
    trainer = make_trainer(case.trainer, config)
    resumed = _run_to(stop_at, trainer)
    later = [line for line in whole.lines if line["step"] > resumed.first_step]
    problem = "" if resumed.first_step else "it started from scratch, not from a checkpoint"
    problem = problem or _difference(later, resumed.lines) or _changed_weights(weights, _weights(trainer))
    if problem:
        return Finding("fail", f"crashed at step {crash_at}, resumed from {resumed.first_step}: {problem}")
    figure = f"crashed at step {crash_at}, resumed from {resumed.first_step}: weights and log equal to the bit"
    return Finding("pass", figure)


class _CrashError(Exception):
    pass


class _Crash(Callback):
    """Ends the training by an exception after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: RunView, loss: float) -> None:
        if run.global_step == self.step:
            raise _CrashError


def _run_to(last_step: int, trainer: Trainer, *more: Callback) -> Record:
    """Train to `last_step` with the run's own callbacks, whose state a resumed run restores, and return the record."""
    _limit_validation(trainer)
    record = Record(lambda record: record.first_step + len(record.losses) >= last_step)
    writers = (ProgressCallback, VisualizationCallback, LoggingCallback)  # they have no state
    own = [callback for callback in trainer.callbacks.callbacks if not isinstance(callback, writers)]
    trainer.callbacks.callbacks = [*own, record, *more]
    trainer.train()
    return record


ROWS = (
    "The loss must be a sum over the targets that are not -100, and the loss of a row must depend on that row alone. "
    "Look for means, statistics over the batch, and padding that depends on the other rows or is attended to."
)
CHECKS: dict[str, tuple[Callable[[Case], Finding], str]] = {
    "data": (
        check_data,
        "The dataset or collate_fn uses a random state or counts its calls. Derive its randomness from (seed, index), "
        "as in np.random.default_rng((seed, index)): otherwise a resumed run sees other data.",
    ),
    "model": (
        check_model,
        "Call torch.manual_seed(config.training.seed) just before the model is made. Use torch's functions for "
        "randomness, which the trainer seeds at each step, and none in evaluation mode: F.dropout needs "
        "training=self.training. torch.use_deterministic_algorithms(True) finds non-deterministic backward passes.",
    ),
    "micro-batches": (check_micro_batches, ROWS),
    "evaluation": (check_evaluation, ROWS),
    "resume": (
        check_resume,
        "Something changes during training that is neither in the checkpoint nor a function of (seed, step): a buffer "
        "with persistent=False, a callback or schedule without state_dict(), a generator of your own.",
    ),
}
"""Each check, and what to do if it fails."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops all output in the block, and frees the memory of its trainers afterwards."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        release_memory()


def examine(name: str, case: Case) -> Finding:
    """Make a check without its output. A check that raises has failed, and one that a signal ended has no result."""
    try:
        with _quiet():
            finding = CHECKS[name][0](case)
    except Exception as error:
        raised_at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(raised_at.filename).name}, line {raised_at.lineno}"
        finding = Finding("fail", f"{type(error).__name__}: {error} ({where})")
    raise_if_interrupted()  # the code that was checked may have caught it
    return finding


@_quiet()
def forecast(case: Case) -> dict[str, str]:
    """Returns estimates for the whole run, from a few steps and part of a validation."""
    trainer, training = case.make(), case.config.training
    run = run_until(trainer, lambda run: len(run.losses) >= (4 if run.times[-1] - run.times[0] > 3 else 30))
    durations = [after - before for before, after in itertools.pairwise(run.times)]
    # Allocations and the choice of kernels make the first steps slower.
    step_seconds, steps, line = median(durations[2:] or durations), trainer.total_steps, run.lines[-1]
    seconds, text = steps * step_seconds, f"{steps:,} steps of {duration_text(step_seconds)}"
    if trainer.val_samples is not None:
        all_rows, rows, started = trainer.val_samples.num_samples, _limit_validation(trainer), time.perf_counter()
        trainer.validate()
        once = (time.perf_counter() - started) / rows * all_rows
        intervals = training.eval_every_n_steps, (training.eval_every_n_epochs or 0) * trainer.steps_per_epoch
        validations = 1 + sum((steps - 1) // interval for interval in intervals if interval)  # the last step's too
        seconds += validations * once
        text += f", {validations:,} validations of {duration_text(once)}"
    tokens, device = line["tokens"] / line["step"], trainer.accelerator.device.type
    return {
        "speed": f"{tokens / step_seconds:,.0f} tokens per second on {device}, 1 process",
        "whole run": f"{duration_text(seconds)}: {text}",
        "peak memory": f"{size_text(line.get('memory_gb', 0.0) * 1e9)} on {device}",
    }


def _few_steps(trainer: Trainer) -> list[dict[str, float]]:
    return run_until(trainer, lambda run: len(run.losses) >= STEPS).lines


def _limit_validation(trainer: Trainer, batch_size: int | None = None) -> int:
    """Validate on the first few samples only; returns their number, or 0 if there is no validation data."""
    loader, samples = trainer.val_loader, trainer.val_samples
    if loader is None or samples is None:
        return 0
    size = loader.batch_size or 1
    rows = min(len(loader.dataset), 2 * size + 1, VALIDATION_ROWS)  # type: ignore[arg-type]
    trainer.val_samples = StepSampler(rows, batch_size or size, None, micro_batch_size=samples.micro_batch_size)
    return rows


def _disable_dropout(model: nn.Module) -> None:
    """Set the probability of dropout modules, and every float attribute with dropout in its name, to 0."""
    for module in model.modules():
        is_dropout = "Dropout" in type(module).__name__
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or (is_dropout and name == "p")):
                setattr(module, name, 0.0)


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
    stream = trainer.samples.stream
    if stream is not None:
        batch = stream.collate_fn([stream.first])
    else:
        batch = _read(trainer.train_loader, range(min(2, trainer.samples.num_samples)))
    batch, losses = to_device(batch, trainer.accelerator.device), set()
    trainer.model_with_loss.train(training)
    for seed in range(3):
        torch.manual_seed(seed)
        losses.add(float(trainer.model_with_loss(batch)))
    return losses


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def _changed_weights(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """Returns how many tensors are not equal to the bit, in words, or "" if all are equal."""
    names = [name for name in one if not torch.equal(one[name], other[name])]
    return f"{len(names)} of {len(one)} weights differ, such as {names[0]}" if names else ""


def _difference(
    expected: Sequence[Mapping[str, float]], got: Sequence[Mapping[str, float]], tolerance: float = 0.0
) -> str:
    """Returns the first number that differs in two logs, in words, or "" if there is none.

    Without a tolerance, all numbers that do not depend on the clock must be equal to the bit.
    """
    if len(expected) != len(got):
        return f"there are {len(expected)} log lines and {len(got)}"
    for one, other in zip(expected, got, strict=True):
        for name in ("train_loss", "grad_norm") if tolerance else sorted(one.keys() - MEASURED):
            # The gradient norm shows a wrong scale of the gradients, which optimizers that normalise them hide.
            allowed = tolerance * (100 if name == "grad_norm" else 1)
            if not math.isclose(one[name], other.get(name, math.nan), rel_tol=allowed):
                return f"{name} of step {one['step']} is {one[name]} and {other.get(name)}"
    return ""


def _tolerance(trainer: Trainer, exact: float) -> float:
    """Returns the allowed relative difference: `exact` in float32, otherwise the rounding error of 16 bits."""
    return exact if trainer.accelerator.mixed_precision == "no" else 1e-2
