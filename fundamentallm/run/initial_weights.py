"""Weights that a new run starts from: a checkpoint's (`init_from`), or those of a model in transformers' format."""

import dataclasses
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from fundamentallm.checkpoint.manifest import is_ours, read_manifest, verify
from fundamentallm.checkpoint.reading import explained, load_weights
from fundamentallm.config.schema import Config, DataConfig, ModelConfig
from fundamentallm.config.validation import expand_user
from fundamentallm.data.tokenizers import create_tokenizer, read_tokenizer, same_tokenizer
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.models.adapters import add_lora
from fundamentallm.models.transformers_format import TOKENIZER, WEIGHTS, Pretrained, find_pretrained, transformers_model
from fundamentallm.run.resume import check_tokenizer
from fundamentallm.run.state import RunState


def open_pretrained(config: Config) -> tuple[Config, Pretrained | None, nn.Module | None]:
    """Opens the folder that `model.pretrained` names, if any, on all processes together; see `completed`.

    Returns the config completed from the folder, the folder, and the model if transformers makes it.
    """
    name, lora = config.model.pretrained, config.model.lora
    if name is None:
        return config, None, None
    with HostGroup().barrier_with_errors():
        config, pretrained = completed(config)
        model = None if pretrained.shape is not None else transformers_model(pretrained)
        if model is not None and lora is not None:
            torch.manual_seed(config.training.seed)
            model = add_lora(model, lora, name, pretrained.folder)
        return config, pretrained, model


def completed(config: Config) -> tuple[Config, Pretrained]:
    """Returns the config with shape and tokenizer of the model folder `model.pretrained`, and the folder.

    Raises CheckpointError if it is damaged; ConfigError if it cannot be used, or contradicts other settings.
    """
    model, data, name = config.model, config.data, config.model.pretrained or ""
    with explained(Path(name)):
        pretrained = find_pretrained(name)
        if model.lora is not None:  # peft adapts transformers' modules
            pretrained = pretrained._replace(shape=None, why_not="model.lora is set")
        folder = pretrained.folder
        if is_ours(folder):
            verify(folder)
        theirs = pretrained.shape or ModelConfig(vocab_size=pretrained.config.get("vocab_size"))
        theirs = dataclasses.replace(theirs, pretrained=name, dropout=model.dropout, lora=model.lora)
        problems = []
        for entry in dataclasses.fields(ModelConfig):
            value = getattr(model, entry.name)
            if value not in (entry.default, getattr(theirs, entry.name)):
                reason = f"and model.pretrained sets it: {folder} has its own"
                problems.append(Problem(f"model.{entry.name}", value, advice="Leave it out.", reason=reason))
        if pretrained.shape is None:
            reason = f"and {folder} is trained through transformers"
            if model.dropout:
                advice = "Set the dropout in its config.json, under its own names."
                problems.append(Problem("model.dropout", model.dropout, "0", advice, reason))
            if data.mask_documents:
                problems.append(Problem("data.mask_documents", True, "false", reason=reason))
            if pretrained.context is not None and data.sequence_length > pretrained.context:
                allowed = f"at most {pretrained.context}, the context of {folder}"
                problems.append(Problem("data.sequence_length", data.sequence_length, allowed))
        spec, theirs_file, reason = data.tokenizer, folder / TOKENIZER, ""
        is_file = spec.endswith(".json")
        if not theirs_file.is_file():
            reason = "" if is_file else f"and {folder} has no {TOKENIZER}"
        elif spec == DataConfig.tokenizer:
            spec = str(theirs_file)
        elif not (is_file or spec == "byte") or not same_tokenizer(create_tokenizer(spec), read_tokenizer(theirs_file)):
            reason = f"and {folder} was trained with another tokenizer"
        if reason:
            advice = "Leave it out, or give the tokenizer.json with which it was trained (AutoTokenizer writes one)."
            problems.append(Problem("data.tokenizer", spec, advice=advice, reason=reason))
        if problems:
            raise ConfigError(problems)
        return dataclasses.replace(config, model=theirs, data=dataclasses.replace(data, tokenizer=spec)), pretrained


def begin_from_checkpoint(state: RunState, group: HostGroup, init_from: str, tokenizer: Tokenizer) -> None:
    """Loads the weights of the checkpoint `init_from`. Raises ConfigError if it was trained with another tokenizer."""
    checkpoint = Path(expand_user(init_from))
    group.from_main(lambda: verify(checkpoint))
    with explained(checkpoint):
        check_tokenizer(checkpoint, tokenizer)
    files = [name for name in read_manifest(checkpoint)["files"] if WEIGHTS.fullmatch(name)]
    load_weights(checkpoint, files, state.model, state.like())
