"""Names in a config become objects: an entry of a plain dict, or `module:name` for code outside the package."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fundamentallm.errors import ConfigError, Problem

_PEERS = {
    "output_dir": "out_dir save_dir run_dir log_dir",
    "trackers": "report_to logger",
    "model.d_model": "n_embd embed_dim embedding_dim hidden_size hidden_dim dim",
    "model.d_ff": "intermediate_size ffn_dim",
    "model.num_heads": "n_head n_heads num_attention_heads",
    "model.num_kv_heads": "n_kv_head n_kv_heads num_key_value_heads n_query_groups",
    "model.num_layers": "n_layer n_layers num_hidden_layers depth",
    "model.pretrained": "model_name model_name_or_path base_model checkpoint",
    "model.tie_embeddings": "tie_word_embeddings",
    "data.num_workers": "dataloader_num_workers",
    "data.sequence_length": "block_size context_length max_length max_seq_len max_seq_length n_ctx n_positions seq_len",
    "data.source": "data_path data_dir dataset dataset_name train_data train_file",
    "training.activation_checkpointing": "gradient_checkpointing",
    "training.adam_beta1": "beta1 betas",
    "training.adam_beta2": "beta2",
    "training.adam_epsilon": "adam_eps eps epsilon",
    "training.batch_size": "bs global_batch_size per_device_train_batch_size train_batch_size",
    "training.compile": "torch_compile",
    "training.eval_every_n_steps": "eval_every eval_interval eval_steps val_check_interval",
    "training.gradient_clip_norm": "clip_grad clip_norm grad_clip gradient_clip_val max_grad_norm",
    "training.keep_last_n": "save_top_k save_total_limit",
    "training.learning_rate": "base_lr lr max_lr peak_lr",
    "training.log_every_n_steps": "log_every log_interval logging_steps",
    "training.lr_scheduler": "lr_schedule lr_scheduler_type scheduler",
    "training.max_epochs": "epochs n_epochs num_epochs num_train_epochs",
    "training.max_steps": "iters max_iters n_steps num_iterations num_steps num_train_steps steps total_steps",
    "training.micro_batch_size": "accumulate_grad_batches device_batch_size grad_accum gradient_accumulation_steps",
    "training.min_lr_ratio": "end_lr min_lr",
    "training.mixed_precision": "amp bf16 dtype fp16 precision",
    "training.optimizer": "opt optim",
    "training.resume": "ckpt_path resume_from resume_from_checkpoint",
    "training.save_every_n_steps": "checkpoint_every checkpoint_interval save_interval save_steps",
    "training.warmup_steps": "lr_warmup_steps num_warmup_steps warmup warmup_iters warmup_ratio",
    "training.weight_decay": "wd",
}
"""The settings by the names that other trainers have for them."""
PEERS = {name: setting for setting, names in _PEERS.items() for name in (*names.split(), setting.rpartition(".")[2])}


def setting_meant(name: str, known: Iterable[str]) -> str:
    """Returns "Did you mean ...?" with the setting that other trainers, or another section, call `name`, or a near one.

    `name` is an unknown setting, or an unknown option with its dashes.
    """
    word = name.removeprefix("--").rpartition(".")[2].replace("-", "_")
    if word not in PEERS:
        return did_you_mean(name, known)
    note = " It counts the sequences of all devices." if PEERS[word] == "training.batch_size" else ""
    return did_you_mean(PEERS[word], [PEERS[word]]).replace("'", "'--" if name.startswith("--") else "'", 1) + note


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "Did you mean ...?" with the nearest known name, or "" if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""


def not_one_of(setting: str, value: str, known: Iterable[str], allowed: str = "", text: str = "") -> Problem:
    """Returns the problem with a value that is not one of the known, and names the nearest."""
    known = list(known)
    return Problem(setting, value, allowed or ", ".join(known), did_you_mean(value, known), text=text)


def unknown_name(setting: str, name: str, known: Iterable[str]) -> Problem | None:
    """Returns the problem with `name`, or None if it is known or has the form `module:name`."""
    known = sorted(known)
    if name in known or ":" in name:
        return None
    return not_one_of(setting, name, known, ", ".join([*known, "or 'module:name'"]) if known else "'module:name'")


def resolve(setting: str, name: str, known: Mapping[str, Any]) -> Any:
    """Returns the entry of `known` called `name`, or the object that `module:name` imports.

    Raises:
        ConfigError: if the name is not known, or the module or its attribute cannot be imported.
    """
    if problem := unknown_name(setting, name, known):
        raise ConfigError(problem)
    if name in known:
        return known[name]
    module_name, _, attribute = name.partition(":")
    # A user's module usually lies in the working directory, which `accelerate launch -m` and console scripts leave
    # out of the path.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        advice = "Give 'module:name' of something that can be imported from the working directory."
        raise ConfigError(Problem(setting, name, "", advice, f"which cannot be imported ({error})")) from error
