"""Early stopping: ends a run when a validation metric no longer improves."""

from __future__ import annotations

import logging
import math
from typing import Any

from fundamentallm.config.schema import TrainingConfig
from fundamentallm.config.validation import range_problems
from fundamentallm.errors import ConfigError, Problem

logger = logging.getLogger(__name__)


def improves(value: float, best: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """Returns whether `value` is better than `best` (None: no value yet) by more than `min_delta`. NaN never is."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value < best - min_delta if mode == "min" else value > best + min_delta


def saved_best(value: Any) -> float | None:
    """Returns a saved best value. Raises ValueError or TypeError if it is neither a number nor None."""
    return None if value is None else float(value)


class EarlyStopping:
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

    def __init__(
        self,
        patience: int,
        metric: str = TrainingConfig.early_stopping_metric,
        mode: str = TrainingConfig.early_stopping_mode,
        min_delta: float = TrainingConfig.early_stopping_min_delta,
    ) -> None:
        problems = range_problems(early_stopping_patience=patience, early_stopping_min_delta=min_delta)
        if mode not in ("min", "max"):
            problems.append(Problem("early_stopping_mode", mode, "min, max"))
        if problems:
            raise ConfigError(problems)
        self.patience, self.metric, self.mode, self.min_delta = patience, metric, mode, min_delta
        self._best: float | None = None
        self.counter = 0
        self.is_best = False

    def step(self, current_value: float) -> bool:
        """Add the value of a validation. Returns whether to stop training."""
        self.is_best = improves(current_value, self._best, self.mode, self.min_delta)
        self._best, self.counter = (current_value, 0) if self.is_best else (self._best, self.counter + 1)
        return self.should_stop

    def describe(self) -> str:
        """Returns why the run stops."""
        return f"early stopping: {self.metric} has not improved on {self.best_value:.4g} in {self.patience} validations"

    @property
    def should_stop(self) -> bool:
        """True if patience has run out."""
        return self.counter >= self.patience

    @property
    def best_value(self) -> float:
        """The best value so far, or an infinitely bad one before the first."""
        if self._best is not None:
            return self._best
        return math.inf if self.mode == "min" else -math.inf

    def reset(self) -> None:
        """Forget all values."""
        self._best, self.counter, self.is_best = None, 0, False

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value and the count, with metric and mode."""
        about = {"metric": self.metric, "mode": self.mode}
        return {**about, "best_value": self._best, "counter": self.counter, "is_best": self.is_best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state, unless it is about another metric. Raises ValueError if it is not such a state."""
        best, counter = saved_best(state["best_value"]), state["counter"]
        if type(counter) is not int or counter < 0:
            raise ValueError(f"the counter is {counter!r}; allowed: an integer, at least 0.")
        if (state["metric"], state["mode"]) != (self.metric, self.mode):
            logger.warning("early stopping was reset: the checkpoint watched %r (%r).", state["metric"], state["mode"])
            return
        self._best, self.counter, self.is_best = best, counter, bool(state["is_best"])


def make_early_stopping(config: TrainingConfig) -> EarlyStopping | None:
    """Returns the early stopping of `config`, or None if its patience is not set."""
    patience, metric, mode = config.early_stopping_patience, config.early_stopping_metric, config.early_stopping_mode
    return None if patience is None else EarlyStopping(patience, metric, mode, config.early_stopping_min_delta)
