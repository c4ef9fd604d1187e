"""Check by short trial runs, in about a minute, that runs are reproducible with your config, data and machine."""

import contextlib
import functools
import io
import itertools
import math
import os
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils import release_memory, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fundamentallm.commands.common import parse_settings, say, settings_parser
from fundamentallm.commands.trial import Record, make_trial, run_until
from fundamentallm.config.units import duration_text, size_text
from fundamentallm.data.loaders import named_loaders
from fundamentallm.data.sampler import StepSampler
from fundamentallm.data.streams import is_stream
from fundamentallm.distributed.batches import tensors, to_device
from fundamentallm.errors import Problem
from fundamentallm.signals import raise_if_interrupted
from fundamentallm.training.callbacks.console import LoggingCallback, ProgressCallback
from fundamentallm.training.callbacks.curves import VisualizationCallback
from fundamentallm.training.metrics import MEASURED
from fundamentallm.training.trainer import Trainer

STEPS = 3
"""Length of the runs that are compared."""
STOP_AT, CRASH_AT = 9, 5
EVERY: dict[str, Any] = {"save_every_n_steps": 2, "log_every_n_steps": 3, "eval_every_n_steps": 4}
"""Of the resumed run. A log line averages over steps before and after the crash, which follows a validation."""
VALIDATION_ROWS = 48
Make = Callable[..., Trainer]
"""Makes the Trainer of a new trial; arguments are settings of `training`, and `folder`, to launch a trial again."""


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line and return the exit code: 0 if no check failed, 1 if one did."""
    codes = "Exit code 0: no check failed, 1: a check failed, 2: a setting is wrong."
    about = f"{__doc__} Runs are made in temporary folders; nothing is written to output_dir. {codes}"
    parser = settings_parser(program, "[--trainer MODULE:NAME]", about, takes_trainer=True)
    options, rest = parser.parse_known_args(arguments)
    problems = []
    if (launched := os.environ.get("WORLD_SIZE", "1")) != "1":
        problems.append(Problem("WORLD_SIZE", launched, allowed="1", advice="Run doctor on one process."))
    config = parse_settings(rest, program, problems, trainer=options.trainer)
    failed, started = 0, time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fundamentallm-doctor-") as folder:
        make = functools.partial(make_trial, options.trainer, config, Path(folder))
        make()  # a config that makes no Trainer is a ConfigError, as with every other command
        say(f"trial runs in temporary folders; {config.output_dir} is not touched\n")
        for number, (name, (check, advice)) in enumerate(CHECKS.items(), start=1):
            print(f"{number:>2}  {name:<17}", end="", flush=True)
            status, found = examine(check, make)
            say(f"{status:<9}{found}")
            if status == "fail":
                first = "Fix the failures above first: they may be the cause. " if failed else ""
                say(textwrap.indent(textwrap.fill(f"-> {first}{advice}", 90), " " * 30))
                failed += 1
        say(f"\nestimate for the whole run, from a few steps\n{examine(forecast, make)[1]}")
    say(f"\n{failed} of {len(CHECKS)} checks failed, in {time.perf_counter() - started:.0f} s")
    return 1 if failed else 0


class Finding(Exception):
    """Ends a check that has not passed, with its status ("fail", or "skipped" if it cannot be made) and the reason."""


def examine(check: Callable[[Make], str], make: Make) -> tuple[str, str]:
    """Make a check without its output; returns (pass, fail or skipped, what it found). One that raises has failed."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = "pass", check(make)
    except Finding as finding:
        found = finding.args
    except Exception as error:
        raised_at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(raised_at.filename).name}, line {raised_at.lineno}"
        found = "fail", f"{type(error).__name__}: {error} ({where})"
    release_memory()
    raise_if_interrupted()  # the code that was checked may have caught it
    return found


