"""Callbacks observe the training. They never change its numbers."""

from fundamentallm.training.callbacks.base import Callback as Callback
from fundamentallm.training.callbacks.base import CallbackList as CallbackList
from fundamentallm.training.callbacks.console import LoggingCallback as LoggingCallback
from fundamentallm.training.callbacks.console import ProgressCallback as ProgressCallback
from fundamentallm.training.callbacks.curves import VisualizationCallback as VisualizationCallback
from fundamentallm.training.callbacks.save_best import SaveBestCallback as SaveBestCallback
