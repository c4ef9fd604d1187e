"""Memory of one device while it takes an optimizer step: what autograd keeps of our `Transformer`, term by term.

All sizes are in bytes. D is d_model, V the vocabulary, n the tokens of one micro-batch on one device.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from fundamentallm.commands.estimate.counts import (
    NARROW,
    WIDE,
    Layout,
    count_parameters,
    is_narrow,
    key_features,
    micro_batches,
    optimizer_bytes,
)
from fundamentallm.config.schema import CHUNK, LARGE_VOCABULARY, Config, ModelConfig

COPIES_OF_LOGITS, COPIES_OF_Z_LOSS = 3, 5
"""Float32 tensors of logits' size at a loss's peak. Log-probabilities, and in the backward pass their gradient and the
logits'; focal loss and label smoothing have no more. z_loss keeps the logits too, and sums two gradients of them."""


class Memory(NamedTuple):
    """Bytes on one device. Not every part is at its largest at the same moment, so that the peak is below their sum."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What a micro-batch's forward pass leaves to its backward pass, logits excepted."""
    logits: int
    """Logits, log-probabilities, and their gradients."""
    gathered: int
    """FSDP2: blocks to compute with, and whole gradients to be scattered."""
    batch: int
    peak: int


class _Precision(NamedTuple):
    """Bytes of a number, and how it comes to be one of so few bytes."""

    compute: int
    """In matrix products and attention."""
    stream: int
    """In the residual stream and the norms."""
    casts: bool
    """Whether autocast keeps a narrow copy of every matrix, and of the input of every one."""


