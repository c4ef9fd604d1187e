"""The decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases.

Parameter names and arithmetic are those of transformers' Qwen3 (with `qk_norm`) and Llama (without), so a
checkpoint opens there as it is. Shapes: B sequences, T tokens, D = d_model, H heads of F = D / H features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fundamentallm.config import ModelConfig
from fundamentallm.errors import ConfigError

NORM_EPSILON = 1e-6
INITIAL_STD = 0.02
"""Standard deviation of initial weights (GPT-2)."""


def rotary_table(length: int, features: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each (length, features / 2), in float32.

    Position t turns pair i by the angle t * theta^(-2i / features) (RoFormer, arXiv:2104.09864).
    """
    frequencies = theta ** (-torch.arange(0, features, 2, device=device, dtype=torch.float32) / features)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the feature pairs (i, i + F/2) of x (B, H, T, F) by their position's angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


def document_mask(input_ids: Tensor, document_start: int, dtype: torch.dtype) -> Tensor:
    """What to add to attention scores (B, 1, T, T), so that each position of `input_ids` (B, T) attends to those before
    it in its document only.

    Known from the tokens, so that batches need not carry it. Rotary positions need no reset: only their differences
    count. In the scores' precision, since attention would turn booleans into that, and keep it, in every block.
    """
    document = (input_ids == document_start).cumsum(1)
    allowed = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, float("-inf"))


class Attention(nn.Module):
    """Causal self-attention in which several query heads may share a key and value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_kv_heads is not None
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_size = config.d_model // config.num_heads
        self.dropout = config.dropout
        self.q_proj = nn.Linear(config.d_model, self.num_heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(config.d_model, self.num_kv_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(config.d_model, self.num_kv_heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_size, config.d_model, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_size, eps=NORM_EPSILON)
            self.k_norm = nn.RMSNorm(self.head_size, eps=NORM_EPSILON)
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, T, D) over positions, all before each or as `mask` (B, 1, T, T) says; (B, T, D)."""
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.num_heads, self.head_size)
        k = self.k_proj(x).view(b, t, self.num_kv_heads, self.head_size)
        v = self.v_proj(x).view(b, t, self.num_kv_heads, self.head_size)
        if self.qk_norm:
            # In the weights' precision: mixed with autocast's, torch leaves its fused kernel.
            q, k = (norm(x.to(norm.weight.dtype)) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (B, H, T, F)
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin),
            rotate(k, cos, sin),
            v,
            mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.d_ff is not None
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D), each position by itself."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.d_model, eps=NORM_EPSILON)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.d_model, eps=NORM_EPSILON)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))  # type: ignore[no-any-return]


