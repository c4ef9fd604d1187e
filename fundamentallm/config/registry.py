"""Names in a config become objects: an entry of a plain dict, or `module:name` for code outside the package."""

import difflib
import importlib
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from fundamentallm.errors import ConfigError, Problem, raise_all

_PEERS = {
    "trackers": "log_with report_to",
    "model.d_model": "n_embd embed_dim hidden_size hidden_dim dim",
    "model.num_heads": "n_head n_heads num_attention_heads",
    "model.num_layers": "n_layer n_layers num_hidden_layers depth",
    "model.pretrained": "model_name model_name_or_path",
    "data.sequence_length": "block_size context_length max_length max_seq_len max_seq_length n_ctx n_positions seq_len",
    "data.source": "data_dir data_path dataset dataset_name train_data train_file",
    "training.activation_checkpointing": "gradient_checkpointing",
    "training.batch_size": "global_batch_size per_device_train_batch_size train_batch_size",
    "training.eval_at_start": "eval_on_start",
    "training.eval_max_samples": "limit_val_batches max_eval_samples",
    "training.eval_every_n_steps": "eval_interval eval_steps val_check_interval",
    "training.gradient_clip_norm": "clip_grad grad_clip gradient_clip_val max_grad_norm",
    "training.keep_last_n": "save_total_limit",
    "training.learning_rate": "lr max_lr",
    "training.log_every_n_steps": "log_interval logging_steps",
    "training.lr_scheduler": "lr_scheduler_type scheduler",
    "training.max_epochs": "epochs n_epochs num_epochs num_train_epochs",
    "training.max_steps": "iters max_iters num_steps num_train_steps steps",
    "training.micro_batch_size": "accumulate_grad_batches gradient_accumulation_steps",
    "training.mixed_precision": "bf16 dtype fp16 precision",
    "training.resume": "resume_from_checkpoint",
    "training.save_every_n_steps": "save_interval save_steps",
    "training.warmup_steps": "num_warmup_steps warmup warmup_iters warmup_ratio",
    "training.weight_decay": "wd",
}
PEERS = {name: setting for setting, names in _PEERS.items() for name in (*names.split(), setting.rpartition(".")[2])}
"""Settings by the names that other trainers have for them, and by their own, for one in a wrong section."""


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Returns "Did you mean ...?" with the nearest known name, or "" if none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else ""


def setting_meant(name: str, known: Collection[str]) -> str:
    """As `did_you_mean` for settings, or options with dashes: knows the names in other trainers and other sections."""
    word = name.removeprefix("--").rpartition(".")[2].replace("-", "_")
    if word not in PEERS:
        own = [option for option in known if option.rpartition(".")[2].removeprefix("--") == word]
        return did_you_mean(own[0] if own else name, known)
    note = " It counts the sequences of all devices." if PEERS[word] == "training.batch_size" else ""
    return f"Did you mean '{'--' if name.startswith('--') else ''}{PEERS[word]}'?{note}"


def not_one_of(setting: str, value: str, known: Collection[str], allowed: str = "", text: str = "") -> Problem:
    """Returns the problem with a value that is not one of the known, and names the nearest."""
    return Problem(setting, value, allowed or ", ".join(known), did_you_mean(value, known), text=text)


def unknown_name(setting: str, name: str, known: Collection[str]) -> list[Problem]:
    """Returns the problem with `name`, unless it is known or has the form `module:name`."""
    if name in known or ":" in name:
        return []
    allowed = ", ".join([*sorted(known), "or 'module:name'"]).removeprefix("or ")
    return [not_one_of(setting, name, known, allowed)]


def unknown_options(setting: str, name: str, options: Iterable[str], known: Collection[str]) -> list[Problem]:
    """Returns the problem with options that the thing called `name` does not have, if there are any."""
    unknown = sorted(set(options) - set(known))
    reason = f"and {name} has no {', '.join(unknown)}"
    return [Problem(setting, options, ", ".join(known) or "none", reason=reason)] if unknown else []


def set_names(sources: Iterable[str]) -> list[str]:
    """Returns the names of validation sets, as in val_NAME_loss, by their sources: the file or folder, without suffix.

    Other characters than letters, digits and _ become _. A name that is taken gets _2, _3 and so on.

    Examples:
        >>> set_names(["books/part-1.txt", "code/part-1.txt", "python-docs", "web/*.jsonl"])
        ['part_1', 'part_1_2', 'python_docs', 'web']
    """
    names: list[str] = []
    for source in sources:
        parts = [re.sub(r"\W+", "_", Path(part).stem) for part in reversed(Path(source).parts)]
        name = next((part for part in parts if part.strip("_")), "set")
        numbered = (name, *(f"{name}_{number}" for number in range(2, len(names) + 2)))
        names.append(next(each for each in numbered if each not in names))
    return names


def set_name_problems(setting: str, sets: Mapping[str, Any]) -> list[Problem]:
    """Returns what is wrong with the names of a mapping of validation sets."""
    if sets and all(isinstance(name, str) and set_names([name]) == [name] for name in sets):
        return []
    return [Problem(setting, [*sets], "at least one name, of letters, digits and _, such as 'books'")]


def resolve(setting: str, name: str, known: Mapping[str, Any]) -> Any:
    """Returns the entry of `known` called `name`, or what `module:name` imports. Raises ConfigError if it cannot."""
    raise_all(unknown_name(setting, name, known))
    if name in known:
        return known[name]
    module_name, _, attribute = name.partition(":")
    # A user's module is usually in the working directory, which `accelerate launch -m` leaves out of the path.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        advice = "Give 'module:name' of something that can be imported from the working directory."
        raise ConfigError(Problem(setting, name, "", advice, f"which cannot be imported ({error})")) from error
