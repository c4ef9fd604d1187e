"""Callbacks observe the training. They never change its numbers."""

from fundamentallm.training.callbacks.base import (
    Callback as Callback,
    CallbackList as CallbackList,
    SaveBestCallback as SaveBestCallback,
)
from fundamentallm.training.callbacks.console import (
    LoggingCallback as LoggingCallback,
    ProgressCallback as ProgressCallback,
)
from fundamentallm.training.callbacks.curves import VisualizationCallback as VisualizationCallback
