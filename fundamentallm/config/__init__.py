"""What a user may write in a config. Imports no torch, so that `--help` and config errors answer at once."""

from fundamentallm.config.schema import (
    Config as Config,
    DataConfig as DataConfig,
    ModelConfig as ModelConfig,
    TrainingConfig as TrainingConfig,
)
