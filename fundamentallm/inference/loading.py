"""Opens a trained model for use: a checkpoint, sharded or not, or a folder in Hugging Face format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import nn

from fundamentallm.checkpoint.manager import CheckpointManager, checkpoints_folder
from fundamentallm.checkpoint.manifest import is_ours, verify
from fundamentallm.checkpoint.reading import explained, load_parts, load_weights
from fundamentallm.checkpoint.snapshot import ADAPTER_KEY, MODEL_KEY
from fundamentallm.data.tokenizers import read_tokenizer
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import CheckpointError, CheckpointNotFoundError
from fundamentallm.models.adapters import Adapter, open_adapter
from fundamentallm.models.transformer import Transformer
from fundamentallm.models.transformers_format import (
    ADAPTER_CONFIG,
    CONFIG,
    TOKENIZER,
    Pretrained,
    find_pretrained,
    transformers_model,
)


class LoadedModel(NamedTuple):
    """A model ready for use, with what its use needs."""

    model: nn.Module
    """In evaluation mode, on the accelerator if there is one."""
    tokenizer: Tokenizer
    context: int | None
    """Maximum number of tokens that the model sees at once, or None if it states no limit."""
    stop: frozenset[int]
    """Tokens that end a text."""
    folder: Path
    """The folder that it was read from."""


def load_model(checkpoint: str | Path, base: str | Path | None = None) -> LoadedModel:
    """Load a trained model and its tokenizer.

    Args:
        checkpoint: a checkpoint, a run's output folder or its folder of checkpoints (the best is used, otherwise the
            newest), or a model folder in Hugging Face format.
        base: if the checkpoint holds an adapter of peft: its base model, a folder or a name in the local Hugging Face
            cache. None: the one that the checkpoint names, if it is a cached name or one of your runs has trained
            adapters of it.

    Raises:
        CheckpointNotFoundError: if there is none.
        CheckpointError: if it is damaged.
        ConfigError: if it cannot be used.

    Examples:
        >>> from fundamentallm import TrainingConfig, Trainer, Transformer, create_dataloaders, create_tokenizer
        >>> from fundamentallm import Config, DataConfig, ModelConfig, generate, load_model
        >>> text = "to be or not to be " * 50
        >>> tokenizer = create_tokenizer("char", text)
        >>> model = Transformer(ModelConfig(tokenizer.get_vocab_size(), d_model=16, num_heads=2, num_layers=1))
        >>> training = TrainingConfig(max_steps=1, batch_size=4, checkpoint_dir="checkpoints")
        >>> config = Config(data=DataConfig(sequence_length=16), training=training)
        >>> _ = Trainer(model, training, *create_dataloaders(text, tokenizer, config), callbacks=[]).train()
        >>> loaded = load_model("checkpoints")
        >>> ids = generate(loaded.model, loaded.tokenizer.encode("to be").ids, 5, loaded.context)
        >>> len(loaded.tokenizer.decode(list(ids)))
        5
    """
    folder = Path(os.path.expanduser(checkpoint))
    if not any((folder / name).exists() for name in (CONFIG, ADAPTER_CONFIG)):
        folder = find_checkpoint(folder, wants_best=True)
    with explained(folder):
        if is_ours(folder):
            verify(folder)
        has_adapter = (folder / ADAPTER_CONFIG).exists()
        model, found = _open_adapter(folder, base) if has_adapter else _open_model(folder)
        own = folder / TOKENIZER
        tokenizer = read_tokenizer(own if own.exists() else found.folder / TOKENIZER)
        stop = found.stop | found._replace(folder=folder).stop
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return LoadedModel(model.eval().to(device), tokenizer, found.context, stop, folder)


def find_checkpoint(path: Path, wants_best: bool = False) -> Path:
    """Returns `path` if it is a checkpoint, or the newest (or the best) one of a run or of a folder of checkpoints.

    Raises CheckpointNotFoundError if there is none.
    """
    manager = CheckpointManager(checkpoints_folder(path))
    found = path if is_ours(path) else (wants_best and manager.get_best()) or manager.get_latest()
    if found is None:
        raise CheckpointNotFoundError(f"no checkpoint found in {path}. Give a checkpoint, or a run's output_dir.")
    return found


def _open_model(folder: Path) -> tuple[nn.Module, Pretrained]:
    found = find_pretrained(str(folder), "checkpoint")
    if found.shape is None:
        if is_ours(folder) and len(found.weights) > 1:
            advice = f"Consolidate it first: fundamentallm checkpoints consolidate {folder} OUT."
            raise CheckpointError(f"{folder} holds a sharded {found.config.get('model_type')} model. {advice}")
        return transformers_model(found), found
    model = Transformer(found.shape)
    load_weights(folder, found.weights, model)
    return model, found


def _open_adapter(folder: Path, base: str | Path | None) -> tuple[nn.Module, Pretrained]:
    """Opens an adapter with its base model; those of a checkpoint with the base weights and buffers of its run."""
    model, found = open_adapter(folder, base)
    if is_ours(folder):
        saved = load_parts(folder, (ADAPTER_KEY, MODEL_KEY))
        adapter = Adapter(model, HostGroup(alone=True))
        adapter.load_state_dict(saved[ADAPTER_KEY])
        buffers = saved[MODEL_KEY].keys() & {*adapter.saved} - adapter.names.keys()
        model.load_state_dict({name: saved[MODEL_KEY][name] for name in buffers}, strict=False)
    return model, found
