"""The import paths that the specification names."""

import importlib

import pytest

import fundamentallm

CALLBACKS = ("Callback", "CallbackList", "LoggingCallback", "SaveBestCallback", "VisualizationCallback")
PATHS = {
    "fundamentallm.config": ("Config", "DataConfig", "ModelConfig", "TrainingConfig"),
    "fundamentallm.training.trainer": ("Trainer",),
    "fundamentallm.training.optimizers": ("create_optimizer",),
    "fundamentallm.training.schedulers": ("create_scheduler",),
    "fundamentallm.training.early_stopping": ("EarlyStopping",),
    "fundamentallm.training.callbacks": CALLBACKS,
    "fundamentallm.training.metrics": ("MetricTracker",),
    "fundamentallm.training.loss": ("create_loss",),
    "fundamentallm.utils.checkpoint": ("CheckpointManager",),
}


@pytest.mark.parametrize("path", PATHS)
def test_import_path_of_the_specification_gives_the_public_object(path: str) -> None:
    module = importlib.import_module(path)
    for name in PATHS[path]:
        assert getattr(module, name) is getattr(fundamentallm, name)
