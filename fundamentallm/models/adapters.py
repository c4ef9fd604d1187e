"""Adapters of peft: what checkpoints of a run that trains one hold, and how they are opened.

peft decides which weights belong to an adapter and how they are named, so whatever it saves can be trained here.
"""

import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fundamentallm.config.validation import LoraSettings, expand_user, from_dict
from fundamentallm.data.corpus import opened_note, touch_note
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import CheckpointError, ConfigError, Problem
from fundamentallm.models.transformers_format import (
    ADAPTER_CONFIG,
    Pretrained,
    find_pretrained,
    refusal,
    refuse_links,
    transformers_model,
)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
OPENED = {
    *("r", "lora_alpha", "lora_dropout", "bias", "lora_bias", "fan_in_fan_out", "use_rslora", "use_dora", "task_type"),
    *("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "trainable_token_indices"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights"),
}
"""Settings of an adapter_config.json that `open_adapter` uses. Others may name files to read or modules to import."""
DESCRIBING = {"peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"}
"""Settings of an adapter_config.json that change nothing in the adapter."""


class Adapter:
    """Names of the weights of a PeftModel's adapter, and a digest of its base model, as a part of a run's state.

    Make it before the model is sharded. Raises ConfigError if adapter_model.safetensors would not hold all that is
    trained.
    """

    def __init__(self, model: Any, group: HostGroup) -> None:
        from peft import get_peft_model_state_dict

        (active,), weights = model.active_adapters, model.state_dict()
        # Embeddings that are not trained are the base model's. To find out by itself, peft would ask the Hub.
        exported = get_peft_model_state_dict(model, weights, active, save_embedding_layers=False)
        first = {_address(tensor): name for name, tensor in reversed(weights.items())}
        addresses = {_address(tensor): name for name, tensor in exported.items() if _address(tensor) in first}
        self.names = {first[address]: name for address, name in addresses.items()}
        """{in the model: in adapter_model.safetensors}"""
        parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied weight has several names
        outside = [name for name, p in parameters.items() if p.requires_grad and _address(p) not in addresses]
        kind = getattr(model.peft_config[active].peft_type, "value", None)
        if outside or len(self.names) < len(exported) or kind == "ADALORA":  # whose callers step its ranks
            reason = f"and {ADAPTER_WEIGHTS} does not hold all that is trained {outside[:3]}"
            advice = "Name those modules in modules_to_save of the adapter's config, or use another type, such as LORA."
            raise ConfigError(Problem("model", f"an adapter of the type {kind}", advice=advice, reason=reason))
        self.saved = [name for name in weights if name not in parameters or _address(weights[name]) in addresses]
        self.model, self.base = model, group.from_main(lambda: _digest(model, {*self.saved}))
        self.config = _saved_config(model.peft_config[active], type(model.get_base_model()))

    def state_dict(self) -> dict[str, Any]:
        """Returns names and digest."""
        return {"names": self.names, "base": self.base}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Raises CheckpointError if the adapter was trained on other base weights. Earlier versions noted none."""
        if saved.get("base", self.base) != self.base:
            raise CheckpointError("it was trained on a base model with other weights; give the one that it began with.")

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights and buffers by their names in the model."""
        weights = self.model.state_dict()
        return {name: weights[name] for name in self.saved}

    def load_weights(self, saved: dict[str, Tensor]) -> None:
        """Restores them, and base weights, which earlier versions saved too. Raises CheckpointError if some lack."""
        missing, unknown = self.model.load_state_dict(saved, strict=False)
        if wrong := [*({*missing} & {*self.saved}), *unknown]:
            raise CheckpointError(f"{len(wrong)} weights are missing or not of this model, such as {min(wrong)}.")


def weight_parts(model: nn.Module, group: HostGroup, say: Callable[[str], None]) -> dict[str, Any]:
    """Returns the parts of a run's state that hold its weights: "model", and "adapter" if it trains one of peft's.

    The base model's folder is noted as this user's own, so that `open_adapter` may read it. Raises ConfigError as
    `Adapter` does, or if the model is not a PeftModel with one active adapter.
    """
    peft = sys.modules.get("peft")  # which made any adapter
    if peft is None or not hasattr(model, "peft_config"):
        return {"model": model}
    if not isinstance(model, peft.PeftModel) or len(model.active_adapters) != 1:
        allowed = "a PeftModel with one active adapter, as get_peft_model(model, config) of peft makes it"
        raise ConfigError(Problem("model", type(model).__name__, allowed))
    adapter = Adapter(model, group)
    base = json.loads(adapter.config)["base_model_name_or_path"]
    if not base:
        advice = "To open its checkpoints, save that model by save_pretrained and name its folder."
        say(f"warning: the adapter's base model came from no folder, so {ADAPTER_CONFIG} names none. {advice}")
    elif group.rank == 0 and os.path.isdir(base):
        touch_note(opened_note(base))
    part = SimpleNamespace(state_dict=adapter.weights, load_state_dict=adapter.load_weights)
    return {"adapter": adapter, "model": part}


