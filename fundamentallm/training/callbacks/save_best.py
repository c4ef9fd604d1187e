"""Keeps the checkpoint with the best validation metric."""

from __future__ import annotations

import logging
from typing import Any

from fundamentallm.config.schema import TrainingConfig
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.training.callbacks.base import Callback, RunView
from fundamentallm.training.early_stopping import improves, saved_best

logger = logging.getLogger(__name__)


class SaveBestCallback(Callback):
    """Saves a checkpoint, marked as the best, whenever a validation metric improves.

    Args:
        metric: name of the validation metric.
        mode: 'min' if smaller is better, 'max' if larger is better.

    Raises:
        ConfigError: if mode is neither.

    Examples:
        >>> from fundamentallm import SaveBestCallback
        >>> callbacks = [SaveBestCallback("val_loss")]  # for a Trainer; trainer.checkpoint_manager.get_best() is it
    """

    def __init__(
        self, metric: str = TrainingConfig.early_stopping_metric, mode: str = TrainingConfig.early_stopping_mode
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError([Problem("mode", mode, allowed="min, max")])
        self.metric, self.mode = metric, mode
        self.best_value: float | None = None

    def on_validation_end(self, trainer: RunView, metrics: dict[str, float]) -> None:
        if self.metric not in metrics:
            raise ConfigError([Problem("metric", self.metric, allowed=", ".join(metrics))])
        if improves(metrics[self.metric], self.best_value, self.mode):
            self.best_value = metrics[self.metric]
            trainer.request_save(is_best=True)

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "mode": self.mode, "best_value": self.best_value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        best = saved_best(state["best_value"])
        if (state["metric"], state["mode"]) == (self.metric, self.mode):
            self.best_value = best
        else:
            logger.warning("best metric reset: the saved value is of %s (%s).", state["metric"], state["mode"])
