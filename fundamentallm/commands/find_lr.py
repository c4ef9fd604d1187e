"""Find a learning rate by a range test: short real training at a rate that grows with every step.

The test is that of Smith (arXiv:1506.01186), smoothed and stopped as in fastai.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from fundamentallm.atomic import write_text
from fundamentallm.commands.options import (
    add_trainer_option,
    option_problems,
    parse_settings,
    settings_parser,
    trainer_problems,
)
from fundamentallm.commands.output import say, say_table
from fundamentallm.config.schema import Config
from fundamentallm.config.validation import POSITIVE, Interval
from fundamentallm.errors import Problem, TrainingError, writing

SMOOTHING = 0.9
"""Weight of the earlier steps in the smoothed loss."""
DIVERGED = 4.0
"""The test stops when the smoothed loss exceeds its minimum by this factor."""
FEWEST_STEPS, ROWS = 20, 20
"""Least steps of a test; about as many rows are printed."""


class Point(NamedTuple):
    """One step of the test."""

    learning_rate: float
    loss: float  # nats per target, of the batch of this step
    smoothed: float


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line and return the exit code: 0 with a suggestion, 1 without."""
    parser = settings_parser(
        program,
        "[--steps INT] [--plot FILE] [--json FILE] [--verbose] ...",
        "Run a learning rate range test: the first steps of the run, at a rate that grows exponentially from --lowest "
        "to --highest, until the loss diverges. Nothing is written to output_dir. It can be launched on several "
        "devices, as the run itself.",
    )
    add_trainer_option(parser)
    parser.add_argument("--steps", type=int, default=100, metavar="INT", help="optimizer steps [100]")
    parser.add_argument("--lowest", type=float, default=1e-6, metavar="FLOAT", help="rate of the first step [1e-6]")
    parser.add_argument("--highest", type=float, default=10.0, metavar="FLOAT", help="rate of the last step [10]")
    parser.add_argument("--plot", metavar="FILE", help="plot of the curve [find_lr.png, if matplotlib is installed]")
    parser.add_argument("--json", metavar="FILE", help="write all points and the suggestion to this file")
    parser.add_argument("--verbose", action="store_true", help="print a table of the curve")
    options, rest = parser.parse_known_args(arguments)
    problems = trainer_problems(options.trainer)
    problems += option_problems(options, steps=Interval(low=FEWEST_STEPS), highest=POSITIVE)
    if options.lowest not in POSITIVE or not options.lowest < options.highest:
        problems.append(Problem("--lowest", options.lowest, allowed="greater than 0 and less than --highest"))
    config = parse_settings(rest, program, problems)
    if options.plot is not None:
        from fundamentallm.training.callbacks.curves import check_matplotlib

        check_matplotlib()

    with tempfile.TemporaryDirectory(prefix="fundamentallm-find_lr-") as folder:
        points, is_main = _range_test(config, options, Path(folder))
    if not math.isfinite(points[0].loss):
        raise TrainingError(f"the loss of the first step, at a learning rate of {options.lowest:g}, is not finite.")
    found = suggestion(points)
    if is_main:
        _show(points, found, options.verbose)
        if find_spec("matplotlib") is not None:
            plot = Path(options.plot or "find_lr.png")
            _draw(points, found, plot)
            say(f"curve: {plot}")
        else:
            say("no plot: matplotlib is not installed")
        if options.json is not None:
            _write_json(points, found, Path(options.json))
    return 0 if found is not None else 1


def exponential(progress: float, ratio: float) -> float:
    """Schedule ('module:name') that grows by a constant factor per step, from `ratio` of the peak to the peak."""
    return float(ratio ** (1 - progress))


def smooth(losses: Sequence[float]) -> list[float]:
    """Returns the exponential moving average of losses, with bias correction."""
    average, smoothed = 0.0, []
    for step, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING**step))
    return smoothed