def check_data(make: Make) -> str:
    """A sample is the same whenever it is read, and whatever was read before."""
    trainer, num_read = make(), 0
    for name, loader in [("training", trainer.train_loader), *named_loaders(trainer.val_loader).items()]:
        if is_stream(loader.dataset):  # read in its order alone, as "resume" does
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
                raise Finding("fail", f"{name or 'validation'} sample {index} changes when it is read again")
    return f"{num_read} samples read twice, in two orders: the same each time"


def check_model(make: Make) -> str:
    """Two runs are equal to the bit, and evaluation mode draws no random numbers."""
    begins, logs, ends = [], [], []
    for seed in (1, 2):
        set_seed(seed)
        trainer = make()
        begins.append(_weights(trainer))
        logs.append(_few_steps(trainer))
        ends.append(_weights(trainer))
    _compare_weights("the model was made twice, and ", *begins)
    if not math.isfinite(logs[0][0]["train_loss"]):
        raise Finding("fail", f"the loss of the first batch is {logs[0][0]['train_loss']}")
    _compare_logs("the same run was made twice, and ", logs[0], logs[1])
    _compare_weights("the same run was made twice, and ", *ends)
    if len(losses := _losses_by_seed(trainer, training=False)) > 1:
        raise Finding("fail", f"in evaluation mode, one batch has the losses {' and '.join(map(str, losses))}")
    return f"two runs of {len(logs[0])} steps: losses and weights equal to the bit"