def add_lora(model: nn.Module, settings: dict[str, Any], name: str, folder: Path) -> nn.Module:
    """Returns a transformers model with the adapter that `model.lora` describes, its weights drawn here.

    The model was read from `folder`, which the config calls `name`. Raises ConfigError if peft is not installed, or a
    target matches nothing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        advice = "Run: pip install 'fundamentallm[peft]'."
        raise ConfigError(Problem("model.lora", settings, advice=advice, reason="which needs peft")) from error
    lora, modules = from_dict(LoraSettings, settings), dict(model.named_modules())
    options = {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": lora.targets}
    config = LoraConfig(**options, task_type="CAUSAL_LM")
    targets = lora.targets if isinstance(lora.targets, list) else []
    try:
        # peft itself refuses targets only if none matches.
        if unknown := [each for each in targets if not any(f".{module}".endswith(f".{each}") for module in modules)]:
            raise ValueError(f"the model has no module {', '.join(unknown)}")
        adapted: Any = get_peft_model(model, config)
    except ValueError as error:  # or modules of another kind, or a model for which peft has no default
        linear = {each.rpartition(".")[2] for each, module in modules.items() if isinstance(module, nn.Linear)}
        allowed, reason = ", ".join(sorted(linear)), f"with which peft makes no adapter: {error}"
        raise ConfigError(Problem("model.lora.targets", lora.targets, allowed, reason=reason)) from error
    if folder.parent.name == "snapshots":  # of the Hugging Face cache, whose folders are revisions
        config.base_model_name_or_path, config.revision = name, folder.name
    return adapted  # type: ignore[no-any-return]


def open_adapter(folder: Path, base: str | Path | None) -> tuple[Any, Pretrained]:
    """Opens the LoRA adapter in a folder with its base model. Returns a PeftModel, and the base model's folder.

    The folder may come from a stranger. So only settings that read and import nothing are used, and the base model is
    the one given; otherwise a folder that a run of this user's trained adapters of, or a name in the local cache.
    Raises ConfigError if one of the two cannot be used, CheckpointError if a file is missing or the base is unknown.
    """
    import peft

    refuse = functools.partial(refusal, "checkpoint", str(folder))
    refuse_links(folder, refuse)
    saved, defaults = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")), peft.LoraConfig().to_dict()
    if saved.get("init_lora_weights") in ("gaussian", "orthogonal"):  # others may read files
        saved["init_lora_weights"] = True  # the weights are read all the same
    for setting in saved.keys() - (OPENED - {"init_lora_weights"}) - DESCRIBING:
        if saved[setting] and saved[setting] != defaults.get(setting):
            advice = "If you trust it, open it by PeftModel.from_pretrained of peft."
            raise refuse(f"whose {ADAPTER_CONFIG} has a {setting} of {saved[setting]!r}", advice)
    if not (folder / ADAPTER_WEIGHTS).is_file():  # peft would go on to a pickled file, or to the Hub
        raise CheckpointError(f"{folder}: {ADAPTER_WEIGHTS} is missing.")
    name, revision = str(saved.get("base_model_name_or_path") or ""), str(saved.get("revision"))
    is_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) and not os.path.lexists(expand_user(name))
    if base is None and not is_name and not (name and opened_note(name).exists()):
        advice = "Give the base model: --base FOLDER, in Python load_model(..., base=FOLDER)."
        raise CheckpointError(f"{folder}: its base model {name!r} is not known to be yours. {advice}")
    is_commit = base is None and re.fullmatch(r"[0-9a-f]{40}", revision)
    found = find_pretrained(name if base is None else str(base), "base", revision if is_commit else None)
    config = peft.LoraConfig(**{name: saved[name] for name in OPENED & saved.keys()})
    return peft.PeftModel.from_pretrained(transformers_model(found), str(folder), config=config), found


def _saved_config(config: Any, base: type) -> str:
    """Returns the content of adapter_config.json, as peft's save_pretrained writes it."""
    name = config.base_model_name_or_path
    path = os.path.abspath(name) if name and os.path.isdir(name) else name
    saved = config.to_dict() | {"base_model_name_or_path": path, "inference_mode": True}
    if config.task_type is None:
        saved["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
    return json.dumps(saved, indent=2, sort_keys=True, default=sorted)  # of sets


@torch.no_grad()
def _digest(model: nn.Module, left_out: set[str]) -> str:
    """Returns a digest of all weights that are not left out: of names, shapes, and sums of the bits of the values."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name not in left_out:
            # A sum of integers is the same on all devices, and weights in 16 bits equal their conversion to float32.
            bits = parameter.float().contiguous().view(torch.int32)
            digest.update(f"{name} {tuple(parameter.shape)} {int(bits.sum(dtype=torch.int64))}\n".encode())
    return digest.hexdigest()


def _address(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape
