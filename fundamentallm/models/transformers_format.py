"""Folders in transformers' format: what a checkpoint of ours is, and what others share their models as.

Nothing is downloaded, no code that comes with a model is run, and no pickled weights are read.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fundamentallm.config.schema import END_OF_TEXT, ModelConfig
from fundamentallm.config.validation import expand_user
from fundamentallm.data.datasets import TokenSamples
from fundamentallm.errors import ConfigError
from fundamentallm.models.transformer import Transformer

if TYPE_CHECKING:
    from torch import nn
if TYPE_CHECKING:
    pass

CONFIG, TOKENIZER, GENERATION, INDEX = (
    "config.json",
    "tokenizer.json",
    "generation_config.json",
    "model.safetensors.index.json",
)
KEPT = (
    *(TOKENIZER, GENERATION, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
"""Text files that a checkpoint hands on, so that it opens with the same tokenizer and the same way of generating."""
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "d_ff",
}
SAME = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,),
}
"""What the `Transformer` computes, by the names of Llama's and Qwen3's settings; where they are not there, it is so."""


class Pretrained(NamedTuple):
    """A folder in transformers' format."""

    folder: Path
    config: dict[str, Any]
    """Its config.json."""
    shape: ModelConfig | None
    """Of our `Transformer` that computes the same; None: transformers has to."""
    why_not: str
    """What our `Transformer` does not compute; empty where it computes the same."""
    weights: tuple[str, ...]
    """Names of the files that hold the weights."""

    def __str__(self) -> str:
        how = f"trained as transformers makes it, since {self.why_not}" if self.shape is None else "as a Transformer"
        return f"a {self.config.get('model_type')} model, {how}"

    @property
    def context(self) -> int | None:
        """Most tokens that the model sees at once; None: it does not say, and has no limit as far as it says."""
        return next(
            (self.config[key] for key in ("max_position_embeddings", "n_positions") if key in self.config), None
        )

    @property
    def stop(self) -> frozenset[int]:
        """Tokens that end a text."""
        files = (self._json(GENERATION) or {}), self.config
        ids: Any = next((file["eos_token_id"] for file in files if file.get("eos_token_id") is not None), [])
        return frozenset(ids if isinstance(ids, list) else [ids])

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding table; None: the config does not say."""
        return self.config.get("vocab_size")

    def files(self, sequence_length: int) -> dict[str, str]:
        """The text files that a checkpoint of this model's training hands on, by name."""
        found = {name: self.folder / name for name in KEPT if (self.folder / name).is_file()}
        texts = {name: path.read_text(encoding="utf-8") for name, path in found.items()}
        if self.shape is not None:  # a transformers model writes its own
            config = {key: value for key, value in self.config.items() if key != "torch_dtype"}
            longest = max(self.context or 0, sequence_length)
            texts[CONFIG] = json.dumps(config | {"dtype": "float32", "max_position_embeddings": longest}, indent=2)
        return texts

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return _read_json(path) if path.is_file() else None


def find_pretrained(name: str, setting: str = "model.pretrained") -> Pretrained:
    """The folder `name`; or, where there is none, what the local Hugging Face cache holds under that name.

    Args:
        name: of the folder.
        setting: what said so, for errors.

    Raises:
        ConfigError: if there is neither, or what is there cannot be used without running, unpickling or downloading
            anything.
    """
    given = f"{setting} is {name!r}"
    folder = _folder(name, given)
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{given}, which has no {CONFIG}; give a folder in transformers' format.")
    config = _read_json(folder / CONFIG)
    if "quantization_config" in config:
        raise ConfigError(f"{given}, whose weights are quantized; give the ones it was made from.")
    weights = sorted(path.name for path in folder.glob("*.safetensors") if WEIGHTS.fullmatch(path.name))
    if (folder / INDEX).is_file():  # else a file that is not there would not be missed
        indexed = _read_json(folder / INDEX).get("weight_map")
        weights = sorted(set(indexed.values())) if isinstance(indexed, dict) else weights
    if "model.safetensors" in weights:  # which transformers takes too, whatever else there is
        weights = ["model.safetensors"]
    if missing := [file for file in weights if not (folder / file).is_file()]:
        raise ConfigError(f"{given}, which lacks {', '.join(missing)}; copy the folder anew.")
    if not weights:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        why = (
            f"{', '.join(pickled)} is pickled, and opening it may run whatever its author put in it; convert it, where "
            "you trust it, by from_pretrained(...).save_pretrained(...) of transformers"
            if pickled
            else "give a folder with model.safetensors"
        )
        raise ConfigError(f"{given}, which has no weights as safetensors: {why}.")
    try:
        return Pretrained(folder, config, shape_of(config), "", tuple(weights))
    except ConfigError as error:
        return Pretrained(folder, config, None, str(error), tuple(weights))


