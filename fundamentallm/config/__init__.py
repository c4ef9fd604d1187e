"""What a user may write in a config. Imports no torch, so that `--help` and config errors answer at once."""

from fundamentallm.config.schema import Config as Config
from fundamentallm.config.schema import DataConfig as DataConfig
from fundamentallm.config.schema import ModelConfig as ModelConfig
from fundamentallm.config.schema import TrainingConfig as TrainingConfig
