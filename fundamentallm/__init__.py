"""Train GPT-style language models: one config, one run, on any number of devices."""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
# A notebook without ipywidgets gets lines instead of a bar. Importing accelerate there would warn of it.
warnings.filterwarnings("ignore", message="IProgress not found")

if TYPE_CHECKING:
    from fundamentallm.checkpoint.manager import CheckpointManager as CheckpointManager
    from fundamentallm.config.schema import (
        Config as Config,
        DataConfig as DataConfig,
        ModelConfig as ModelConfig,
        TrainingConfig as TrainingConfig,
    )
    from fundamentallm.data.corpus import load_corpus as load_corpus
    from fundamentallm.data.datasets import TokenDataset as TokenDataset
    from fundamentallm.data.loaders import create_dataloaders as create_dataloaders, shift_labels as shift_labels
    from fundamentallm.data.tokenizers import create_tokenizer as create_tokenizer
    from fundamentallm.distributed.accelerator import create_accelerator as create_accelerator
    from fundamentallm.errors import (
        CheckpointError as CheckpointError,
        ConfigError as ConfigError,
        FundamentaLLMError as FundamentaLLMError,
        RunInProgressError as RunInProgressError,
        TrainingError as TrainingError,
    )
    from fundamentallm.inference.generation import generate as generate
    from fundamentallm.inference.loading import load_model as load_model
    from fundamentallm.models.transformer import Transformer as Transformer
    from fundamentallm.training.callbacks import (
        Callback as Callback,
        CallbackList as CallbackList,
        LoggingCallback as LoggingCallback,
        ProfilerCallback as ProfilerCallback,
        ProgressCallback as ProgressCallback,
        SampleCallback as SampleCallback,
        SaveBestCallback as SaveBestCallback,
        VisualizationCallback as VisualizationCallback,
    )
    from fundamentallm.training.early_stopping import EarlyStopping as EarlyStopping
    from fundamentallm.training.loss import create_loss as create_loss
    from fundamentallm.training.metrics import MetricTracker as MetricTracker
    from fundamentallm.training.optimizers import create_optimizer as create_optimizer
    from fundamentallm.training.schedulers import create_scheduler as create_scheduler
    from fundamentallm.training.trainer import Trainer as Trainer

_MODULES = {
    "checkpoint.manager": ("CheckpointManager",),
    "config": ("Config", "DataConfig", "ModelConfig", "TrainingConfig"),
    "data.corpus": ("load_corpus",),
    "data.datasets": ("TokenDataset",),
    "data.loaders": ("create_dataloaders", "shift_labels"),
    "data.tokenizers": ("create_tokenizer",),
    "distributed.accelerator": ("create_accelerator",),
    "errors": ("CheckpointError", "ConfigError", "FundamentaLLMError", "RunInProgressError", "TrainingError"),
    "inference.generation": ("generate",),
    "inference.loading": ("load_model",),
    "models.transformer": ("Transformer",),
    "training.callbacks": (
        "Callback", "CallbackList", "LoggingCallback", "ProfilerCallback", "ProgressCallback", "SampleCallback",
        "SaveBestCallback", "VisualizationCallback",
    ),
    "training.early_stopping": ("EarlyStopping",),
    "training.loss": ("create_loss",),
    "training.metrics": ("MetricTracker",),
    "training.optimizers": ("create_optimizer",),
    "training.schedulers": ("create_scheduler",),
    "training.trainer": ("Trainer",),
}  # fmt: skip
_HOME = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the command line need not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
