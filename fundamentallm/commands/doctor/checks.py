"""The checks of `doctor`, in their order. Each makes its own trial runs and returns what it found.

Those that find a fault raise `Failed`; those that cannot be made raise `Skipped`.
"""

import contextlib
import io
import itertools
import math
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils import release_memory, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fundamentallm.commands.trial import Record, make_trial, run_until
from fundamentallm.config.schema import Config
from fundamentallm.config.units import duration_text, size_text
from fundamentallm.data.sampler import StepSampler
from fundamentallm.data.streams import is_stream
from fundamentallm.distributed.batches import tensors, to_device
from fundamentallm.signals import raise_if_interrupted
from fundamentallm.training.callbacks.console import LoggingCallback, ProgressCallback
from fundamentallm.training.callbacks.curves import VisualizationCallback
from fundamentallm.training.metrics import MEASURED
from fundamentallm.training.trainer import Trainer

STEPS = 3
"""Length of the runs that are compared."""
STOP_AT, CRASH_AT, SAVE_EVERY, LOG_EVERY, EVAL_EVERY = 9, 5, 2, 3, 4
"""Steps of the resumed run. A log line averages over steps before and after the crash, which follows a validation."""
VALIDATION_ROWS = 48


class Failed(Exception):
    """A check found a fault."""


class Skipped(Exception):
    """A check cannot be made."""


@dataclass
class Case:
    """The run that is checked. Each trial run gets a folder of its own in `folder`."""

    config: Config
    trainer: str
    """'module:name' of the function that makes the Trainer."""
    folder: Path

    def make(self, of: str | None = None, **training: Any) -> Trainer:
        """Returns the Trainer of a new trial, or of another launch of the trial in the folder `of`."""
        folder = Path(of or tempfile.mkdtemp(dir=self.folder))
        return make_trial(self.trainer, self.config, folder, **training)


