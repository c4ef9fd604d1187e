"""Training curves as a picture."""

from __future__ import annotations

import importlib.util
import math
import os
import time
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm.errors import ConfigError
from fundamentallm.run.folder import restarts
from fundamentallm.training.callbacks.base import Callback

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer

THEMES = {
    "light": {
        "paper": "#ffffff", "ink": "#25303b", "faint": "#8a96a3", "grid": "#e4e8ec",
        "training": "#33658a", "validation": "#d1495b", "other": "#4d7c6f", "bad": "#c77d00",
    },
    "dark": {
        "paper": "#14181d", "ink": "#e3e8ee", "faint": "#7d8996", "grid": "#2a313a",
        "training": "#6fb1e0", "validation": "#ff8595", "other": "#7fc8ad", "bad": "#f2b04a",
    },
}  # fmt: skip
MANY = 60
"""Lines of the log from which on a smoothed curve lies over the raw one, and the start does not set the scale."""


def check_matplotlib() -> None:
    """Raises ConfigError if matplotlib is not installed, naming the extra."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("matplotlib is not installed; run: pip install 'fundamentallm[plots]'.")


class VisualizationCallback(Callback):
    """Draws the training: losses, learning rate, gradient norm, throughput; steps that were left out and restarts are
    marked. On the main process, refreshed as it trains.

    Args:
        path: of the PNG.
        refresh_seconds: shortest time between two drawings at log lines; validations always draw.
        theme: light or dark.

    Raises:
        ConfigError: if matplotlib is not installed, or there is no such theme.

    Examples:
        >>> import os
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from fundamentallm import Trainer, TrainingConfig, VisualizationCallback
        >>> numbers = torch.arange(300).reshape(30, 10) % 3
        >>> loader = DataLoader(TensorDataset(numbers, (numbers + 1) % 3), batch_size=4)
        >>> curves = VisualizationCallback("curves.png")
        >>> history = Trainer(nn.Embedding(3, 3), TrainingConfig(), loader, callbacks=[curves]).train()
        >>> os.path.getsize("curves.png") > 10_000
        True
    """

    def __init__(self, path: Path | str = "curves.png", refresh_seconds: float = 30.0, theme: str = "light") -> None:
        check_matplotlib()
        if theme not in THEMES:
            raise ConfigError(f"theme is {theme!r}; allowed: {', '.join(THEMES)}.")
        self.path, self.refresh_seconds, self.theme = Path(path), refresh_seconds, theme
        self._drawn_at = time.monotonic()
        self._restarts: list[int] = []

    def on_train_begin(self, trainer: Trainer) -> None:
        """Look up where the run was started again."""
        if trainer.output_dir is not None:
            self._restarts = restarts(trainer.output_dir)

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Draw, if the last drawing is old enough."""
        if time.monotonic() - self._drawn_at >= self.refresh_seconds:
            self._draw(trainer)

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Draw."""
        self._draw(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        """Draw the whole run."""
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        history = trainer.metrics.get_history()
        if not trainer.is_main_process or "step" not in history:
            return
        figure = draw(history, self._restarts, trainer.total_steps, THEMES[self.theme], self._title(trainer))
        temporary = self.path.with_name("." + self.path.name)  # a viewer never sees half a picture
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(temporary, dpi=130, format="png")
            os.replace(temporary, self.path)
        except OSError as error:  # no reason to end a run: a picture is made of numbers that are kept elsewhere
            trainer.say(f"{self.path} cannot be drawn: {error}; the training goes on")
        self._drawn_at = time.monotonic()

    @staticmethod
    def _title(trainer: Trainer) -> str:
        name = "" if trainer.output_dir is None else f"{trainer.output_dir.name}: "
        # Text between dollars would be read as a formula.
        return f"{name}step {trainer.global_step:,} of {trainer.total_steps:,}".replace("$", r"\$")


def draw(
    history: dict[str, list[float]], restarts: list[int], total_steps: int, theme: dict[str, str], title: str
) -> Any:
    """A matplotlib Figure of a run's history (see `MetricTracker`)."""
    # The object interface touches neither pyplot's global state nor the user's backend.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained", facecolor=theme["paper"])
    figure.suptitle(title, color=theme["ink"], fontsize=12, fontweight="bold", x=0.01, ha="left")
    small = ["learning_rate", "grad_norm", "tokens_per_second"]
    layout: Any = [["loss"] * 3, small]
    axes = figure.subplot_mosaic(layout, height_ratios=[1.9, 1])
    for name, axis in axes.items():
        axis.set_facecolor(theme["paper"])
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(theme["faint"])
        axis.tick_params(colors=theme["faint"], labelcolor=theme["ink"], labelsize=8 if name != "loss" else 9)
        axis.grid(color=theme["grid"], linewidth=0.7)
        axis.set_axisbelow(True)
        axis.set_xlim(0, max(total_steps, history["step"][-1]))
        axis.xaxis.set_major_locator(_locator(5 if name == "loss" else 3))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        for number, step in enumerate(restarts):
            label = f"started again ({len(restarts)})" if number == 0 and name == "loss" else None
            axis.axvline(step, color=theme["faint"], linewidth=1, linestyle=(0, (4, 3)), label=label)
    _draw_losses(axes["loss"], history, theme)
    _draw_small(axes, history, theme)
    return figure


