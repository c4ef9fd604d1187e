"""Memory of one device during an optimizer step, by the method of Korthikanti et al. (arXiv:2205.05198, section 4).

Their count of the activations that each operation of a block keeps for the backward pass, for our block: RMSNorm,
SwiGLU, grouped-query FlashAttention (which keeps no T x T weights), and no dropout.
"""

from __future__ import annotations

from typing import NamedTuple

from fundamentallm.commands.estimate.counts import (
    NARROW,
    WIDE,
    compute_size,
    count_parameters,
    key_features,
    micro_batches,
    optimizer_bytes,
)
from fundamentallm.config.schema import CHUNK, LARGE_VOCABULARY, Config


class Memory(NamedTuple):
    """Bytes on one device. Activations are freed as gradients are made, so the peak is less than the sum."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept by the forward pass of a micro-batch, without logits
    logits: int  # logits, log-probabilities and their gradients, all in float32
    gathered: int  # FSDP2: blocks gathered for computing, and gradients to be scattered
    peak: int


def memory(config: Config, devices: int = 1, layout: str = "ddp") -> Memory:
    """Estimate the memory of the busiest device, with torch's GPU kernels.

    torch's CPU kernels also keep the quotient of each norm, in float32.
    """
    model, p = config.model, count_parameters(config.model)
    shards = devices if layout == "fsdp2" else 1
    count, rows = micro_batches(config, devices)
    tokens, size = rows * config.data.sequence_length, compute_size(config)
    is_autocast = size == NARROW and shards == 1  # FSDP2 casts weights and the residual stream instead
    stream = WIDE if is_autocast else size

    casts = NARROW * is_autocast  # autocast keeps a copy of every matrix
    block = tokens * _kept_per_token(config, size, stream, is_autocast) + casts * p.matrices
    recomputed = tokens * stream * model.d_model  # activation checkpointing keeps the input of a block
    others = recomputed if config.training.activation_checkpointing else block
    top = tokens * model.d_model * (stream + size) + casts * p.table
    activations = (model.num_layers - 1) * others + block + top

    weights, gradients, optimizer = (-(-n // shards) for n in (WIDE * p.total, WIDE * p.total, optimizer_bytes(config)))
    # Large vocabularies are computed in chunks, which make the gradient of the output projection in the forward pass.
    is_chunked = (model.vocab_size or 0) >= LARGE_VOCABULARY and tokens > CHUNK and not config.training.compile
    copies = 1 if is_chunked and config.training.loss == "cross_entropy" and size == WIDE else 3  # 1: fused by torch
    logits = copies * WIDE * (CHUNK if is_chunked else tokens) * (model.vocab_size or 0)
    early = WIDE * (p.table + tokens * model.d_model) if is_chunked else 0
    # The block being computed and the next one, and float32 gradients to be scattered.
    gathered = (3 * size + WIDE) * p.block + size * p.table if shards > 1 else 0
    # Gradients of earlier micro-batches, and the buckets of DDP, exist before the backward pass begins.
    held = gradients if count > 1 or shards == 1 < devices else 0
    loss, end = held + activations + logits + early, gradients + held * (count > 1) * p.table // p.total
    peak = weights + optimizer + gathered + max(loss, end)
    return Memory(weights, gradients, optimizer, activations, logits, gathered, peak)


def _kept_per_token(config: Config, size: int, stream: int, is_autocast: bool) -> int:
    """Returns the bytes that a block keeps of each token."""
    model = config.model
    d, keys = model.d_model, key_features(model)
    norms = stream * (2 * d + (d + keys) * model.qk_norm)  # the input of each
    # Autocast makes a copy of the input of each of q, k, v, gate and up.
    inputs = size * d * (5 if is_autocast else 2)
    attention = size * (2 * d + 2 * keys) + size * d  # q, k, v, the output, and its copy in the order of the tokens
    feed_forward = size * 4 * (model.d_ff or 0)  # gate, silu(gate), up, and their product
    return norms + inputs + attention + feed_forward
