"""Train GPT-style language models: one config, one run, on any number of devices."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fundamentallm.config import Config as Config
    from fundamentallm.config import DataConfig as DataConfig
    from fundamentallm.config import ModelConfig as ModelConfig
    from fundamentallm.config import TrainingConfig as TrainingConfig
    from fundamentallm.data.corpus import load_corpus as load_corpus
    from fundamentallm.data.datasets import TokenDataset as TokenDataset
    from fundamentallm.data.loaders import create_dataloaders as create_dataloaders
    from fundamentallm.data.tokenizers import create_tokenizer as create_tokenizer
    from fundamentallm.errors import CheckpointError as CheckpointError
    from fundamentallm.errors import ConfigError as ConfigError
    from fundamentallm.errors import FundamentaLLMError as FundamentaLLMError
    from fundamentallm.errors import RunInProgressError as RunInProgressError
    from fundamentallm.errors import TrainingError as TrainingError
    from fundamentallm.models.generation import generate as generate
    from fundamentallm.models.transformer import Transformer as Transformer
    from fundamentallm.training.accelerator import create_accelerator as create_accelerator
    from fundamentallm.training.callbacks import Callback as Callback
    from fundamentallm.training.callbacks import CallbackList as CallbackList
    from fundamentallm.training.callbacks import LoggingCallback as LoggingCallback
    from fundamentallm.training.callbacks import ProgressCallback as ProgressCallback
    from fundamentallm.training.callbacks import SaveBestCallback as SaveBestCallback
    from fundamentallm.training.checkpoint import CheckpointManager as CheckpointManager
    from fundamentallm.training.early_stopping import EarlyStopping as EarlyStopping
    from fundamentallm.training.inspection import ProfilerCallback as ProfilerCallback
    from fundamentallm.training.inspection import RatioCallback as RatioCallback
    from fundamentallm.training.inspection import SampleCallback as SampleCallback
    from fundamentallm.training.loss import create_loss as create_loss
    from fundamentallm.training.metrics import MetricTracker as MetricTracker
    from fundamentallm.training.optimizers import create_optimizer as create_optimizer
    from fundamentallm.training.schedulers import create_scheduler as create_scheduler
    from fundamentallm.training.trainer import Trainer as Trainer
    from fundamentallm.training.visualization import VisualizationCallback as VisualizationCallback

_MODULES = {
    "config": ("Config", "DataConfig", "ModelConfig", "TrainingConfig"),
    "data.corpus": ("load_corpus",),
    "data.datasets": ("TokenDataset",),
    "data.loaders": ("create_dataloaders",),
    "data.tokenizers": ("create_tokenizer",),
    "errors": ("CheckpointError", "ConfigError", "FundamentaLLMError", "RunInProgressError", "TrainingError"),
    "models.generation": ("generate",),
    "models.transformer": ("Transformer",),
    "training.accelerator": ("create_accelerator",),
    "training.callbacks": (
        "Callback", "CallbackList", "LoggingCallback", "ProgressCallback", "SaveBestCallback",
    ),
    "training.checkpoint": ("CheckpointManager",),
    "training.early_stopping": ("EarlyStopping",),
    "training.inspection": ("ProfilerCallback", "RatioCallback", "SampleCallback"),
    "training.loss": ("create_loss",),
    "training.metrics": ("MetricTracker",),
    "training.optimizers": ("create_optimizer",),
    "training.schedulers": ("create_scheduler",),
    "training.trainer": ("Trainer",),
    "training.visualization": ("VisualizationCallback",),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the command line need not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
