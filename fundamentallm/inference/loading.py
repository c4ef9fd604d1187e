"""Opening a trained model for use: a checkpoint of ours, sliced or whole, or a folder in transformers' format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fundamentallm.errors import CheckpointError, CheckpointNotFoundError, ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn

CHECKPOINT_HELP = (
    "a checkpoint, a folder of checkpoints (the best, else the newest, is taken), a run's output_dir, or a folder in "
    "transformers' format"
)


class Opened(NamedTuple):
    """A model, ready for use, on the device that there is."""

    folder: Path
    model: nn.Module
    tokenizer: Tokenizer
    context: int | None
    """Most tokens that it sees at once; None: no limit that it knows of."""
    stop: frozenset[int]
    """Tokens that end a text."""


def open_model(path: Path) -> Opened:
    """The model at `path` (see `CHECKPOINT_HELP`), in evaluation mode.

    Raises:
        CheckpointNotFoundError: if there is none, or one without what using it needs.
        CheckpointError: if it is damaged.
        ConfigError: if it cannot be used.
    """
    import torch

    from fundamentallm.checkpoint.manifest import MANIFEST, verify
    from fundamentallm.checkpoint.reading import load_weights
    from fundamentallm.data.tokenizers import read_tokenizer
    from fundamentallm.models.transformer import Transformer
    from fundamentallm.models.transformers_format import find_pretrained, transformers_model

    folder = find_checkpoint(path)
    is_ours = (folder / MANIFEST).exists()
    if is_ours:
        verify(folder)
    found = find_pretrained(str(folder), "--checkpoint")
    if found.shape is not None:
        model: nn.Module = Transformer(found.shape)
        load_weights(folder, found.weights, model)
    elif is_ours and len(found.weights) > 1:
        raise CheckpointError(
            f"{folder} holds a {found.config.get('model_type')} model in slices; put it together first: "
            f"fundamentallm checkpoints consolidate {folder} OUT."
        )
    else:
        model = transformers_model(found)
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    if found.vocab_size is not None and tokenizer.get_vocab_size() > found.vocab_size:
        raise ConfigError(
            f"{folder}: its tokenizer has {tokenizer.get_vocab_size():,} tokens, and its model {found.vocab_size:,}."
        )
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return Opened(folder, model.eval().to(device), tokenizer, found.context, found.stop)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the best (else the newest) below it; or a transformers folder.

    Raises:
        CheckpointNotFoundError: if there is none, or one without what using it needs.
    """
    from fundamentallm.checkpoint.manager import CheckpointManager, checkpoints_folder
    from fundamentallm.checkpoint.manifest import MANIFEST

    manager = CheckpointManager(checkpoints_folder(path))
    is_one = (path / MANIFEST).exists() or (path / "config.json").exists()
    folder = path if is_one else manager.get_best() or manager.get_latest()
    if folder is None:
        raise CheckpointNotFoundError(f"there is no checkpoint in {path}; give a checkpoint, or a run's output_dir.")
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).exists():
            raise CheckpointNotFoundError(f"{folder} has no {name}, without which its model cannot be used on text.")
    return folder
