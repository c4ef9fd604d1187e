"""Parameters, tokens, operations, bytes to send and to save: counted from the settings, nothing allocated.

Configs here are resolved, and have the model's vocab_size.
"""

from __future__ import annotations

from typing import NamedTuple

from fundamentallm.config.schema import Config, ModelConfig
from fundamentallm.training.throughput import flops_per_token

WIDE, NARROW = 4, 2
"""Bytes of a float32, in which weights, gradients and moments are kept; and of a bfloat16 or float16."""
LAYOUTS = ("ddp", "fsdp2", "hsdp")
DEVICES_OF_A_MACHINE = 8
"""Among which hsdp shares each copy of the model."""


class Layout(NamedTuple):
    """`replicas` copies of the model, each of them shared among `shards` devices."""

    replicas: int
    shards: int

    @property
    def devices(self) -> int:
        """All of them."""
        return self.replicas * self.shards


def layout_of(name: str, devices: int) -> Layout:
    """ddp: a copy on each device; fsdp2: one among all; hsdp: one among the devices of each machine."""
    shards = {"ddp": 1, "fsdp2": devices, "hsdp": min(devices, DEVICES_OF_A_MACHINE)}[name]
    return Layout(devices // shards, shards)


class Parameters(NamedTuple):
    """How many parameters are where."""

    blocks: int
    hidden: int
    """Of one block's matrices."""
    vectors: int
    """Of one block's norms."""
    table: int
    """Of the embedding table, and of the output projection where that is another."""
    tables: int
    norm: int
    """Of the last norm."""
    tensors: int
    """All tensors, tied ones once."""

    @property
    def without_tables(self) -> int:
        """Of blocks and last norm: what is the same for every vocabulary."""
        return self.blocks * (self.hidden + self.vectors) + self.norm

    @property
    def total(self) -> int:
        """All, tied ones once."""
        return self.without_tables + self.tables * self.table

    @property
    def multiplied(self) -> int:
        """What each token is multiplied with: the matrices, but not the table in which it is only looked up."""
        return self.blocks * self.hidden + self.table


def count_parameters(model: ModelConfig) -> Parameters:
    """Those of the `Transformer` of this shape."""
    d, keys, ff = model.d_model, key_features(model), model.d_ff or 0
    return Parameters(
        blocks=model.num_layers,
        hidden=2 * d * d + 2 * d * keys + 3 * d * ff,
        vectors=2 * d + 2 * (d // model.num_heads) * model.qk_norm,
        table=(model.vocab_size or 0) * d,
        tables=1 if model.tie_embeddings else 2,
        norm=d,
        tensors=(11 if model.qk_norm else 9) * model.num_layers + (2 if model.tie_embeddings else 3),
    )


def key_features(model: ModelConfig) -> int:
    """Features of a token's keys over all heads, and of its values."""
    return (model.num_kv_heads or model.num_heads) * (model.d_model // model.num_heads)


def is_narrow(config: Config) -> bool:
    """Whether the forward and backward pass compute in 16 bits."""
    return config.training.mixed_precision in ("bf16", "fp16")


def micro_batches(config: Config, devices: int) -> tuple[int, int, int]:
    """(sequences in one optimizer step, micro-batches they make, sequences of the largest), of one device.

    Of the device that has most, as `StepSampler` and `OptimizerStep` cut the batch.
    """
    rows = -(-(config.training.batch_size or 0) // devices)
    size = config.training.micro_batch_size
    parts = -(-rows // (rows if size is None or size == "auto" else size))
    return rows, parts, -(-rows // parts)


def tokens_per_step(config: Config) -> int:
    """Tokens of one optimizer step, over all devices."""
    return (config.training.batch_size or 0) * config.data.sequence_length


def tokens_of_run(config: Config, steps: int) -> int:
    """Tokens of the first `steps` optimizer steps, over all devices, as `batch_size_schedule` has them."""
    training = config.training
    begins = [(0, training.batch_size or 0), *((step, size) for step, size in training.batch_size_schedule)]
    ends = [*(step for step, _ in begins[1:]), steps]
    sequences = sum(size * max(min(end, steps) - step, 0) for (step, size), end in zip(begins, ends, strict=True))
    return sequences * config.data.sequence_length


def step_flops(config: Config) -> int:
    """Floating-point operations of one optimizer step, over all devices (see `flops_per_token`)."""
    model, multiplied = config.model, count_parameters(config.model).multiplied
    of_token = flops_per_token(multiplied, model.num_layers, model.d_model, config.data.sequence_length)
    return of_token * tokens_per_step(config)


def recomputed_flops(config: Config) -> int:
    """Operations of a step, over all devices, that activation checkpointing adds to `step_flops`.

    Each block's forward pass once more, but for its last matrix, whose output no backward pass needs.
    """
    model, p = config.model, count_parameters(config.model)
    matrices = p.hidden - model.d_model * (model.d_ff or 0)
    of_token = p.blocks * (2 * matrices + 4 * model.d_model * config.data.sequence_length)
    return of_token * tokens_per_step(config) if config.training.activation_checkpointing else 0


def optimizer_bytes(config: Config) -> int:
    """Bytes of the optimizer's state, over the whole model, and of the weights' average where there is one.

    A 'module:name' optimizer is taken to hold what Adam does.
    """
    training, p = config.training, count_parameters(config.model)
    return _moments_bytes(config) + (0 if training.ema_decay is None else WIDE * p.total)


def _moments_bytes(config: Config) -> int:
    training, p = config.training, count_parameters(config.model)
    if training.optimizer == "sgd":
        return WIDE * p.total if training.momentum else 0
    if training.optimizer == "muon":  # one momentum of the 7 hidden matrices of a block, AdamW's state of the rest
        hidden = p.blocks * p.hidden
        return WIDE * (hidden + 2 * (p.total - hidden) + p.tensors - 7 * p.blocks)
    return WIDE * (2 * p.total + p.tensors)  # two moments, and for each tensor its number of steps


def checkpoint_bytes(config: Config) -> int:
    """Bytes of one checkpoint, all its files together: weights and the optimizer's state."""
    return WIDE * count_parameters(config.model).total + optimizer_bytes(config)


def sent_bytes(config: Config, layout: Layout) -> int:
    """Bytes that each device sends in an optimizer step, by rings, which send least.

    Of what is gathered or scattered among N devices, (N - 1) / N; an all-reduce does both (Patarasuk and Yuan,
    J. Parallel Distrib. Comput. 69, 2009). DDP all-reduces float32 gradients once. FSDP2, for each micro-batch,
    gathers weights in the precision of the computation, for the forward and again for the backward pass (output
    projection and last norm once), and scatters float32 gradients; hsdp then all-reduces each shard among the copies.
    """
    p = count_parameters(config.model)
    gradients = WIDE * p.total
    all_reduced = 2 * gradients * (layout.replicas - 1) // layout.replicas
    if layout.shards == 1:
        return all_reduced
    _, parts, _ = micro_batches(config, layout.devices)
    gathered = (NARROW if is_narrow(config) else WIDE) * (2 * p.total - p.table - p.norm)
    return parts * ((gathered + gradients) * (layout.shards - 1) + all_reduced) // layout.shards
