"""Find a learning rate by a range test: short real training, at a rate that grows with every step.

(Smith, arXiv:1506.01186; smoothed and stopped as in Gugger's and fastai's.)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fundamentallm.commands.output import say, say_table
from fundamentallm.commands.trainer_option import add_trainer_option, parse_with_trainer
from fundamentallm.config.schema import Config
from fundamentallm.config.validation import POSITIVE
from fundamentallm.errors import ConfigError, TrainingError, writing

if TYPE_CHECKING:
    from fundamentallm.commands.trial import Until

SMOOTHING = 0.9
"""Of a step's loss in the smoothed one, the part that comes from the steps before."""
DIVERGED = 4.0
"""Times the smallest smoothed loss: beyond that the test ends."""
FEWEST = 20
"""Steps with which a curve tells anything."""
ROWS = 20
"""Of the table."""


class Point(NamedTuple):
    """One step of the test."""

    learning_rate: float
    loss: float
    """Nats per target, of this step's batch."""
    smoothed: float


class Suggestion(NamedTuple):
    """What the curve says."""

    steepest: float
    """Where the smoothed loss falls fastest, by decade of the rate: the suggestion."""
    minimum: float
    """Where it is smallest; a tenth of it is the other rule in use."""


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line; returns the exit code: 0 with a suggestion, 1 if the curve has none.

    Raises:
        FundamentaLLMError: if something is wrong with the settings or options, or as training does.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        usage="%(prog)s --config FILE [--SECTION.SETTING VALUE ...] [--steps N] [--plot FILE] [--json FILE] ...",
        description="Find a learning rate: the first steps of the run, at a rate that grows exponentially from "
        "--lowest to --highest, until the loss explodes. Nothing is written into output_dir. Settings are those of "
        "`fundamentallm train --help`; it may be launched on many devices as the run itself.",
        allow_abbrev=False,
    )
    add_trainer_option(parser)
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="optimizer steps [100]")
    parser.add_argument("--lowest", type=float, default=1e-6, metavar="RATE", help="of the first step [1e-6]")
    parser.add_argument("--highest", type=float, default=10.0, metavar="RATE", help="of the last step [10]")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the curve there; default: find_lr.png, if matplotlib is installed"
    )
    parser.add_argument("--json", metavar="FILE", help="write all points, and the suggestion, there")
    options, rest = parser.parse_known_args(arguments)
    problems = []
    if options.steps < FEWEST:
        problems.append(f"--steps is {options.steps}; allowed: at least {FEWEST}.")
    if options.lowest not in POSITIVE or options.highest not in POSITIVE or options.lowest >= options.highest:
        problems.append(
            f"--lowest is {options.lowest:g} and --highest is {options.highest:g}; allowed: positive numbers, the "
            "second one larger."
        )
    config = parse_with_trainer(rest, options.trainer, program, problems)
    plot = _checked_plot(options.plot)

    with tempfile.TemporaryDirectory(prefix="fundamentallm-find_lr-") as folder:
        points, is_main = _range_test(config, options, Path(folder))
    if not math.isfinite(points[0].loss):
        raise TrainingError(f"the loss of the first step, at a learning rate of {options.lowest:g}, is not finite.")
    found = suggestion(points)
    if is_main:
        _show(points, found)
        if plot is not None:
            _draw(points, found, plot)
            say(f"curve: {plot}")
        if options.json is not None:
            _write_json(points, found, Path(options.json))
    return 0 if found is not None else 1


def exponential(progress: float, ratio: float) -> float:
    """A schedule ('module:name') that grows from `ratio` of the peak at 0 to the peak at 1, by a factor each step."""
    return float(ratio ** (1 - progress))


