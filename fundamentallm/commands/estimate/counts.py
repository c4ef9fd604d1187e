"""Exact counts of a run, from its settings alone: parameters, FLOPs, and bytes to keep, save and send.

Configs are resolved here, and their model has a vocab_size.
"""

from __future__ import annotations

from typing import NamedTuple

from fundamentallm.config.schema import Config, ModelConfig

WIDE, NARROW = 4, 2
"""Bytes of a float32, in which weights, gradients and optimizer state are kept; and of a bfloat16 or float16."""
LAYOUTS = ("ddp", "fsdp2", "hsdp")
DEVICES_PER_MACHINE = 8
"""Assumed for hsdp, which shards within a machine and replicates across machines."""


class Layout(NamedTuple):
    """`replicas` copies of the model, each sharded over `shards` devices."""

    replicas: int
    shards: int


def layout_of(name: str, devices: int) -> Layout:
    """Returns the layout of ddp (one shard), fsdp2 (one replica) or hsdp on a number of devices."""
    shards = {"ddp": 1, "fsdp2": devices, "hsdp": min(devices, DEVICES_PER_MACHINE)}[name]
    return Layout(devices // shards, shards)


class Parameters(NamedTuple):
    """Numbers of parameters; tied ones count once."""

    total: int
    without_tables: int
    """Without embedding table and output projection."""
    multiplied: int
    """Parameters that each token is multiplied with: all matrices except the embedding table."""
    block: int
    """Of one block, norms included."""
    matrices: int
    """Of one block, norms excluded."""
    table: int
    """Of the output projection."""
    tensors: int


def count_parameters(model: ModelConfig) -> Parameters:
    """Count the parameters of the `Transformer` of this shape."""
    d, layers, table = model.d_model, model.num_layers, (model.vocab_size or 0) * model.d_model
    matrices = 2 * d * d + 2 * d * key_features(model) + 3 * d * (model.d_ff or 0)
    block = matrices + 2 * d + 2 * (d // model.num_heads) * model.qk_norm
    without_tables, tables = layers * block + d, 1 if model.tie_embeddings else 2
    return Parameters(
        total=without_tables + tables * table,
        without_tables=without_tables,
        multiplied=layers * matrices + table,
        block=block,
        matrices=matrices,
        table=table,
        tensors=(11 if model.qk_norm else 9) * layers + tables + 1,
    )


def key_features(model: ModelConfig) -> int:
    """Returns the features of a token's keys (or values) over all heads."""
    return (model.num_kv_heads or model.num_heads) * (model.d_model // model.num_heads)


def micro_batches(config: Config, devices: int) -> tuple[int, int, int]:
    """Returns (sequences, micro-batches, sequences of the largest micro-batch) of a step on the busiest device."""
    rows = -(-(config.training.batch_size or 0) // devices)
    size = config.training.micro_batch_size
    count = -(-rows // (rows if size is None or size == "auto" else size))
    return rows, count, -(-rows // count)


def tokens_per_step(config: Config) -> int:
    """Returns the tokens of one optimizer step, over all devices."""
    return (config.training.batch_size or 0) * config.data.sequence_length


def tokens_of_run(config: Config, steps: int) -> int:
    """Returns the tokens of the first `steps` optimizer steps, following `batch_size_schedule`."""
    changes = [(0, config.training.batch_size or 0), *config.training.batch_size_schedule]
    ends = [*(step for step, _ in changes[1:]), steps]
    sequences = sum(size * max(min(end, steps) - step, 0) for (step, size), end in zip(changes, ends, strict=True))
    return sequences * config.data.sequence_length


def step_flops(config: Config) -> int:
    """Returns the floating-point operations of one optimizer step, over all devices (see `flops_per_token`)."""
    from fundamentallm.training.throughput import flops_per_token  # imports torch

    model, multiplied = config.model, count_parameters(config.model).multiplied
    per_token = flops_per_token(multiplied, model.num_layers, model.d_model, config.data.sequence_length)
    return per_token * tokens_per_step(config)


def optimizer_bytes(config: Config) -> int:
    """Returns the size of the optimizer's state and of the average of the weights, if there is one.

    A 'module:name' optimizer is assumed to have Adam's state.
    """
    training, p = config.training, count_parameters(config.model)
    average = 0 if training.ema_decay is None else p.total
    if training.optimizer == "sgd":
        return WIDE * (average + (p.total if training.momentum else 0))
    if training.optimizer == "muon":  # one momentum of the 7 matrices of each block, Adam's state of all others
        hidden, others = config.model.num_layers * p.matrices, p.tensors - 7 * config.model.num_layers
        return WIDE * (average + hidden + 2 * (p.total - hidden) + others)
    return WIDE * (average + 2 * p.total + p.tensors)  # two moments, and a step count for each tensor


def checkpoint_bytes(config: Config) -> int:
    """Returns the size of one checkpoint: weights and optimizer state."""
    return WIDE * count_parameters(config.model).total + optimizer_bytes(config)


def sent_bytes(config: Config, layout: Layout) -> int:
    """Returns the bytes that each device sends in an optimizer step, by ring algorithms, which send the least.

    A ring over N devices sends (N - 1) / N of what it gathers or scatters, and an all-reduce does both (Patarasuk and
    Yuan, J. Parallel Distrib. Comput. 69, 2009). DDP all-reduces float32 gradients once. FSDP2, for each micro-batch,
    gathers the weights twice (output projection and last norm once), in the precision of the computation, and scatters
    float32 gradients; hsdp then all-reduces each shard across replicas.
    """
    p = count_parameters(config.model)
    gradients = WIDE * p.total
    all_reduced = 2 * gradients * (layout.replicas - 1) // layout.replicas
    if layout.shards == 1:
        return all_reduced
    _, count, _ = micro_batches(config, layout.replicas * layout.shards)
    gathered = compute_size(config) * (2 * p.total - p.table - config.model.d_model)
    return count * ((gathered + gradients) * (layout.shards - 1) + all_reduced) // layout.shards


def compute_size(config: Config) -> int:
    """Returns the bytes of a number in the forward and backward pass."""
    return NARROW if config.training.mixed_precision in ("bf16", "fp16") else WIDE
