"""Weights that a new run begins with: of a checkpoint (`init_from`), or of a model in transformers' format."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from torch import nn

from fundamentallm.checkpoint.manifest import TENSORS, read_manifest
from fundamentallm.checkpoint.reading import check_checkpoint, load_weights
from fundamentallm.config.schema import Config, DataConfig, ModelConfig
from fundamentallm.config.validation import expand_user
from fundamentallm.data.tokenizers import create_tokenizer, read_tokenizer
from fundamentallm.distributed.host_group import Team
from fundamentallm.errors import CheckpointError, ConfigError
from fundamentallm.models.transformers_format import TOKENIZER, Pretrained, find_pretrained, transformers_model
from fundamentallm.run.state import like_of

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer

BESIDE = ("init_from", "pretrained", "dropout")
"""Settings of the model that are not its shape."""


def open_pretrained(config: Config) -> tuple[Config, Pretrained | None, nn.Module | None]:
    """What `model.pretrained` says, where it is set, on all processes together: the config with what its folder says,
    the folder, and the model that transformers makes of it, where it is none of ours.

    Raises:
        ConfigError: if it cannot be opened, or contradicts other settings.
        FundamentaLLMError: on the other processes.
    """
    if config.model.pretrained is None:
        return config, None, None
    with Team().together():
        pretrained = find_pretrained(config.model.pretrained)
        config = completed(config, pretrained)
        return config, pretrained, None if pretrained.shape is not None else transformers_model(pretrained)


def completed(config: Config, pretrained: Pretrained) -> Config:
    """The run's config with what the folder says: the model's shape, and its tokenizer.

    Raises:
        ConfigError: listing what contradicts it.
    """
    theirs = pretrained.shape or dataclasses.replace(config.model, vocab_size=pretrained.vocab_size)
    problems = []
    for entry in dataclasses.fields(ModelConfig):
        value, known = getattr(config.model, entry.name), pretrained.shape is not None or entry.name == "vocab_size"
        if entry.name in BESIDE or value == entry.default or (known and value == getattr(theirs, entry.name)):
            continue
        has = f"has {getattr(theirs, entry.name)}" if known else f"is a {pretrained.config.get('model_type')} model"
        problems.append(
            f"model.{entry.name} is {value!r} and {pretrained.folder} {has}; leave it out: the shape is the folder's."
        )
    if config.model.init_from is not None:
        problems.append(
            f"model.init_from is {config.model.init_from!r} and model.pretrained {config.model.pretrained!r}; allowed: "
            "one of them. (A checkpoint of ours is a pretrained model too.)"
        )
    length, most = config.data.sequence_length, pretrained.context
    if pretrained.shape is None and config.model.dropout:
        problems.append(
            f"model.dropout is {config.model.dropout} and {pretrained.folder} is a model of transformers; set the "
            "dropout in its config.json, under its own names."
        )
    if pretrained.shape is None and config.data.mask_documents:
        problems.append(
            "data.mask_documents is true and model.pretrained is a model that is trained through transformers; "
            "set it to false."
        )
    if pretrained.shape is None and most is not None and length > most:
        problems.append(
            f"data.sequence_length is {length}; allowed: at most {most}, the context of {pretrained.folder}."
        )
    spec = config.data.tokenizer
    try:
        spec = _tokenizer(spec, pretrained.folder / TOKENIZER)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    model = dataclasses.replace(theirs, pretrained=config.model.pretrained, dropout=config.model.dropout)
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, tokenizer=spec))


def _tokenizer(spec: str, theirs: Path) -> str:
    """What `data.tokenizer` says beside a pretrained model: that model's own, or an error."""
    if not theirs.is_file():
        if spec.endswith(".json"):
            return spec
        raise ConfigError(
            f"data.tokenizer is {spec!r} and {theirs.parent} has no {TOKENIZER}; give the tokenizer.json with which it "
            "was trained (AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers makes one)."
        )
    if spec == DataConfig.tokenizer:
        return str(theirs)
    known = spec == "byte" or spec.endswith(".json")
    if not known or create_tokenizer(spec).to_str() != read_tokenizer(theirs).to_str():
        raise ConfigError(
            f"data.tokenizer is {spec!r} and {theirs.parent} was trained with another, so that its weights would mean "
            "other tokens; leave it out: the tokenizer is the folder's."
        )
    return spec


def begin_from_pretrained(trainer: Trainer, pretrained: Pretrained) -> None:
    """Give our `Transformer` the folder's weights.

    Raises:
        CheckpointError: if they are damaged, or not those that its config.json describes.
    """
    load_weights(pretrained.folder, pretrained.weights, trainer.model, like_of(trainer))


def begin_from_checkpoint(trainer: Trainer, tokenizer: Tokenizer) -> None:
    """Begin from the weights of the checkpoint `model.init_from`.

    Raises:
        CheckpointError: if it is damaged, or of a model of another shape.
        ConfigError: if its tokens mean something else.
    """
    checkpoint = Path(expand_user(trainer.config.model.init_from or ""))
    trainer.team.from_first(lambda: check_checkpoint(checkpoint))
    theirs = checkpoint / TOKENIZER
    if theirs.exists() and json.loads(theirs.read_text(encoding="utf-8")) != json.loads(tokenizer.to_str()):
        raise ConfigError(
            f"model.init_from is {str(checkpoint)!r}, whose tokenizer is another than data.tokenizer makes, so that "
            f"its weights would mean other tokens; set data.tokenizer to {str(theirs)!r}."
        )
    files = [
        name for name in read_manifest(checkpoint)["files"] if TENSORS.fullmatch(name) and name.startswith("model")
    ]
    try:
        load_weights(checkpoint, files, trainer.model, like_of(trainer))
    except CheckpointError as error:
        raise CheckpointError(f"model.init_from: {error}") from error