def memory(config: Config, layout: Layout, on_cpu: bool = False) -> Memory:
    """Memory of each device of a layout (of the one with most sequences).

    Args:
        config: resolved, with the model's vocab_size.
        layout: of the devices.
        on_cpu: with the kernels torch has on a CPU, rather than those on a GPU.
    """
    model, p, shards = config.model, count_parameters(config.model), layout.shards
    rows, parts, micro_rows = micro_batches(config, layout.devices)
    n = micro_rows * config.data.sequence_length
    # FSDP2's policy narrows weights and stream alike; autocast leaves both wide.
    compute = NARROW if is_narrow(config) else WIDE
    precision = _Precision(compute, WIDE if shards == 1 else compute, casts=is_narrow(config) and shards == 1)

    block = n * _kept_by_block(config, precision, on_cpu) + NARROW * p.hidden * precision.casts
    # Of the blocks that are not being computed, activation checkpointing keeps the input only.
    other_block = n * precision.stream * model.d_model if config.training.activation_checkpointing else block
    angles = config.data.sequence_length * (model.d_model // model.num_heads) * WIDE
    mask = compute * n * config.data.sequence_length if config.data.mask_documents else 0
    top = n * _kept_on_top(model, precision, on_cpu) + NARROW * p.table * precision.casts + angles + mask
    activations = (p.blocks - 1) * other_block + block + top
    is_whole = bool(config.training.compile) and shards == 1  # which has the logits whole (`CrossEntropy.of_hidden`)
    is_chunked = (model.vocab_size or 0) >= LARGE_VOCABULARY and n > CHUNK and not is_whole
    one_of_logits = WIDE * (CHUNK if is_chunked else n) * (model.vocab_size or 0)
    # torch's fused kernel makes do with one, which it turns into the gradient.
    is_fused = is_chunked and config.training.loss == "cross_entropy" and not is_narrow(config)
    copies = 1 if is_fused else COPIES_OF_Z_LOSS if config.training.loss == "z_loss" else COPIES_OF_LOGITS
    logits = copies * one_of_logits

    weights, gradients, optimizer = (-(-s // shards) for s in (WIDE * p.total, WIDE * p.total, optimizer_bytes(config)))
    # The block being computed and the next one, its gradients, and these in float32 to be summed; accelerate leaves
    # the output projection, with the last norm, gathered from the forward to the backward pass.
    gathered = (3 * compute + WIDE) * (p.hidden + p.vectors) + compute * (p.table + p.norm) if shards > 1 else 0
    batch = 2 * 8 * rows * config.data.sequence_length  # inputs and targets, int64

    # Activations go as gradients come: the peak is at one of these moments. From the second micro-batch on, and under
    # DDP always, all gradients have their memory already, and each new one is made beside them before it is added. A
    # tied table has two, and their sum is a third.
    held = gradients if parts > 1 or shards == 1 < layout.replicas else 0
    table, ff_matrix = WIDE * p.table, WIDE * model.d_model * (model.d_ff or 0)
    # Chunks' gradients, of the head's input and weights, are there before those of others are made.
    of_chunks = table + WIDE * (n if is_fused else n - CHUNK) * model.d_model if is_chunked else 0
    working = _working(n, model, precision) + ff_matrix
    moments = (
        held + p.blocks * other_block + top + logits + of_chunks,  # the loss
        held + p.blocks * other_block + top + one_of_logits + table,  # the output projection
        (held or table // shards) + (p.blocks - 1) * other_block + block + working,  # the last block, computed first
        gradients - WIDE * (p.hidden + p.vectors) // shards + block + working,  # the first block
        gradients + (2 * model.tie_embeddings + (parts > 1)) * table,  # the embedding table
        gradients + _update_bytes(config, on_cpu),  # the optimizer
    )
    peak = weights + optimizer + gathered + batch + max(moments)
    return Memory(weights, gradients, optimizer, activations, logits, gathered, batch, peak)


def _kept_by_block(config: Config, precision: _Precision, on_cpu: bool) -> int:
    """Bytes that autograd keeps of a block for each token; autocast's copies of weights not counted."""
    model, (compute, stream, casts) = config.model, precision
    d, keys, ff = model.d_model, key_features(model), model.d_ff or 0
    heads, kv_heads = model.num_heads, model.num_kv_heads or model.num_heads
    norms = 2 * (_kept_by_norm(stream, on_cpu) * d + WIDE)  # and each token's root mean square
    head_norms = _kept_by_norm(stream, on_cpu) * (d + keys) + WIDE * (heads + kv_heads) if model.qk_norm else 0
    # A linear layer keeps its input: q, k and v the same, gate and up too; autocast gives each a copy of its own.
    inputs = compute * d * (3 + 2 if casts else 1 + 1)
    if on_cpu and model.dropout:
        # No flash attention with dropout there: weights before and after, and their mask; k and v for each query head.
        attention = compute * 4 * d + (2 * compute + WIDE) * heads * config.data.sequence_length
    else:
        # q, k, v, the output, and each query's log-sum-exp, never the T x T weights (arXiv:2205.14135). The output
        # lies head by head, so that the linear layer after it keeps a copy.
        attention = compute * (3 * d + 2 * keys) + WIDE * heads
    swiglu = compute * 4 * ff  # gate, silu(gate), up, and their product
    return norms + head_norms + inputs + attention + swiglu + 2 * _mask(model, on_cpu)


def _kept_on_top(model: ModelConfig, precision: _Precision, on_cpu: bool) -> int:
    """Bytes that autograd keeps for each token outside the blocks: of the last norm, its output, and dropout's mask."""
    norm = _kept_by_norm(precision.stream, on_cpu) * model.d_model + WIDE
    return norm + precision.compute * model.d_model + _mask(model, on_cpu)


def _kept_by_norm(stream: int, on_cpu: bool) -> int:
    """Bytes of each feature. A norm keeps its input; on a CPU, where it is no kernel of its own, in float32, and with
    it the quotient."""
    return 2 * WIDE if on_cpu else stream


def _mask(model: ModelConfig, on_cpu: bool) -> int:
    """Dropout's mask of one token: booleans, on a CPU floats."""
    return model.d_model * (WIDE if on_cpu else 1) if model.dropout else 0


def _working(n: int, model: ModelConfig, precision: _Precision) -> int:
    """What a block's backward pass needs beside what is kept: the stream's gradient, and those of SwiGLU's factors."""
    stream = precision.stream + precision.compute * precision.casts
    return n * (stream * model.d_model + 2 * precision.compute * (model.d_ff or 0))


def _update_bytes(config: Config, on_cpu: bool) -> int:
    """What the optimizer needs while it steps: fused kernels nothing, Muon the momenta and its batched products."""
    if config.training.optimizer != "muon":
        return 0
    model = config.model
    d, keys, ff = model.d_model, key_features(model), model.d_ff or 0
    of_shape: Counter[tuple[int, int]] = Counter()
    for shape, count in (((d, d), 2), ((keys, d), 2), ((ff, d), 2), ((d, ff), 1)):
        of_shape[shape] += WIDE * count * model.num_layers * shape[0] * shape[1]
    # A stack of matrices, and in the iteration, which a GPU does in bfloat16, two more like it and two Gram matrices.
    wide = WIDE if on_cpu else NARROW
    stacks = (size + 2 * (size + size * min(shape) // max(shape)) * wide // WIDE for shape, size in of_shape.items())
    return sum(of_shape.values()) + max(stacks)
