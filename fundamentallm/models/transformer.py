"""The decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases.

Parameter names and arithmetic are those of transformers' Qwen3 (with `qk_norm`) and Llama (without), so a
checkpoint opens there as it is. Shapes: B sequences, T tokens, D = d_model, H heads of F = D / H features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fundamentallm.config.schema import ModelConfig
from fundamentallm.errors import ConfigError, Problem

INITIAL_STD = 0.02
"""Standard deviation of initial weights (GPT-2)."""


def rotary_table(positions: Tensor, features: int, theta: float) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines of the rotary angles of `positions` (...), each (..., features / 2), in float32.

    Position t rotates pair i by the angle t * theta^(-2i / features) (RoFormer, arXiv:2104.09864).
    """
    frequencies = theta ** (-torch.arange(0, features, 2, device=positions.device, dtype=torch.float32) / features)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the feature pairs (i, i + F/2) of x (B, H, T, F) by their position's angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


class LayerCache:
    """Keys and values (B, H, T, F) of one layer, so that generation computes each token once.

    An object rather than a pair of tensors: FSDP2 casts tensor arguments, and what is written into a copy is lost.
    """

    def __init__(self) -> None:
        self.keys = self.values = torch.empty(0)
        self.used = 0

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values of the next tokens and return all of them."""
        if self.used > 0:
            keys, values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        self.keys, self.values, self.used = keys, values, keys.shape[2]
        return keys, values


def document_mask(starts: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what to add to attention scores (B, 1, T, T), so that each token sees its document only.

    `starts` (B, T) is True where a document begins. Rotary positions need no reset: only their differences matter.
    The mask has the scores' precision, since attention would convert booleans to that, and keep it, in every block.
    """
    document = starts.cumsum(1)
    allowed = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, float("-inf"))


class Attention(nn.Module):
    """Causal self-attention in which several query heads may use the same key and value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_kv_heads is not None
        self.head_size, self.dropout = config.d_model // config.num_heads, config.dropout
        self.is_grouped = config.num_kv_heads != config.num_heads
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.num_kv_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.num_kv_heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_size, eps=config.norm_epsilon)
            self.k_norm = nn.RMSNorm(self.head_size, eps=config.norm_epsilon)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Attend from each position of x (B, T, D) to those before it, or those that `mask` (B, 1, T, T) allows, and to
        those in the cache. Returns (B, T, D).
        """
        b, t, _ = x.shape
        q, k, v = (project(x).view(b, t, -1, self.head_size) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            # In the weights' precision: torch's fused kernel does not take autocast's beside it.
            q, k = (norm(x.to(norm.weight.dtype)) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (B, H, T, F)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v)
        dropout, is_causal = self.dropout if self.training else 0.0, mask is None and t > 1  # one token sees the cache
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=self.is_grouped)
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
        """Map each position of x (B, T, D) by itself."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Map x (B, T, D) to (B, T, D)."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))  # type: ignore[no-any-return]


class Head(nn.Linear):
    """Output projection without a bias."""

    def forward(self, x: Tensor, of_hidden: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Returns the logits (B, T, V) of x (B, T, D), or `of_hidden` of x and the weights (V, D).

        `of_hidden` is called in here because FSDP2 gathers the weights for this call only.
        """
        return super().forward(x) if of_hidden is None else of_hidden(x, self.weight)


