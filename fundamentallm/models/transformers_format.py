"""Model folders in Hugging Face format: what our checkpoints are, and what other models are shared as.

Nothing is downloaded, no code that comes with a model is run, and no pickled weights are read.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import nn

from fundamentallm.config.schema import END_OF_TEXT, ModelConfig
from fundamentallm.config.validation import expand_user
from fundamentallm.data.datasets import Tokenized
from fundamentallm.data.streams import Stream
from fundamentallm.data.tokenizers import SPLIT, num_ids, with_unknown
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.models.transformer import Transformer

CONFIG, TOKENIZER, GENERATION = "config.json", "tokenizer.json", "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
INDEX, ADAPTER_CONFIG = "model.safetensors.index.json", "adapter_config.json"
KEPT = (
    *(TOKENIZER, GENERATION, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
"""Text files that checkpoints copy, so that they open with the same tokenizer and generation settings."""
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
SUPPORTED = {
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window"), False),
    **{"hidden_act": "silu", "attention_dropout": 0.0, "partial_rotary_factor": 1.0, "pretraining_tp": 1},
    **{"layer_types": "full_attention", "the type of its rotary positions": "default"},
}
"""Llama's and Qwen3's settings that our `Transformer` computes with one value only, which is also the default."""


class Pretrained(NamedTuple):
    """A model folder in Hugging Face format."""

    folder: Path
    config: dict[str, Any]  # the content of its config.json
    shape: ModelConfig | None  # of the `Transformer` that computes the same, or None if transformers has to
    why_not: str  # what our `Transformer` does not compute; empty if it computes the same
    weights: tuple[str, ...]  # names of the files with the weights

    def __str__(self) -> str:
        how = "as a Transformer" if self.shape is not None else f"trained through transformers, since {self.why_not}"
        return f"a {self.config.get('model_type')} model, {how}"

    @property
    def context(self) -> int | None:
        """Maximum number of tokens that the model sees at once, or None if the config states none."""
        return self.config.get("max_position_embeddings", self.config.get("n_positions"))

    @property
    def stop(self) -> frozenset[int]:
        """Tokens that end a text."""
        generation, saved = self.folder / GENERATION, self.config
        if generation.is_file():
            saved = saved | json.loads(generation.read_text(encoding="utf-8"))
        return _stops(saved)

    def files(self, dataset: Any) -> dict[str, str]:
        """Returns the text files, by name, that checkpoints get if this model is trained on a `Tokenized`."""
        paths = [self.folder / name for name in KEPT]
        texts = {path.name: path.read_text(encoding="utf-8") for path in paths if path.is_file()}
        tokenizer, end = dataset.tokenizer, dataset.end_of_text
        eos, special = _eos(self.stop, end), {SPLIT: tokenizer.encode_special_tokens}
        if end is not None:
            special["eos_token"] = tokenizer.id_to_token(end)
        changes = {GENERATION: eos, TOKENIZER_CONFIG: special}
        if self.shape is not None:  # a transformers model writes its own config.json
            texts[CONFIG] = json.dumps({key: value for key, value in self.config.items() if key != "torch_dtype"})
            longest = max(self.context or 0, dataset.sequence_length)
            changes[CONFIG] = eos | {"dtype": "float32", "max_position_embeddings": longest}
        for name in texts.keys() & changes.keys():
            texts[name] = json.dumps(json.loads(texts[name]) | changes[name], indent=2)
        return texts


def _stops(saved: dict[str, Any]) -> frozenset[int]:
    eos = saved.get("eos_token_id")
    return frozenset(token for token in (eos if isinstance(eos, list) else [eos]) if token is not None)


def _eos(stops: Collection[int], end_of_text: int | None) -> dict[str, Any]:
    """Returns the `eos_token_id` of a config with the end-of-text token first; nothing if it is the same."""
    return {} if end_of_text is None or end_of_text in stops else {"eos_token_id": [end_of_text, *sorted(stops)]}


def find_pretrained(name: str, setting: str = "model.pretrained", revision: str | None = None) -> Pretrained:
    """Find the folder `name`, or what the local Hugging Face cache holds under that name, of a `revision` of it.

    Call it in `explained`: its files may hold anything. Raises ConfigError that names the `setting` if there is none,
    or it cannot be used without running, unpickling or downloading anything.
    """
    refuse = functools.partial(refusal, setting, name)
    folder = Path(expand_user(name))
    if not os.path.isdir(folder):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError) as error:
            reason = "which is neither a folder nor in the local Hugging Face cache"
            raise refuse(reason, f"Nothing is downloaded during a run: first run `hf download {name}`.") from error
    refuse_links(folder, refuse)
    if (folder / ADAPTER_CONFIG).exists():  # transformers would open the folder that it names
        advice = f"Merge it into its model: fundamentallm checkpoints consolidate {name} OUT --merge."
        raise refuse("which holds an adapter", advice)
    if not (folder / CONFIG).is_file():
        raise refuse(f"which has no {CONFIG}", allowed="a model folder in Hugging Face format")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise refuse("whose weights are quantized", "Give the model before quantization.")
    weights = {path.name for path in folder.glob("*.safetensors") if WEIGHTS.fullmatch(path.name)}
    if "model.safetensors" in weights:  # transformers prefers it too
        weights = {"model.safetensors"}
    elif (folder / INDEX).is_file():  # without it a missing file would go unnoticed
        weights = {*json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()}
    if missing := [file for file in weights if os.path.basename(file) != file or not (folder / file).is_file()]:
        raise refuse(f"which lacks {', '.join(missing)}", "Copy the folder again.")
    if not weights:
        advice = "If you trust pickled ones, convert them by save_pretrained of transformers."
        raise refuse("which has no weights as safetensors", advice)
    found = Pretrained(folder, config, *shape_of(config), tuple(sorted(weights)))
    sizes = found.context or 1, config.get("vocab_size") or 1
    if not all(type(number) is int for number in (*found.stop, *sizes)) or min(sizes) < 1:
        raise refuse("whose context, vocabulary size or end-of-text token is not a whole number")
    return found


def refusal(setting: str, name: str, reason: str, advice: str = "", allowed: str = "") -> ConfigError:
    """Returns the error for a folder `name` that cannot be used."""
    return ConfigError(Problem(setting, name, allowed, advice, reason))


def refuse_links(folder: Path, refuse: Callable[..., ConfigError]) -> None:
    """Refuse symbolic links out of the folder: what they name would get into the checkpoints of a run."""
    root = Path(os.path.realpath(folder))
    if root.parent.name == "snapshots":  # of the Hugging Face cache, whose files are links to its own blobs
        root = root.parent.parent
    for path in folder.iterdir():
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
            reason = f"whose {path.name} is a symbolic link that leaves the folder"
            raise refuse(reason, "If you trust it, copy the file into the folder.")


def shape_of(saved: dict[str, Any]) -> tuple[ModelConfig | None, str]:
    """Returns the shape of the `Transformer` that computes the same as this config.json, or None and why not."""
    kind = saved.get("model_type")
    if kind not in ("qwen3", "llama"):
        return None, f"its type is {kind!r}, and the Transformer's are 'qwen3' and 'llama'"
    rope = saved.get("rope_scaling") or saved.get("rope_parameters") or {}  # as transformers
    head_dim = saved.get("hidden_size", 0) // max(saved.get("num_attention_heads", 1), 1)
    others = {*(saved.get("layer_types") or ())} - {"full_attention"}
    values = saved | {
        "head_dim": saved.get("head_dim", 128 if kind == "qwen3" else None) or head_dim,  # 128 is Qwen3's default
        "layer_types": ", ".join(sorted(others)) or "full_attention",
        "the type of its rotary positions": rope.get("rope_type", rope.get("type", "default")),
    }
    for name, allowed in {**SUPPORTED, "head_dim": head_dim}.items():
        if values.get(name, allowed) != allowed:
            return None, f"{name} is {values[name]!r}, and the Transformer's {allowed!r}"
    try:
        return ModelConfig(
            vocab_size=saved["vocab_size"],
            d_model=saved["hidden_size"],
            num_heads=saved["num_attention_heads"],
            num_kv_heads=saved.get("num_key_value_heads") or saved["num_attention_heads"],
            num_layers=saved["num_hidden_layers"],
            d_ff=saved["intermediate_size"],
            tie_embeddings=saved.get("tie_word_embeddings", False),
            rope_theta=float(rope.get("rope_theta", saved.get("rope_theta", ModelConfig.rope_theta))),
            norm_epsilon=saved.get("rms_norm_eps", ModelConfig.norm_epsilon),
            qk_norm=kind == "qwen3",
        ), ""
    except KeyError as error:
        return None, f"its {CONFIG} lacks {error}"


def transformers_model(pretrained: Pretrained) -> nn.Module:
    """Open the model by transformers, with its weights in float32. Raises ConfigError if it cannot."""
    refuse = functools.partial(refusal, "model.pretrained", str(pretrained.folder))
    try:
        import transformers
    except ImportError as error:
        advice = "Run: pip install 'fundamentallm[hf]'."
        raise refuse(f"which needs transformers, since {pretrained.why_not}", advice) from error
    named = pretrained.config.get("architectures") or []
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named):
        raise refuse(f"with {' '.join(named) or 'no known architecture'}", allowed="a causal language model")
    safely = {"trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
    make: Any = transformers.AutoModelForCausalLM.from_pretrained
    try:
        model, found = make(pretrained.folder, output_loading_info=True, dtype=torch.float32, **safely)
    except Exception as error:  # a stranger's config.json may hold anything
        raise refuse(f"which transformers cannot open: {error}") from error
    if lacking := sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}):
        reason = f"which lacks weights of {len(lacking)} tensors, such as {lacking[0]}, or has them in other shapes"
        raise refuse(reason, "transformers would initialise them at random. Give a folder that has all of them.")
    return model  # type: ignore[no-any-return]


def model_files(model: nn.Module, dataset: Any, parts: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Returns the text files, by name, that transformers needs beside the weights, as far as they are known.

    `parts` are those of `weight_parts`: the checkpoint of an adapter is not a model by itself.
    """
    files: dict[str, str] = {}
    source = dataset.dataset if isinstance(dataset, Stream) else dataset
    ours, end_of_text = source if isinstance(source, Tokenized) else None, None
    if ours is not None and ours.tokenizer is not None:
        end_of_text = ours.tokenizer.token_to_id(END_OF_TEXT) if ours.end_of_text is None else ours.end_of_text
        files[TOKENIZER] = ours.tokenizer.to_str()
        files[TOKENIZER_CONFIG] = json.dumps(_tokenizer_config(ours, ours.tokenizer, end_of_text), indent=2)
    if parts and "adapter" in parts:
        files[ADAPTER_CONFIG] = parts["adapter"].config
    elif isinstance(model, Transformer):
        length = len(dataset[0][0]) if ours is None else ours.sequence_length
        files[CONFIG] = json.dumps(model.transformers_config(length, end_of_text), indent=2)
    elif to_json := getattr(getattr(model, "config", None), "to_json_string", None):
        config = json.loads(to_json(use_diff=False))
        about = {"architectures": [type(model).__name__], "dtype": "float32"} | _eos(_stops(config), end_of_text)
        files[CONFIG] = json.dumps(config | about, indent=2)
    return files


def _tokenizer_config(dataset: Tokenized, tokenizer: Tokenizer, end_of_text: int | None) -> dict[str, Any]:
    # Without a class, AutoTokenizer chooses one by the model's type, which splits words in its own way.
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    found |= {SPLIT: tokenizer.encode_special_tokens, "model_max_length": dataset.sequence_length}
    if end_of_text is not None:  # as in GPT-2: it precedes each document too, and stands in for tokens that are missing
        names = ("eos_token", "bos_token", "pad_token", "unk_token")
        found |= dict.fromkeys(names, tokenizer.id_to_token(end_of_text))
    _, unknown = with_unknown(tokenizer)
    if unknown is not None and unknown < num_ids(tokenizer):
        found["unk_token"] = tokenizer.id_to_token(unknown)
        found.setdefault("pad_token", found["unk_token"])
    return found
