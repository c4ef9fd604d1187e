"""Training curves as a picture."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fundamentallm.errors import ConfigError, writing
from fundamentallm.training.callbacks import Callback

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer


def check_matplotlib() -> None:
    """Raises ConfigError if matplotlib is not installed, naming the extra."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("matplotlib is not installed; run: pip install 'fundamentallm[plots]'.")


class VisualizationCallback(Callback):
    """Draws loss, learning rate and gradient norm over the steps; on the main process, refreshed as it trains.

    Args:
        path: of the PNG.
        refresh_seconds: shortest time between two drawings at log lines; validations always draw.

    Raises:
        ConfigError: if matplotlib is not installed.

    Example:
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

    def __init__(self, path: Path | str = "curves.png", refresh_seconds: float = 30.0) -> None:
        check_matplotlib()
        self.path, self.refresh_seconds = Path(path), refresh_seconds
        self._drawn_at = time.monotonic()

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
        # The object interface touches neither pyplot's global state nor the user's backend.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 6.5), layout="constrained")
        axes = figure.subplot_mosaic([["loss", "loss"], ["learning_rate", "grad_norm"]], height_ratios=[2, 1])
        steps, ink, accent = history["step"], "#33658a", "#d1495b"
        axes["loss"].plot(steps, history["train_loss"], color=ink, linewidth=1.2, label="training")
        if "val_step" in history:
            values = history["val_loss"]
            axes["loss"].plot(history["val_step"], values, color=accent, marker="o", markersize=4, label="validation")
            axes["loss"].annotate(
                f"{values[-1]:.3f}", (history["val_step"][-1], values[-1]), xytext=(0, 8), textcoords="offset points",
                ha="center", color=accent,
            )  # fmt: skip
        axes["loss"].set(ylabel="loss (nats per token)", xlabel="optimizer step")
        axes["loss"].legend(frameon=False)
        axes["learning_rate"].plot(steps, history["learning_rate"], color=ink, linewidth=1.2)
        axes["learning_rate"].set(title="learning rate", xlabel="optimizer step", ylim=(0, None))
        axes["learning_rate"].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes["grad_norm"].plot(steps, history["grad_norm"], color=ink, linewidth=0.8)
        axes["grad_norm"].set(title="gradient norm before clipping", xlabel="optimizer step", ylim=(0, None))
        for axis in axes.values():
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25, linewidth=0.6)
        temporary = self.path.with_name("." + self.path.name)  # a viewer never sees half a picture
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(temporary, dpi=130, format="png")
            os.replace(temporary, self.path)
        self._drawn_at = time.monotonic()
