"""Early stopping: ends a run when a validation metric no longer improves."""

from __future__ import annotations

import logging
import math
from typing import Any

from fundamentallm.config.schema import TrainingConfig
from fundamentallm.config.validation import range_problems
from fundamentallm.errors import ConfigError, Problem, raise_all

logger = logging.getLogger(__name__)


class BestValue:
    """The best value of a metric so far; infinitely bad before the first. NaN is never better."""

    _saved: tuple[str, ...] = ("metric", "mode", "best_value")

    def __init__(
        self,
        metric: str = TrainingConfig.early_stopping_metric,
        mode: str = TrainingConfig.early_stopping_mode,
        min_delta: float = 0.0,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError(Problem("mode", mode, "min, max"))
        self.metric, self.mode, self.min_delta = metric, mode, min_delta
        self.best_value = math.inf if mode == "min" else -math.inf

    def improve(self, value: float) -> bool:
        """Add a value. Returns whether it is better than the best so far by more than `min_delta`."""
        best, change = self.best_value, self.min_delta
        is_better = value < best - change if self.mode == "min" else value > best + change
        self.best_value = value if is_better else best
        return is_better

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a checkpoint keeps."""
        return {name: getattr(self, name) for name in self._saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state, unless it is about another metric."""
        if (state["metric"], state["mode"]) != (self.metric, self.mode):
            name = type(self).__name__
            logger.warning("%s was reset: its saved best is of %s (%s).", name, state["metric"], state["mode"])
            return
        for name, before in self.state_dict().items():
            if state[name] is not None:  # as earlier versions saved the best value before the first
                setattr(self, name, type(before)(state[name]))


class EarlyStopping(BestValue):
    """Counts validations without improvement.

    Args:
        patience: validations without improvement before stopping, at least 1.
        metric: name of the validation metric.
        mode: 'min' if smaller is better, 'max' if larger is.
        min_delta: smallest change that counts as an improvement, in the metric's unit.

    Raises:
        ConfigError: if a value is outside its range.

    Examples:
        >>> from fundamentallm import EarlyStopping
        >>> stopping = EarlyStopping(patience=2)
        >>> [stopping.step(val_loss) for val_loss in (3.0, 2.5, 2.6, 2.5)]
        [False, False, False, True]
    """

    _saved = (*BestValue._saved, "counter", "is_best")

    def __init__(
        self,
        patience: int,
        metric: str = TrainingConfig.early_stopping_metric,
        mode: str = TrainingConfig.early_stopping_mode,
        min_delta: float = TrainingConfig.early_stopping_min_delta,
    ) -> None:
        raise_all(range_problems(early_stopping_patience=patience, early_stopping_min_delta=min_delta))
        super().__init__(metric, mode, min_delta)
        self.patience, self.counter, self.is_best = patience, 0, False

    def step(self, current_value: float) -> bool:
        """Add the value of a validation. Returns whether to stop training."""
        self.is_best = self.improve(current_value)
        self.counter = 0 if self.is_best else self.counter + 1
        return self.should_stop

    @property
    def should_stop(self) -> bool:
        """True if patience has run out."""
        return self.counter >= self.patience

    def describe(self) -> str:
        """Returns why the run stops."""
        return f"early stopping: {self.metric} has not improved on {self.best_value:.4g} in {self.patience} validations"

    def reset(self) -> None:
        """Forget all values."""
        self.__init__(self.patience, self.metric, self.mode, self.min_delta)  # type: ignore[misc]


def make_early_stopping(config: TrainingConfig) -> EarlyStopping | None:
    """Returns the early stopping of `config`, or None if its patience is not set."""
    patience, metric, mode = config.early_stopping_patience, config.early_stopping_metric, config.early_stopping_mode
    return None if patience is None else EarlyStopping(patience, metric, mode, config.early_stopping_min_delta)