def check_micro_batches(make: Make) -> str:
    """The size of micro-batches does not change the losses."""
    trainer = make()
    _disable_dropout(trainer.model)
    if len(_losses_by_seed(trainer, training=True)) > 1:
        raise Finding("skipped", "the model draws random numbers besides dropout: runs agree only on average")
    expected = _few_steps(trainer)
    batch_size = trainer.config.training.batch_size or 1
    largest = min(trainer.samples.micro_batch_size or batch_size, batch_size)
    if largest == 1:
        raise Finding("skipped", "a micro-batch of one sequence cannot be split")
    smaller = max(1, largest // 3)
    trainer = make(micro_batch_size=smaller)
    _disable_dropout(trainer.model)
    tolerance = _tolerance(trainer, 1e-5)
    _compare_logs(f"micro-batches of {largest} and {smaller}: ", expected, _few_steps(trainer), tolerance)
    return f"of {largest} and {smaller}: losses of {STEPS} steps equal within {tolerance:.0e}"


def check_evaluation(make: Make) -> str:
    """The validation loss is the same for any batch size."""
    trainer = make()
    if not trainer.val_samples:
        raise Finding("skipped", "there is no validation data")
    losses, tolerance = {}, _tolerance(trainer, 1e-6)
    for size in sorted({1, 5, *(samples.batch_size for samples in trainer.val_samples.values())}):
        _limit_validation(trainer, batch_size=size)
        losses[size] = trainer.validate()["val_loss"]
    if not all(math.isclose(loss, losses[1], rel_tol=tolerance) for loss in losses.values()):
        texts = [f"{loss:.6f} with batch size {size}" for size, loss in losses.items()]
        raise Finding("fail", f"val_loss is {', '.join(texts)}")
    return f"val_loss with batch sizes {', '.join(map(str, losses))} equal within {tolerance:.0e}"


def check_resume(make: Make) -> str:
    """A run that ends without saving and is resumed equals an uninterrupted run to the bit."""

    def train(trainer: Trainer, is_enough: Callable[[Record], bool]) -> Record:
        """Train with the run's own callbacks, whose state a resumed run restores."""
        _limit_validation(trainer)
        writers = (ProgressCallback, VisualizationCallback, LoggingCallback)  # they have no state
        own = [callback for callback in trainer.callbacks.callbacks if not isinstance(callback, writers)]
        return run_until(trainer, is_enough, *own)

    def crash(run: Record) -> bool:
        if run.step == crash_at:
            raise InterruptedError
        return False

    trainer = make(**EVERY)
    stop_at, crash_at = min(STOP_AT, trainer.total_steps), min(CRASH_AT, trainer.total_steps)
    if crash_at <= EVERY["save_every_n_steps"]:
        raise Finding("skipped", f"the run has only {crash_at} steps")
    whole, weights = train(trainer, lambda run: run.step >= stop_at), _weights(trainer)
    trainer = make(**EVERY)
    with contextlib.suppress(InterruptedError):
        train(trainer, crash)
    assert trainer.checkpoint_manager is not None
    trainer.checkpoint_manager.wait()
    trainer = make(folder=trainer.config.output_dir, **EVERY)
    resumed = train(trainer, lambda run: run.step >= stop_at)
    what = f"crashed at step {crash_at}, resumed from {resumed.first_step}: "
    if not resumed.first_step:
        raise Finding("fail", f"{what}it started from scratch, not from a checkpoint")
    _compare_logs(what, [line for line in whole.lines if line["step"] > resumed.first_step], resumed.lines)
    _compare_weights(what, weights, _weights(trainer))
    return f"{what}weights and log equal to the bit"


ROWS = (
    "The loss must be a sum over the targets that are not -100, and the loss of a row must depend on that row alone. "
    "Look for means, statistics over the batch, and padding that depends on the other rows or is attended to."
)
CHECKS: dict[str, tuple[Callable[[Make], str], str]] = {
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


def forecast(make: Make) -> str:
    """Returns estimates for the whole run, from a few steps."""
    trainer = make()
    run = run_until(trainer, lambda run: run.step >= (4 if run.times[-1] - run.times[0] > 3 else 30))
    durations = [after - before for before, after in itertools.pairwise(run.times)]
    # Allocations and the choice of kernels make the first steps slower.
    seconds, steps, line = median(durations[2:] or durations), trainer.total_steps, run.lines[-1]
    speed, memory = line["tokens"] / line["step"] / seconds, size_text(line.get("memory_gb", 0.0) * 1e9)
    whole = f"    {duration_text(steps * seconds)}: {steps:,} steps of {duration_text(seconds)}, without validations"
    device = f"a peak of {memory} on {trainer.accelerator.device.type}, 1 process"
    return f"{whole}\n    {speed:,.0f} tokens per second, {device}"


def _few_steps(trainer: Trainer) -> list[dict[str, float]]:
    return run_until(trainer, lambda run: run.step >= STEPS).lines


def _limit_validation(trainer: Trainer, batch_size: int | None = None) -> None:
    """Validate on the first few samples only."""
    for name, loader in named_loaders(trainer.val_loader).items():
        size, samples = loader.batch_size or 1, trainer.val_samples[name]
        rows = min(len(loader.dataset), 2 * size + 1, VALIDATION_ROWS)  # type: ignore[arg-type]
        few = StepSampler(rows, batch_size or size, None, micro_batch_size=samples.micro_batch_size)
        trainer.val_samples[name] = few


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
    """Fails the check unless all tensors are equal to the bit."""
    if names := [name for name in one if not torch.equal(one[name], other[name])]:
        raise Finding("fail", f"{what}{len(names)} of {len(one)} weights differ, such as {names[0]}")


def _compare_logs(
    what: str, expected: list[dict[str, float]], got: list[dict[str, float]], tolerance: float = 0.0
) -> None:
    """Fails the check unless two logs agree; without a tolerance, all but the clock to the bit."""
    if len(expected) != len(got):
        raise Finding("fail", f"{what}there are {len(expected)} log lines and {len(got)}")
    for one, other in zip(expected, got, strict=True):
        for name in ("train_loss", "grad_norm") if tolerance else sorted(one.keys() - MEASURED):
            # The gradient norm shows a wrong scale of the gradients, which optimizers that normalise them hide.
            allowed = tolerance * (100 if name == "grad_norm" else 1)
            if not math.isclose(one[name], other.get(name, math.nan), rel_tol=allowed):
                raise Finding("fail", f"{what}{name} of step {one['step']} is {one[name]} and {other.get(name)}")


def _tolerance(trainer: Trainer, exact: float) -> float:
    """Returns the allowed relative difference: `exact` in float32, otherwise the rounding error of 16 bits."""
    return exact if trainer.accelerator.mixed_precision == "no" else 1e-2