class Transformer(nn.Module):
    """A decoder-only language model.

    Args:
        config: its shape; raises ConfigError if `vocab_size` is not set.
        document_start: the end-of-text token. It and the tokens after it do not attend to those before it, so it begins
            the next document and shows nothing of the last one. None: documents are not masked.

    Examples:
        >>> import torch
        >>> from fundamentallm import ModelConfig, Transformer
        >>> model = Transformer(ModelConfig(vocab_size=10, d_model=16, num_heads=2, num_layers=1))
        >>> model(torch.tensor([[1, 2, 3]])).shape  # logits: batch, positions, vocabulary
        torch.Size([1, 3, 10])
    """

    # transformers' names for modules that must not be split, and for the module with the norm before the head.
    _no_split_modules = ("Block",)
    base_model_prefix = "model"

    def __init__(self, config: ModelConfig, document_start: int | None = None) -> None:
        super().__init__()
        self.document_start = document_start
        if config.vocab_size is None:
            raise ConfigError(Problem("model.vocab_size", None, "the tokenizer's get_vocab_size()"))
        self.config = config = config.resolved()
        self.gradient_checkpointing = False
        self.dropout = nn.Dropout(config.dropout)
        embedding = nn.Embedding(config.vocab_size or 0, config.d_model)
        blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        norm = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.model = nn.ModuleDict({"embed_tokens": embedding, "layers": blocks, "norm": norm})
        self.lm_head = Head(config.d_model, config.vocab_size or 0, bias=False)
        if not embedding.weight.is_meta:  # otherwise the caller allocates the weights and fills them
            with torch.no_grad():
                for name, values in self.initial_weights():
                    self.get_parameter(name).copy_(values)
        if config.tie_embeddings:
            self.lm_head.weight = embedding.weight

    def initial_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and initial values of the weights: normal, and smaller (or zero) for projections to the residual
        stream. They are drawn from the CPU's global generator on any device.
        """
        # The variances of two additions a block add up to that of one (GPT-2). Weights that become zero are drawn too,
        # so that the others do not depend on `zero_init_residual`.
        residual = 0.0 if self.config.zero_init_residual else 1 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            scale = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            yield name, empty.normal_(std=INITIAL_STD * scale) if parameter.ndim == 2 else empty.fill_(1.0)

    def forward(
        self,
        input_ids: Tensor,
        of_hidden: Callable[[Tensor, Tensor], Tensor] | None = None,
        cache: Sequence[LayerCache] | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Returns logits (B, T, V) of the token after each of `input_ids` (B, T), or `of_hidden` of the head's input
        (B, T, D) and weights (V, D). With a cache, the tokens follow those in it: several first, then one at a time.
        Otherwise `position_ids` (B, T) may be given: each 0 begins a document, which sees none of those before it.
        """
        x, config = self.dropout(self.model["embed_tokens"](input_ids)), self.config
        begin = 0 if cache is None else cache[0].used
        positions = torch.arange(begin, begin + input_ids.shape[1], device=x.device)
        mask = starts = None
        if position_ids is not None:
            positions, starts = position_ids[:, None], position_ids == 0
        elif self.document_start is not None and cache is None:  # generated text is one document
            starts = input_ids == self.document_start
        if starts is not None:
            kind = x.device.type
            narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            mask = document_mask(starts, narrow)
        cos, sin = rotary_table(positions, config.d_model // config.num_heads, config.rope_theta)
        for index, block in enumerate(self.model["layers"].children()):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, None if cache is None else cache[index])
        return self.lm_head(self.model["norm"](x), of_hidden)  # type: ignore[no-any-return]

    def new_cache(self) -> list[LayerCache]:
        """Returns an empty cache."""
        return [LayerCache() for _ in range(self.config.num_layers)]

    def gradient_checkpointing_enable(self) -> None:
        """Keep only each block's input for the backward pass, and recompute the rest (arXiv:1604.06174)."""
        self.gradient_checkpointing = True

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embedding table, by transformers' name for it."""
        return self.model["embed_tokens"]

    def get_output_embeddings(self) -> nn.Module:
        """Returns the output projection, by which accelerate finds that it is tied under FSDP2."""
        return self.lm_head

    def transformers_config(self, sequence_length: int, end_of_text: int | None = None) -> dict[str, Any]:
        """Returns the config.json with which transformers opens these weights. What it lacks has the right default."""
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
            "rms_norm_eps": config.norm_epsilon,
            "rope_theta": config.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # since transformers 5
            "max_position_embeddings": sequence_length,
            "tie_word_embeddings": config.tie_embeddings,
            "bos_token_id": None,
            "eos_token_id": end_of_text,
            "dtype": "float32",
        }


def cache_option(model: object, use_cache: bool) -> dict[str, bool]:
    """Returns the keyword argument that tells a transformers model whether to cache keys and values."""
    return {"use_cache": use_cache} if hasattr(model, "generation_config") else {}
