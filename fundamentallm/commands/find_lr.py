"""Find a learning rate by a range test: short real training at a rate that grows with every step.

The test is that of Smith (arXiv:1506.01186), smoothed and stopped as in fastai.
"""

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fundamentallm.commands.common import option_problems, parse_settings, say, settings_parser
from fundamentallm.config.schema import Config
from fundamentallm.config.validation import POSITIVE, Interval
from fundamentallm.errors import Problem, TrainingError, writing

SMOOTHING = 0.9
"""Weight of the earlier steps in the smoothed loss."""
DIVERGED = 4.0
"""The test stops when the smoothed loss exceeds its minimum by this factor."""


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line and return the exit code: 0 with a suggestion, 1 without."""
    about = (
        "Run a learning rate range test: the first steps of the run, at a rate that grows exponentially from --lowest "
        "to --highest, until the loss diverges. Nothing is written to output_dir. It can be launched on several "
        "devices, as the run itself."
    )
    parser = settings_parser(program, "[--steps INT] [--plot FILE] ...", about, takes_trainer=True)
    add = parser.add_argument
    add("--steps", type=int, default=100, metavar="INT", help="optimizer steps [100]")
    add("--lowest", type=float, default=1e-6, metavar="FLOAT", help="rate of the first step [1e-6]")
    add("--highest", type=float, default=10.0, metavar="FLOAT", help="rate of the last step [10]")
    add("--plot", type=Path, default="find_lr.png", metavar="FILE", help="plot of the curve [find_lr.png]")
    options, rest = parser.parse_known_args(arguments)
    problems = option_problems(options, steps=Interval(low=20), highest=POSITIVE)
    if options.lowest not in POSITIVE or not options.lowest < options.highest:
        problems.append(Problem("--lowest", options.lowest, allowed="greater than 0 and less than --highest"))
    config = parse_settings(rest, program, problems, trainer=options.trainer)
    with tempfile.TemporaryDirectory(prefix="fundamentallm-find_lr-") as folder:
        rates, losses, is_main = range_test(config, options, Path(folder))
    if not math.isfinite(losses[0]):
        raise TrainingError(f"the loss of the first step, at a learning rate of {options.lowest:g}, is not finite.")
    found = suggestion(rates, losses)
    if is_main:
        if found is None:
            say("no suggestion: the loss did not fall. Try another range, or more steps.")
        else:
            say(f"suggestion: --training.learning_rate {found:.1e}, where the loss falls fastest")
        _draw(rates, losses, found, options.plot)
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


def suggestion(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """Returns the learning rate where the smoothed loss falls fastest per decade, or None if it does not fall.

    Only rates below that of the smallest smoothed loss count.
    """
    smoothed = [loss for loss in smooth(losses) if math.isfinite(loss)]  # after one that is not finite, none is
    lowest = smoothed.index(min(smoothed))

    def slope(i: int) -> float:
        return (smoothed[i + 1] - smoothed[i - 1]) / math.log10(rates[i + 1] / rates[i - 1])

    falling = [i for i in range(1, lowest) if slope(i) < 0]
    return rates[min(falling, key=slope)] if falling else None


def range_test(config: Config, options: argparse.Namespace, folder: Path) -> tuple[list[float], list[float], bool]:
    """Returns the learning rate and the loss of each step, and whether this is the main process."""
    # Imported here, so that --help need not wait for torch.
    from fundamentallm.commands.trial import Record, make_trial, run_until

    trainer = make_trial(
        options.trainer, config, folder, max_steps=options.steps, max_epochs=None, learning_rate=options.highest,
        lr_scheduler=f"{__name__}:exponential", lr_scheduler_options={"ratio": options.lowest / options.highest},
        warmup_steps=0, min_lr_ratio=0.0, batch_size_schedule=[], ema_decay=None,
        skip_spikes_above=None, max_bad_steps=options.steps,  # divergence is part of the test
    )  # fmt: skip
    trainer.val_loader = trainer.saver.manager = None  # neither validates nor saves

    def has_diverged(run: Record) -> bool:
        smoothed = smooth(run.losses)
        return not math.isfinite(run.losses[-1]) or smoothed[-1] > DIVERGED * min(smoothed)

    lines = run_until(trainer, has_diverged).lines
    trainer.leave_group()
    return [line["learning_rate"] for line in lines], [line["train_loss"] for line in lines], trainer.is_main_process


def _draw(rates: Sequence[float], losses: Sequence[float], found: float | None, path: Path) -> None:
    """Plot the loss over the learning rate, and say where."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no curve was drawn, since matplotlib is not installed; run: pip install 'fundamentallm[plots]'")
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, alpha=0.3, label="loss")
    axes.plot(rates, smooth(losses), color="C0", label="smoothed")
    axes.set_ylim(top=1.2 * losses[0])  # the diverged end would flatten the rest
    if found is not None:
        axes.axvline(found, color="C3", label=f"steepest: {found:.1e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss (nats per token)")
    axes.legend()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, format="png")
    say(f"curve: {path}")
