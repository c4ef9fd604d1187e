"""Draws training curves."""

from __future__ import annotations

import importlib.util
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from fundamentallm.atomic import replacing
from fundamentallm.errors import ConfigError, Problem, printable
from fundamentallm.run.folder import restarts
from fundamentallm.training.callbacks.base import Callback, RunView

THEMES = {"light": "default", "dark": "dark_background"}  # styles of matplotlib
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
SMALL = {"learning_rate": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens per second"}
"""The small axes below the losses: the number drawn, and its title."""
MANY = 60  # log lines from which on the loss is smoothed, and the axis leaves out the high losses of the start


class VisualizationCallback(Callback):
    """Draws losses, learning rate, gradient norm and throughput, and marks skipped steps and restarts.

    Args:
        path: PNG file to write; None: curves.png in the `output_dir`.
        refresh_seconds: minimum time between two updates at log lines; each validation updates it as well.
        theme: light or dark.

    Raises:
        ConfigError: if matplotlib is not installed, or the theme is unknown.

    Examples:
        >>> from fundamentallm import VisualizationCallback
        >>> callbacks = [VisualizationCallback("curves.png", theme="dark")]  # for a Trainer
    """

    def __init__(self, path: Path | str | None = None, refresh_seconds: float = 30.0, theme: str = "light") -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ConfigError("matplotlib is not installed; run: pip install 'fundamentallm[plots]'.")
        if theme not in THEMES:
            raise ConfigError(Problem("theme", theme, allowed=", ".join(THEMES)))
        self.path = None if path is None else Path(path)
        self.refresh_seconds, self.theme = refresh_seconds, theme
        self._drawn_at = time.monotonic()

    def on_log(self, trainer: RunView, metrics: dict[str, float]) -> None:
        if time.monotonic() - self._drawn_at >= self.refresh_seconds:
            self.on_train_end(trainer)

    def on_validation_end(self, trainer: RunView, metrics: dict[str, float]) -> None:
        self.on_train_end(trainer)

    def on_train_end(self, trainer: RunView) -> None:
        history = trainer.metrics.get_history()
        if not trainer.is_main_process or "step" not in history:
            return
        folder, marked = trainer.output_dir or Path(), restarts(trainer.output_dir) if trainer.output_dir else []
        path = self.path or folder / "curves.png"
        title = printable(f"{folder.name} step {trainer.global_step:,} of {trainer.total_steps:,}".lstrip())
        try:
            figure = draw(history, marked, trainer.total_steps, self.theme, title)
            with replacing(path) as new:  # so that a viewer never sees half a picture
                figure.savefig(new, dpi=130, format="png")
        except Exception as error:  # does not end the run, because the numbers are stored elsewhere
            trainer.say(f"{path} cannot be drawn: {error}; training continues")
        self._drawn_at = time.monotonic()


def draw(history: dict[str, list[float]], restarts: list[int], total_steps: int, theme: str, title: str) -> Any:
    """Returns a matplotlib Figure of the history of a run (see `MetricTracker`)."""
    from matplotlib import style
    from matplotlib.figure import Figure  # not pyplot, which would change the user's backend
    from matplotlib.ticker import MaxNLocator

    with style.context(["default", THEMES[theme], STYLE]):
        figure = Figure(figsize=(10, 7), layout="constrained")
        figure.suptitle(title, fontweight="bold", parse_math=False)
        axes: Any = figure.subplot_mosaic([["loss"] * 3, list(SMALL)], height_ratios=[2, 1])
        _draw_losses(axes["loss"], history, restarts)
        for name, label in SMALL.items():
            axes[name].plot(history["step"], history[name], color="C2", linewidth=1)
            axes[name].set_title(label)
            axes[name].set_ylim(0, None)
        for axis in axes.values():
            axis.set_xlim(0, max(total_steps, history["step"][-1]))
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def _draw_losses(axis: Any, history: dict[str, list[float]], restarts: list[int]) -> None:
    steps, losses, validation = history["step"], history["train_loss"], history.get("val_loss", [])
    is_long = len(steps) >= MANY
    axis.plot(steps, losses, color="C0", alpha=0.35 if is_long else 1, label="" if is_long else "training")
    if is_long:
        window, is_finite = np.ones(len(losses) // 40), np.isfinite(losses)
        in_window = np.convolve(is_finite, window, "same")
        means = np.convolve(np.where(is_finite, losses, 0.0), window, "same") / np.where(in_window, in_window, math.nan)
        axis.plot(steps, means, color="C0", label="training (smoothed)")
        finite = [value for value in (*losses, *validation) if math.isfinite(value)]
        low, high = np.quantile(finite or [0.0], (0, 0.97))
        margin = 0.06 * (high - low) + 1e-3
        axis.set_ylim(low - margin, high + margin)
    if validation:
        label = f"validation ({validation[-1]:.4g})"
        axis.plot(history["val_step"], validation, "o-", color="C1", markersize=3.5, label=label)
    sets = [name for name in history if name.startswith("val_") and name.endswith("_loss") and name != "val_loss"]
    for number, name in enumerate(sets, start=4):
        values, label = history[name], f"{name} ({history[name][-1]:.4g})"
        axis.plot(history["val_step"][: len(values)], values, color=f"C{number}", linewidth=1, label=label)
    for name, marker, label in (("bad_steps", "x", "not finite"), ("skipped_spikes", "^", "skipped spikes")):
        counts = history.get(name, [])
        if len(counts) == len(steps) and counts[-1]:  # otherwise it was not counted all the time
            marked = [step for step, before, now in zip(steps, [0, *counts[:-1]], counts, strict=True) if now > before]
            label = f"{label} ({counts[-1]:,.0f})"
            axis.plot(marked, [0.03] * len(marked), f"C3{marker}", label=label, transform=axis.get_xaxis_transform())
    for step in restarts:
        label = f"restarted ({len(restarts)})" if step == restarts[0] else ""
        axis.axvline(step, color="C7", linewidth=1, linestyle="--", label=label)
    axis.set_ylabel("loss (nats per token)")
    axis.set_xlabel("optimizer step")
    axis.legend(loc="upper right")
