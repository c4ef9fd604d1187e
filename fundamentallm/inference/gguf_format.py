"""Writes a trained model as a GGUF file. Refuses it if llama.cpp would compute or tokenize something else."""

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from fundamentallm.data.chat import TEMPLATE, TOKENIZER_CONFIG
from fundamentallm.inference.loading import LoadedModel
from fundamentallm.models.transformer import Transformer
from fundamentallm.models.transformers_format import refusal, shape_of

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CONVERTER = "llama.cpp's convert_hf_to_gguf.py converts more models and published tokenizers."
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
WORDS += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt-2": [LEVEL | {"use_regex": True}],
    "qwen2": [SPLIT | {"pattern": {"Regex": WORDS % ""}}, LEVEL],
    "llama-bpe": [SPLIT | {"pattern": {"Regex": WORDS % "{1,3}"}}, LEVEL],
}
"""How a tokenizer.json splits a text into words, by llama.cpp's name for it."""


def write_gguf(path: Path, loaded: LoadedModel, name: str, dtype: str) -> str:
    """Write a model with its tokenizer to `path`, and return what it is, for the user. Vectors are always float32.

    Raises ConfigError if llama.cpp would not compute the same, or the package gguf is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise refusal("--format", "gguf", "which needs gguf", "Run: pip install 'fundamentallm[gguf]'.") from error
    refuse = functools.partial(refusal, "checkpoint", str(loaded.folder))
    model: Any = loaded.model
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    if isinstance(model, Transformer):
        saved = model.transformers_config(loaded.context or 0)
    else:
        saved = json.loads(model.config.to_json_string(use_diff=False))
    kind, irrelevant = str(saved["model_type"]), {"head_dim": None, "attention_dropout": 0.0}
    shape, why_not = shape_of(saved | irrelevant)
    if shape is None or not loaded.context:
        raise refuse(f"which cannot be exported, since {why_not or 'it states no context'}", CONVERTER)
    weights: dict[str, Tensor] = model.state_dict()
    if shape.tie_embeddings:  # llama.cpp projects by the embeddings if there is no other table
        weights.pop("lm_head.weight", None)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
    head_dim = len(weights["model.layers.0.self_attn.q_proj.weight"]) // shape.num_heads
    sizes: dict[str, Any] = {"context_length": loaded.context, "vocab_size": shape.vocab_size}
    sizes |= {"embedding_length": shape.d_model, "feed_forward_length": shape.d_ff, "block_count": shape.num_layers}
    sizes |= {"head_count": shape.num_heads, "head_count_kv": shape.num_kv_heads, "key_length": head_dim}
    sizes |= {"value_length": head_dim, "rope_freq_base": shape.rope_theta, "layer_norm_rms_eps": shape.norm_epsilon}
    for key, value in sizes.items():
        getattr(writer, f"add_{key}")(value)
    end = _add_tokenizer(writer, loaded, len(weights["model.embed_tokens.weight"]), refuse)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], shape.num_layers)
    heads: dict[str, Any] = {"q_proj": shape.num_heads, "k_proj": shape.num_kv_heads} if kind == "llama" else {}
    for key, weight in weights.items():
        stored, module = "f32" if weight.ndim == 1 else dtype, key.split(".")[-2]
        weight = weight.to("cpu", DTYPES[stored])
        if not weight.isfinite().all():
            raise refuse(f"whose {key} has values that are not finite as {dtype}", "f32 and bf16 hold the largest.")
        if module in heads:  # whose rotary positions pair neighbours, and ours the two halves of a head
            weight = weight.view(heads[module], 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        named, raw = str(names.get_name(key, (".weight",))), gguf.GGMLQuantizationType[stored.upper()]
        writer.add_tensor(named, weight.contiguous().view(torch.uint8).numpy(), raw_dtype=raw)
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return f"{kind}, {dtype}, {end}"


def _split_name(saved: dict[str, Any]) -> str | None:
    """Returns llama.cpp's name for how a tokenizer.json splits a text; None if it has none, or it is not known here."""
    model, first = saved["model"], saved["pre_tokenizer"] or {}
    steps = [{key: step[key] for key in step.keys() - {"trim_offsets"}} for step in first.get("pretokenizers", [first])]
    name = next((name for name, known in SPLITS.items() if known == steps), None)
    is_plain = not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    has_bytes = model["type"] == "BPE" and model["vocab"].keys() >= {*pre_tokenizers.ByteLevel.alphabet()}
    # llama.cpp does not compose characters (NFC), not for the published Qwen2 tokenizer either.
    is_plain &= saved["normalizer"] in (None, {"type": "NFC"} if name == "qwen2" else None)
    is_plain &= model.get("ignore_merges", False) == (name == "llama-bpe")
    is_plain &= not any(each[key] for each in saved["added_tokens"] for key in ("single_word", "lstrip", "rstrip"))
    return name if is_plain and has_bytes else None


def _add_tokenizer(writer: Any, loaded: LoadedModel, rows: int, refuse: Callable[..., Exception]) -> str:
    """Add the tokenizer of a model with so many rows of embeddings. Returns how texts end, for the user."""
    from gguf import TokenType

    tokenizer, saved = loaded.tokenizer, json.loads(loaded.tokenizer.to_str())
    if saved["model"].get("merges") == []:
        advice = "Train a model with another data.tokenizer, such as 'bpe:4096'."
        raise refuse("whose tokenizer ('char' or 'byte') has no merges, which llama.cpp needs", advice)
    if (split := _split_name(saved)) is None:
        raise refuse("whose tokenizer.json llama.cpp may read differently", CONVERTER, ", ".join(SPLITS))
    path, chat = loaded.folder / TOKENIZER_CONFIG, loaded.folder / TEMPLATE
    about = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if template := chat.read_text("utf-8") if chat.is_file() else about.get("chat_template"):
        writer.add_chat_template(template)
    given = [about.get(key) for key in ("bos_token", "eos_token")]
    bos, eos = (tokenizer.token_to_id(str(each["content"] if isinstance(each, dict) else each)) for each in given)
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    types = dict.fromkeys(names, TokenType.NORMAL)
    for index, added in tokenizer.get_added_tokens_decoder().items():
        types[index] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(rows)])
    writer.add_token_types([types.get(index, TokenType.UNUSED) for index in range(rows)])
    writer.add_token_merges([" ".join(pair) for pair in saved["model"]["merges"]])
    ends = sorted(loaded.stop & names.keys() & {*range(rows)}, key=lambda token: (token != eos, token))
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    if len(ends) > len(adders):
        raise refuse(f"which has {len(ends)} tokens that end a text", CONVERTER, f"at most {len(adders)}")
    # Without a token, llama.cpp takes token 11 for it. A vocabulary that has none gets a byte that UTF-8 never has.
    ids = ends or [saved["model"]["vocab"][chr(0xFF)]]
    for add, token in zip(adders, ids, strict=False):
        add(token)
    writer.add_bos_token_id(ids[0] if bos is None else bos)
    writer.add_add_bos_token(False)  # as `generate`
    return f"ends at {' or '.join(names[token] for token in ends)}" if ends else "without an end-of-text token"