def smooth(losses: Sequence[float]) -> list[float]:
    """The exponential moving average of losses, without the bias towards zero of its beginning."""
    average, smoothed = 0.0, []
    for step, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING**step))
    return smoothed


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether nothing more is to be learnt: the last loss is not finite, or far above the smallest."""
    smoothed = smooth(losses)
    return not math.isfinite(losses[-1]) or smoothed[-1] > DIVERGED * min(smoothed)


def suggestion(points: Sequence[Point]) -> Suggestion | None:
    """What the curve says; None where the loss does not fall on its way to the smallest."""
    points = [point for point in points if math.isfinite(point.smoothed)]
    lowest = min(range(len(points)), key=lambda i: points[i].smoothed)

    def slope(i: int) -> float:
        decades = math.log10(points[i + 1].learning_rate / points[i - 1].learning_rate)
        return (points[i + 1].smoothed - points[i - 1].smoothed) / decades

    falling = [i for i in range(1, lowest) if slope(i) < 0]
    if not falling:
        return None
    return Suggestion(points[min(falling, key=slope)].learning_rate, points[lowest].learning_rate)


def _range_test(config: Config, options: argparse.Namespace, folder: Path) -> tuple[list[Point], bool]:
    """The points, and whether this process is the one to show them."""
    # Imported here, so that --help and wrong settings need not wait for torch.
    from fundamentallm.commands.trial import make_trainer, run_until, trial_config

    trial = trial_config(
        config,
        folder,
        max_steps=options.steps,
        max_epochs=None,
        learning_rate=options.highest,
        lr_scheduler=f"{__name__}:exponential",
        lr_scheduler_options={"ratio": options.lowest / options.highest},
        warmup_steps=0,
        min_lr_ratio=0.0,
        batch_size_schedule=[],
        ema_decay=None,
        # A loss that explodes is what is looked for.
        skip_spikes_above=None,
        max_minutes=None,
        max_bad_steps=options.steps,
    )
    trainer = make_trainer(options.trainer, trial)
    trainer.val_loader = trainer.saver.manager = None  # neither validates nor saves
    run: Until = run_until(trainer, lambda run: has_diverged(run.losses))
    is_main, was_interrupted = trainer.is_main_process, trainer.was_interrupted
    trainer.leave_group()
    if was_interrupted:  # what was seen of the range would suggest something, and wrongly
        raise KeyboardInterrupt
    losses = [line["train_loss"] for line in run.lines]
    rates = [line["learning_rate"] for line in run.lines]
    return [Point(*values) for values in zip(rates, losses, smooth(losses), strict=True)], is_main


def _show(points: Sequence[Point], found: Suggestion | None) -> None:
    every = max(1, len(points) // ROWS)
    shown = [point for i, point in enumerate(points) if i % every == 0 or i == len(points) - 1]
    rows = [(f"{p.learning_rate:.2e}", f"{p.loss:.4f}", f"{p.smoothed:.4f}") for p in shown]
    say_table([("learning rate", "loss", "smoothed"), *rows], ">>>")
    if found is None:
        say("\nno suggestion: the loss did not fall; try another range, or more steps.")
        return
    say(
        f"\nsuggestion: training.learning_rate {found.steepest:.1e}, where the loss falls fastest\n"
        f"(smallest at {found.minimum:.1e}; a tenth of that, the other rule in use, is {found.minimum / 10:.1e})"
    )


def _checked_plot(given: str | None) -> Path | None:
    """Where to draw, if anywhere."""
    from fundamentallm.training.callbacks.curves import check_matplotlib

    try:
        check_matplotlib()
    except ConfigError as error:
        if given is not None:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"no plot: {error}", file=sys.stderr)
        return None
    return Path(given or "find_lr.png")


def _draw(points: Sequence[Point], found: Suggestion | None, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    rates = [point.learning_rate for point in points]
    axes.plot(rates, [point.loss for point in points], color="#33658a", alpha=0.3, linewidth=0.8, label="loss")
    axes.plot(rates, [point.smoothed for point in points], color="#33658a", linewidth=1.4, label="smoothed")
    lowest, first = min(point.loss for point in points if math.isfinite(point.loss)), points[0].loss
    room = max(first - lowest, 1e-3)
    axes.set_ylim(lowest - 0.1 * room, first + 0.5 * room)  # what explodes would flatten all else
    if found is not None:
        axes.axvline(found.steepest, color="#d1495b", linewidth=1, label=f"steepest: {found.steepest:.1e}")
        axes.axvline(found.minimum / 10, color="#d1495b", linewidth=1, linestyle=":",
                     label=f"a tenth of the smallest's: {found.minimum / 10:.1e}")  # fmt: skip
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, format="png")


def _write_json(points: Sequence[Point], found: Suggestion | None, path: Path) -> None:
    content: dict[str, Any] = {
        "suggestion": None if found is None else found.steepest,
        "minimum": None if found is None else found.minimum,
        "points": [
            {name: value if math.isfinite(value) else None for name, value in point._asdict().items()}
            for point in points
        ],
    }
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