def check_data(case: Case) -> str:
    """A sample is the same whenever it is read, and whatever was read before."""
    trainer, num_read = case.make(), 0
    for name, loader in (("training", trainer.train_loader), ("validation", trainer.val_loader)):
        if loader is None or is_stream(loader.dataset):  # read in its order alone, as "kill and resume" does
            continue
        last = len(loader.dataset) - 1  # type: ignore[arg-type]
        indices = sorted({0, min(1, last), last // 3, last // 2, last})
        num_read += len(indices)
        set_seed(1)
        first = {index: tensors(_read(loader, [index])) for index in indices}
        set_seed(2)
        for index in reversed(indices):
            again = tensors(_read(loader, [index]))
            if not all(torch.equal(one, other) for one, other in zip(first[index], again, strict=True)):
                raise Failed(f"{name} sample {index} changes when it is read again")
    return f"{num_read} samples read twice, in two orders: the same each time"


def check_model(case: Case) -> str:
    """Two runs are equal to the bit, and evaluation mode draws no random numbers."""
    begins, logs, ends = [], [], []
    for seed in (1, 2):
        set_seed(seed)
        trainer = case.make()
        begins.append(_weights(trainer))
        logs.append(_few_steps(trainer))
        ends.append(_weights(trainer))
    _compare_weights("the model was made twice, and ", *begins)
    if not math.isfinite(logs[0][0]["train_loss"]):
        raise Failed(f"the loss of the first batch is {logs[0][0]['train_loss']}")
    _compare_logs("the same run was made twice, and ", logs[0], logs[1])
    _compare_weights("the same run was made twice, and ", *ends)
    if len(losses := _losses_by_seed(trainer, training=False)) > 1:
        raise Failed(f"in evaluation mode, one batch has the losses {' and '.join(map(str, losses))}")
    return f"two runs of {len(logs[0])} steps: losses and weights equal to the bit"


def check_micro_batches(case: Case) -> str:
    """The size of micro-batches does not change the losses."""
    trainer = case.make()
    _disable_dropout(trainer.model)
    if len(_losses_by_seed(trainer, training=True)) > 1:
        raise Skipped("the model draws random numbers besides dropout: runs agree only on average")
    expected = _few_steps(trainer)
    batch_size = case.config.training.batch_size or 1
    largest = min(trainer.samples.micro_batch_size or batch_size, batch_size)
    if largest == 1:
        raise Skipped("a micro-batch of one sequence cannot be split")
    smaller = max(1, largest // 3)
    trainer = case.make(micro_batch_size=smaller)
    _disable_dropout(trainer.model)
    tolerance = _tolerance(trainer, 1e-5)
    _compare_logs(f"micro-batches of {largest} and {smaller}: ", expected, _few_steps(trainer), tolerance)
    return f"of {largest} and {smaller}: losses of {STEPS} steps equal within {tolerance:.0e}"


def check_evaluation(case: Case) -> str:
    """The validation loss is the same for any batch size."""
    trainer = case.make()
    if trainer.val_samples is None:
        raise Skipped("there is no validation data")
    losses, tolerance = {}, _tolerance(trainer, 1e-6)
    for size in sorted({1, 5, trainer.val_samples.batch_size}):
        _limit_validation(trainer, batch_size=size)
        losses[size] = trainer.validate()["val_loss"]
    if not all(math.isclose(loss, losses[1], rel_tol=tolerance) for loss in losses.values()):
        raise Failed("val_loss is " + ", ".join(f"{losses[size]:.6f} with batch size {size}" for size in losses))
    return f"val_loss with batch sizes {', '.join(map(str, losses))} equal within {tolerance:.0e}"


def check_resume(case: Case) -> str:
    """A run that ends without saving and is resumed equals an uninterrupted run to the bit."""
    every: dict[str, Any] = {"save_every_n_steps": SAVE_EVERY, "eval_every_n_steps": EVAL_EVERY}
    every["log_every_n_steps"] = LOG_EVERY
    trainer = case.make(**every)
    stop_at, crash_at = min(STOP_AT, trainer.total_steps), min(CRASH_AT, trainer.total_steps)
    if crash_at <= SAVE_EVERY:
        raise Skipped(f"the run has only {crash_at} steps")

    def is_complete(run: Record) -> bool:
        return run.first_step + len(run.losses) >= stop_at

    def crash(run: Record) -> bool:
        if len(run.losses) == crash_at:
            raise _CrashError
        return False

    whole, weights = _run_with_callbacks(trainer, is_complete), _weights(trainer)
    trainer = case.make(**every)
    with contextlib.suppress(_CrashError):
        _run_with_callbacks(trainer, crash)
    assert trainer.checkpoint_manager is not None
    trainer.checkpoint_manager.wait()
    trainer = case.make(trainer.config.output_dir, **every)
    resumed = _run_with_callbacks(trainer, is_complete)
    what = f"crashed at step {crash_at}, resumed from {resumed.first_step}: "
    if not resumed.first_step:
        raise Failed(f"{what}it started from scratch, not from a checkpoint")
    _compare_logs(what, [line for line in whole.lines if line["step"] > resumed.first_step], resumed.lines)
    _compare_weights(what, weights, _weights(trainer))
    return f"{what}weights and log equal to the bit"


class _CrashError(Exception):
    pass


def _run_with_callbacks(trainer: Trainer, is_enough: Callable[[Record], bool]) -> Record:
    """Train with the run's own callbacks, whose state a resumed run restores, and return the record."""
    _limit_validation(trainer)
    writers = (ProgressCallback, VisualizationCallback, LoggingCallback)  # they have no state
    own = [callback for callback in trainer.callbacks.callbacks if not isinstance(callback, writers)]
    return run_until(trainer, is_enough, *own)


ROWS = (
    "The loss must be a sum over the targets that are not -100, and the loss of a row must depend on that row alone. "
    "Look for means, statistics over the batch, and padding that depends on the other rows or is attended to."
)
CHECKS: dict[str, tuple[Callable[[Case], str], str]] = {
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


def examine(name: str, case: Case) -> tuple[str, str]:
    """Make a check without its output; returns (pass, fail or skipped, what it found). One that raises has failed."""
    try:
        with _quiet():
            found = "pass", CHECKS[name][0](case)
    except (Failed, Skipped) as error:
        found = "fail" if isinstance(error, Failed) else "skipped", str(error)
    except Exception as error:
        raised_at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(raised_at.filename).name}, line {raised_at.lineno}"
        found = "fail", f"{type(error).__name__}: {error} ({where})"
    raise_if_interrupted()  # the code that was checked may have caught it
    return found


@_quiet()
def forecast(case: Case) -> dict[str, str]:
    """Returns estimates for the whole run, from a few steps."""
    trainer = case.make()
    run = run_until(trainer, lambda run: len(run.losses) >= (4 if run.times[-1] - run.times[0] > 3 else 30))
    durations = [after - before for before, after in itertools.pairwise(run.times)]
    # Allocations and the choice of kernels make the first steps slower.
    step_seconds, steps, line = median(durations[2:] or durations), trainer.total_steps, run.lines[-1]
    whole = f"{duration_text(steps * step_seconds)}: {steps:,} steps of {duration_text(step_seconds)}"
    tokens, device = line["tokens"] / line["step"], trainer.accelerator.device.type
    return {
        "speed": f"{tokens / step_seconds:,.0f} tokens per second on {device}, 1 process",
        "whole run": f"{whole}, without validations",
        "peak memory": f"{size_text(line.get('memory_gb', 0.0) * 1e9)} on {device}",
    }


def _few_steps(trainer: Trainer) -> list[dict[str, float]]:
    return run_until(trainer, lambda run: len(run.losses) >= STEPS).lines


def _limit_validation(trainer: Trainer, batch_size: int | None = None) -> None:
    """Validate on the first few samples only."""
    loader, samples = trainer.val_loader, trainer.val_samples
    if loader is not None and samples is not None:
        size = loader.batch_size or 1
        rows = min(len(loader.dataset), 2 * size + 1, VALIDATION_ROWS)  # type: ignore[arg-type]
        trainer.val_samples = StepSampler(rows, batch_size or size, None, micro_batch_size=samples.micro_batch_size)


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


def _compare_weights(what: str, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Raises Failed unless all tensors are equal to the bit."""
    if names := [name for name in one if not torch.equal(one[name], other[name])]:
        raise Failed(f"{what}{len(names)} of {len(one)} weights differ, such as {names[0]}")


def _compare_logs(
    what: str, expected: list[dict[str, float]], got: list[dict[str, float]], tolerance: float = 0.0
) -> None:
    """Raises Failed unless two logs agree; without a tolerance, all but the clock to the bit."""
    if len(expected) != len(got):
        raise Failed(f"{what}there are {len(expected)} log lines and {len(got)}")
    for one, other in zip(expected, got, strict=True):
        for name in ("train_loss", "grad_norm") if tolerance else sorted(one.keys() - MEASURED):
            # The gradient norm shows a wrong scale of the gradients, which optimizers that normalise them hide.
            allowed = tolerance * (100 if name == "grad_norm" else 1)
            if not math.isclose(one[name], other.get(name, math.nan), rel_tol=allowed):
                raise Failed(f"{what}{name} of step {one['step']} is {one[name]} and {other.get(name)}")


def _tolerance(trainer: Trainer, exact: float) -> float:
    """Returns the allowed relative difference: `exact` in float32, otherwise the rounding error of 16 bits."""
    return exact if trainer.accelerator.mixed_precision == "no" else 1e-2
