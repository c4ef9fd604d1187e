"""What a checkpoint of a run holds, and how a run goes on from one."""

from __future__ import annotations

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm.data.datasets import TokenDataset
from fundamentallm.errors import CheckpointError, ConfigError
from fundamentallm.models.transformer import Transformer

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer


def run_state(trainer: Trainer) -> dict[str, Any]:
    """The state of every part by name, and what it was made with."""
    state = {f"{part}_state_dict": holder.state_dict() for part, holder in trainer.state.items()}
    packages = ("fundamentallm", "torch", "accelerate", "safetensors", "tokenizers")
    versions = {"python": platform.python_version()} | {package: version(package) for package in packages}
    return {**state, "config": dataclasses.asdict(trainer.run_config), "versions": versions}


def model_files(trainer: Trainer) -> dict[str, str]:
    """What transformers needs beside the weights, as far as it is known."""
    files, dataset = {}, trainer.train_loader.dataset
    if isinstance(dataset, TokenDataset) and dataset.tokenizer is not None:
        files["tokenizer.json"] = dataset.tokenizer.to_str()
        # Without this, AutoTokenizer takes the class that the model's type suggests, which splits words its own way.
        tokenizer_class = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        files["tokenizer_config.json"] = json.dumps(tokenizer_class, indent=2)
    if isinstance(trainer.model, Transformer):
        files["config.json"] = json.dumps(trainer.model.transformers_config(len(dataset[0][0])), indent=2)
    elif to_json := getattr(getattr(trainer.model, "config", None), "to_json_string", None):
        files["config.json"] = to_json(use_diff=False)
    return files


def restore(trainer: Trainer, saved: dict[str, Any], where: Path) -> None:
    """Give every part its saved state; say where the run goes on and which settings have changed.

    Raises:
        CheckpointError: if a part is missing, unknown, or does not fit.
        ConfigError: if the place in the data has no meaning in this run.
    """
    expected = {f"{part}_state_dict" for part in trainer.state} | {"config", "versions"}
    if saved.keys() != expected:
        lacks, besides = sorted(expected - saved.keys()), sorted(saved.keys() - expected)
        raise CheckpointError(f"{where} does not fit this run: it lacks {lacks}, and has besides {besides}.")
    for part, holder in trainer.state.items():
        try:
            holder.load_state_dict(saved[f"{part}_state_dict"])
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise CheckpointError(f"{where}: its {part} does not fit this run: {error}") from error
    for group, lr in zip(trainer.optimizer.param_groups, trainer.scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
    trainer.say(f"resumed from {where} at step {trainer.global_step}")
    before, now = _flat(saved["config"]), _flat(dataclasses.asdict(trainer.run_config))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            trainer.say(f"changed since: {name} {before.get(name)!r} -> {now.get(name)!r}")


def resume(trainer: Trainer) -> None:
    """Restore what `config.resume` says, if anything.

    Raises:
        ConfigError: if it says 'never' and the checkpoint folder is in use.
        CheckpointError: if there are checkpoints but none can be restored.
    """
    manager, wanted = trainer.checkpoint_manager, trainer.config.resume
    if wanted not in ("auto", "never"):
        trainer.load_checkpoint(Path(wanted).expanduser())
    elif manager is not None and wanted == "never":
        if manager.checkpoint_dir.is_dir() and any(manager.checkpoint_dir.iterdir()):
            raise ConfigError(
                f"resume is 'never' and {manager.checkpoint_dir} holds a run already; choose another output_dir "
                "(or checkpoint_dir), or resume: auto to go on with it."
            )
    elif manager is not None:
        saved, path, passed_over = manager.load_latest()
        for reason in passed_over:
            trainer.say(f"passed over {reason}")
        if saved is not None and path is not None:
            restore(trainer, saved, path)
        elif passed_over:
            raise CheckpointError(
                f"none of the checkpoints in {manager.checkpoint_dir} is intact, and starting afresh among them "
                "would mix two runs; choose another output_dir, or move them away."
            )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} of nested settings."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
