"""The import path of `CheckpointManager` that the specification names."""

from fundamentallm.checkpoint.manager import CheckpointManager as CheckpointManager