def has_diverged(losses: Sequence[float]) -> bool:
    """Returns True if the last loss is not finite, or the smoothed loss is far above its minimum."""
    smoothed = smooth(losses)
    return not math.isfinite(losses[-1]) or smoothed[-1] > DIVERGED * min(smoothed)


def suggestion(points: Sequence[Point]) -> float | None:
    """Returns the learning rate where the smoothed loss falls fastest per decade, or None if it does not fall.

    Only rates below that of the smallest smoothed loss count.
    """
    points = [point for point in points if math.isfinite(point.smoothed)]
    lowest = min(range(len(points)), key=lambda i: points[i].smoothed)

    def slope(i: int) -> float:
        decades = math.log10(points[i + 1].learning_rate / points[i - 1].learning_rate)
        return (points[i + 1].smoothed - points[i - 1].smoothed) / decades

    falling = [i for i in range(1, lowest) if slope(i) < 0]
    return points[min(falling, key=slope)].learning_rate if falling else None


def _range_test(config: Config, options: argparse.Namespace, folder: Path) -> tuple[list[Point], bool]:
    """Returns the points, and whether this is the main process."""
    # Imported here, so that --help and wrong settings need not wait for torch.
    from fundamentallm.commands.trial import make_trainer, run_until, trial_config

    trial = trial_config(
        config, folder, max_steps=options.steps, max_epochs=None, learning_rate=options.highest,
        lr_scheduler=f"{__name__}:exponential", lr_scheduler_options={"ratio": options.lowest / options.highest},
        warmup_steps=0, min_lr_ratio=0.0, batch_size_schedule=[], ema_decay=None,
        skip_spikes_above=None, max_bad_steps=options.steps,  # divergence is part of the test
    )  # fmt: skip
    trainer = make_trainer(options.trainer, trial)
    trainer.val_loader = trainer.saver.manager = None  # neither validates nor saves
    lines = run_until(trainer, lambda run: has_diverged(run.losses)).lines
    is_main = trainer.is_main_process
    trainer.leave_group()
    losses = [line["train_loss"] for line in lines]
    rates = [line["learning_rate"] for line in lines]
    return [Point(*values) for values in zip(rates, losses, smooth(losses), strict=True)], is_main


def _show(points: Sequence[Point], found: float | None, with_table: bool) -> None:
    """Print the suggestion, and some of the points."""
    if found is None:
        say("no suggestion: the loss did not fall. Try another range, or more steps.")
    else:
        say(f"suggestion: --training.learning_rate {found:.1e}, where the loss falls fastest")
    if with_table:
        every = max(1, len(points) // ROWS)
        shown = [point for i, point in enumerate(points) if i % every == 0 or i == len(points) - 1]
        rows = [(f"{p.learning_rate:.2e}", f"{p.loss:.4f}", f"{p.smoothed:.4f}") for p in shown]
        say_table([("learning rate", "loss", "smoothed"), *rows], ">>>")


def _draw(points: Sequence[Point], found: float | None, path: Path) -> None:
    """Plot the loss over the learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    rates = [point.learning_rate for point in points]
    axes.plot(rates, [point.loss for point in points], alpha=0.3, label="loss")
    axes.plot(rates, [point.smoothed for point in points], color="C0", label="smoothed")
    lowest, first = min(point.loss for point in points if math.isfinite(point.loss)), points[0].loss
    room = max(first - lowest, 1e-3)
    axes.set_ylim(lowest - 0.1 * room, first + 0.5 * room)  # the diverged end would flatten the rest
    if found is not None:
        axes.axvline(found, color="C3", label=f"steepest: {found:.1e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss (nats per token)")
    axes.legend()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, format="png")


def _write_json(points: Sequence[Point], found: float | None, path: Path) -> None:
    """Write the suggestion and all points; numbers that are not finite become null."""
    steps = [{k: v if math.isfinite(v) else None for k, v in point._asdict().items()} for point in points]
    with writing(path):
        write_text(path, json.dumps({"suggestion": found, "points": steps}, indent=1) + "\n")