def _folder(name: str, given: str) -> Path:
    folder = Path(expand_user(name))
    if os.path.isdir(folder):
        return folder
    if os.path.lexists(folder) or folder.is_absolute() or name.startswith((".", "~")):
        raise ConfigError(f"{given}, which is no folder; give one in transformers' format.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"{given}, which is no folder, nor in the local Hugging Face cache, and nothing is downloaded here; get it "
            f"beforehand: hf download {name}."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}; allowed: a mapping.")
    return value


def shape_of(saved: dict[str, Any]) -> ModelConfig:
    """The shape of the `Transformer` that computes the same as transformers does by this config.json.

    Raises:
        ConfigError: if there is none, saying why.
    """
    if saved.get("model_type") not in ("qwen3", "llama"):
        raise ConfigError(f"its type is {saved.get('model_type')!r}, and the Transformer's are 'qwen3' and 'llama'")
    if lacking := [name for name in REQUIRED if name not in saved]:
        raise ConfigError(f"its {CONFIG} lacks {', '.join(lacking)}")
    rope = saved.get("rope_parameters") or saved.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    head_dim = saved["hidden_size"] // max(saved["num_attention_heads"], 1)
    wanted = SAME | {"head_dim": (head_dim, None), "pretraining_tp": (1,)}
    problems = [
        f"its {name} is {saved[name]!r}, and the Transformer's {allowed[0]!r}"
        for name, allowed in wanted.items()
        if name in saved and saved[name] not in allowed
    ]
    if saved["model_type"] == "qwen3" and "head_dim" not in saved and head_dim != 128:
        problems.append(f"its head_dim is 128, as Qwen3's where nothing is said, and the Transformer's {head_dim}")
    if kind != "default":
        problems.append(f"its rotary positions are of the type {kind!r}, and the Transformer's 'default'")
    if set(saved.get("layer_types") or []) - {"full_attention"}:
        problems.append("its layer_types has others than 'full_attention', which all of the Transformer's are")
    if problems:
        raise ConfigError("; ".join(problems))
    return ModelConfig(
        **{ours: saved[theirs] for theirs, ours in REQUIRED.items()},
        num_kv_heads=saved.get("num_key_value_heads") or saved["num_attention_heads"],
        tie_embeddings=saved.get("tie_word_embeddings", False),
        rope_theta=float(rope.get("rope_theta", saved.get("rope_theta", ModelConfig.rope_theta))),
        norm_epsilon=saved.get("rms_norm_eps", ModelConfig.norm_epsilon),
        qk_norm=saved["model_type"] == "qwen3",
    )


def transformers_model(pretrained: Pretrained) -> nn.Module:
    """The model as transformers makes it, with its weights in float32.

    Raises:
        ConfigError: if transformers is not there, does not know the model, or the weights are not all there.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"{pretrained.folder} needs transformers, which is not installed, since {pretrained.why_not}; pip install "
            "'fundamentallm[hf]'."
        ) from error
    named = pretrained.config.get("architectures") or []
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named):
        raise ConfigError(
            f"{pretrained.folder} holds {' '.join(named) or 'no known architecture'}; allowed: a causal language model."
        )
    options = {"trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
    make: Any = transformers.AutoModelForCausalLM.from_pretrained
    model: nn.Module
    try:
        model, found = make(pretrained.folder, dtype=torch.float32, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ConfigError(f"transformers cannot open {pretrained.folder}: {error}") from error
    if lacking := sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}):
        raise ConfigError(
            f"{pretrained.folder} has no weights that fit for {len(lacking)} tensors, such as {lacking[0]}, which "
            "transformers would draw at random; give a folder that has all of them."
        )
    return model


def model_files(model: nn.Module, dataset: Any) -> dict[str, str]:
    """What transformers needs beside the weights, as far as it is known."""
    files, end_of_text = {}, None
    ours = dataset if isinstance(dataset, TokenSamples) else None
    if ours is not None and ours.tokenizer is not None:
        end_of_text = ours.tokenizer.token_to_id(END_OF_TEXT) if ours.end_of_text is None else ours.end_of_text
        files["tokenizer.json"] = ours.tokenizer.to_str()
        # Without this, AutoTokenizer takes the class that the model's type suggests, which splits words its own way.
        tokenizer_class = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        files["tokenizer_config.json"] = json.dumps(tokenizer_class, indent=2)
    if isinstance(model, Transformer):
        length = len(dataset[0][0]) if ours is None else ours.sequence_length
        files["config.json"] = json.dumps(model.transformers_config(length, end_of_text), indent=2)
    elif to_json := getattr(getattr(model, "config", None), "to_json_string", None):
        about = {"architectures": [type(model).__name__], "dtype": "float32"}
        files["config.json"] = json.dumps(json.loads(to_json(use_diff=False)) | about, indent=2)
    return files