class Head(nn.Linear):
    """Output projection, without a bias: to logits, or straight to what is made of them."""

    def forward(self, x: Tensor, of_hidden: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Logits (B, T, V) of x (B, T, D); or `of_hidden` of x and the weights (V, D), which makes a chunk at a time.

        Within this call, since only here FSDP2 has the weights whole.
        """
        return super().forward(x) if of_hidden is None else of_hidden(x, self.weight)


class Transformer(nn.Module):
    """A decoder-only language model.

    Args:
        config: its shape; `vocab_size` must be set.
        document_start: a token before which nothing is attended to, by it or by what comes after it: the end-of-text
            token, which thus begins the next document and tells nothing of the last; None: all is attended to.

    Raises:
        ConfigError: if `vocab_size` is not set.
    """

    # transformers' names for what is not to be split, and for where the norm before the head is to be found.
    _no_split_modules = ("Block",)
    base_model_prefix = "model"

    def __init__(self, config: ModelConfig, document_start: int | None = None) -> None:
        super().__init__()
        self.document_start = document_start
        if config.vocab_size is None:
            raise ConfigError("vocab_size is not set; give ModelConfig the tokenizer's get_vocab_size().")
        self.config = config = config.resolved()
        self.gradient_checkpointing = False
        self.dropout = nn.Dropout(config.dropout)
        embedding = nn.Embedding(config.vocab_size or 0, config.d_model)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": embedding,
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_layers)),
                "norm": nn.RMSNorm(config.d_model, eps=NORM_EPSILON),
            }
        )
        self.lm_head = Head(config.d_model, config.vocab_size or 0, bias=False)
        if not embedding.weight.is_meta:  # else whoever gives the weights memory fills them
            with torch.no_grad():
                for name, values in self.initial_weights():
                    self.get_parameter(name).copy_(values)
        if config.tie_embeddings:
            self.lm_head.weight = embedding.weight

    def initial_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and initial values of the weights, one after the other: normal, smaller where they write to the
        residual stream; drawn from the CPU's global generator, whatever the device.
        """
        for name, parameter in self.named_parameters():
            # 2 additions for each block: their variances add up to that of one (GPT-2).
            writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = 1 / math.sqrt(2 * self.config.num_layers) if writes_residual else 1.0
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            yield name, empty.normal_(std=INITIAL_STD * scale) if parameter.ndim == 2 else empty.fill_(1.0)

    def forward(self, input_ids: Tensor, of_hidden: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each of `input_ids` (B, T); or what `of_hidden` makes of the head's input
        (B, T, D) and weights (V, D).
        """
        x = self.dropout(self.model["embed_tokens"](input_ids))
        config = self.config
        cos, sin = rotary_table(input_ids.shape[1], config.d_model // config.num_heads, config.rope_theta, x.device)
        mask = None
        if self.document_start is not None:
            kind = x.device.type
            narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            mask = document_mask(input_ids, self.document_start, narrow)
        for block in self.model["layers"]:  # type: ignore[attr-defined]
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask)
        return self.lm_head(self.model["norm"](x), of_hidden)  # type: ignore[no-any-return]

    def gradient_checkpointing_enable(self) -> None:
        """Keep only each block's input for the backward pass, and compute the rest again (arXiv:1604.06174)."""
        self.gradient_checkpointing = True

    def get_input_embeddings(self) -> nn.Module:
        """The embedding table, under transformers' name for it."""
        return self.model["embed_tokens"]

    def get_output_embeddings(self) -> nn.Module:
        """The output projection, under transformers' name for it."""
        return self.lm_head

    def transformers_config(self, sequence_length: int) -> dict[str, Any]:
        """The config.json with which transformers opens these weights."""
        config = self.config
        return {
            "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
            "model_type": "qwen3" if config.qk_norm else "llama",
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "intermediate_size": config.d_ff,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.d_model // config.num_heads,
            "hidden_act": "silu",
            "rms_norm_eps": NORM_EPSILON,
            "rope_theta": config.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # since transformers 5
            "max_position_embeddings": sequence_length,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": config.tie_embeddings,
            "initializer_range": INITIAL_STD,
            "bos_token_id": None,
            "eos_token_id": None,
            "dtype": "float32",
        }


def from_transformers_config(saved: dict[str, Any]) -> ModelConfig:
    """The shape that `transformers_config` wrote down.

    Raises:
        ConfigError: if it is another architecture, or a value is missing.
    """
    if saved.get("model_type") not in ("qwen3", "llama"):
        raise ConfigError(f"the model's type is {saved.get('model_type')!r}; allowed: qwen3, llama (our Transformer).")
    try:
        return ModelConfig(
            vocab_size=saved["vocab_size"],
            d_model=saved["hidden_size"],
            num_heads=saved["num_attention_heads"],
            num_kv_heads=saved["num_key_value_heads"],
            num_layers=saved["num_hidden_layers"],
            d_ff=saved["intermediate_size"],
            tie_embeddings=saved["tie_word_embeddings"],
            rope_theta=saved["rope_theta"],
            qk_norm=saved["model_type"] == "qwen3",
        )
    except KeyError as error:
        raise ConfigError(f"the model's config.json lacks {error}.") from error
