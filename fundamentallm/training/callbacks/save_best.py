"""Keeps the checkpoint with the best validation metric."""

from __future__ import annotations

from fundamentallm.errors import ConfigError, Problem
from fundamentallm.training.callbacks.base import Callback, RunView
from fundamentallm.training.early_stopping import BestValue


class SaveBestCallback(BestValue, Callback):
    """Saves a checkpoint, marked as the best, whenever a validation metric improves.

    Args:
        metric: name of the validation metric.
        mode: 'min' if smaller is better, 'max' if larger is better.
        min_delta: smallest change that counts as an improvement, in the metric's unit.

    Raises:
        ConfigError: if mode is neither.

    Examples:
        >>> from fundamentallm import SaveBestCallback
        >>> callbacks = [SaveBestCallback("val_loss")]  # for a Trainer; trainer.checkpoint_manager.get_best() is it
    """

    def on_validation_end(self, trainer: RunView, metrics: dict[str, float]) -> None:
        if self.metric not in metrics:
            raise ConfigError([Problem("metric", self.metric, allowed=", ".join(metrics))])
        if self.improve(metrics[self.metric]):
            trainer.request_save(is_best=True)