def _locator(steps: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(steps, integer=True)


def _draw_losses(axis: Any, history: dict[str, list[float]], theme: dict[str, str]) -> None:
    steps, losses = history["step"], history["train_loss"]
    if len(steps) >= MANY:
        axis.plot(steps, losses, color=theme["training"], linewidth=0.8, alpha=0.35)
        axis.plot(steps, smoothed(losses), color=theme["training"], linewidth=1.7, label="training (smoothed)")
    else:
        axis.plot(steps, losses, color=theme["training"], linewidth=1.7, label="training")
    shown = [value for value in losses if math.isfinite(value)]
    if "val_step" in history:
        values = history["val_loss"]
        axis.plot(
            history["val_step"], values, color=theme["validation"], linewidth=1.7, marker="o", markersize=3.5,
            label="validation",
        )  # fmt: skip
        shown += [value for value in values if math.isfinite(value)]
        axis.annotate(
            f"{values[-1]:.4g}", (history["val_step"][-1], values[-1]), xytext=(-4, 9), textcoords="offset points",
            ha="right", color=theme["validation"], fontweight="bold",
            bbox={"facecolor": theme["paper"], "edgecolor": "none", "alpha": 0.75, "pad": 1.5},
        )  # fmt: skip
    if len(steps) >= MANY and shown:  # the first lines, far above all others, would press them flat
        ordered = sorted(shown)
        top, bottom = ordered[int(0.97 * (len(ordered) - 1))], ordered[0]
        if top > bottom:
            axis.set_ylim(bottom - 0.06 * (top - bottom), top + 0.06 * (top - bottom))
    for name, marker, label in (("bad_steps", "x", "not finite"), ("skipped_spikes", "^", "spike, left out")):
        marked = rises(steps, history.get(name, []))
        if marked:
            axis.plot(
                marked, [0.03] * len(marked), marker, color=theme["bad"], transform=axis.get_xaxis_transform(),
                clip_on=False, markersize=6, label=f"{label} ({history[name][-1]:,.0f})",
            )  # fmt: skip
    axis.set_ylabel("loss (nats per token)", color=theme["ink"])
    axis.set_xlabel("optimizer step", color=theme["ink"])
    axis.legend(frameon=False, labelcolor=theme["ink"], loc="upper right", fontsize=9)


def _draw_small(axes: Any, history: dict[str, list[float]], theme: dict[str, str]) -> None:
    from matplotlib.ticker import EngFormatter

    for name, title in (
        ("learning_rate", "learning rate"),
        ("grad_norm", "gradient norm, before clipping"),
        ("tokens_per_second", "tokens per second"),
    ):
        axis, values = axes[name], history[name]
        axis.plot(history["step"], values, color=theme["other"], linewidth=1.3 if name == "learning_rate" else 0.9)
        axis.set_title(title, color=theme["ink"], fontsize=9.5, loc="left")
        positive = [value for value in values if math.isfinite(value) and value > 0]
        if name == "grad_norm" and positive and max(positive) > 20 * min(positive):
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, None)
            axis.yaxis.set_major_formatter(EngFormatter(sep="") if name == "tokens_per_second" else "{x:.3g}")


def smoothed(values: list[float]) -> list[float]:
    """Means of the finite values in a window of a fortieth of all, which is centred, and so lags at no bend."""
    finite = [math.isfinite(value) for value in values]
    sums = [0.0, *accumulate(value if is_finite else 0.0 for value, is_finite in zip(values, finite, strict=True))]
    counts = [0, *accumulate(finite)]
    means = []
    for place in range(len(values)):
        half = min(place, len(values) - 1 - place, max(1, len(values) // 80))
        first, end = place - half, place + half + 1
        count = counts[end] - counts[first]
        means.append((sums[end] - sums[first]) / count if count else math.nan)
    return means


def rises(steps: list[float], counts: list[float]) -> list[float]:
    """The steps at whose log lines a count had grown; none where it was not counted all the time."""
    if len(counts) != len(steps):
        return []
    return [step for step, (before, now) in zip(steps, pairwise([0, *counts]), strict=True) if now > before]
