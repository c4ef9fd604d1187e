"""Exact counts of a run, from its settings alone: parameters, FLOPs, and bytes to keep and to save.

Configs are resolved here, and their model has a vocab_size.
"""

from __future__ import annotations

from typing import NamedTuple

from fundamentallm.config.schema import Config, ModelConfig

WIDE, NARROW = 4, 2
"""Bytes of a float32, in which weights, gradients and optimizer state are kept; and of a bfloat16 or float16."""


class Parameters(NamedTuple):
    """Numbers of parameters; tied ones count once."""

    total: int
    without_tables: int  # without embedding table and output projection
    multiplied: int  # that each token is multiplied with: all matrices except the embedding table
    block: int  # of one block, norms included
    matrices: int  # of one block, norms excluded
    table: int  # of the output projection
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


def micro_batches(config: Config, devices: int) -> tuple[int, int]:
    """Returns (micro-batches, sequences of the largest one) of a step on the busiest device."""
    rows = -(-(config.training.batch_size or 0) // devices)
    size = config.training.micro_batch_size
    count = -(-rows // (rows if size is None or size == "auto" else size))
    return count, -(-rows // count)


def tokens_per_step(config: Config) -> int:
    """Returns the tokens of one optimizer step, over all devices."""
    return (config.training.batch_size or 0) * config.data.sequence_length


def tokens_of_run(config: Config, steps: int) -> int:
    """Returns the tokens of the first `steps` optimizer steps, following `batch_size_schedule`."""
    from fundamentallm.data.sampler import StepSampler  # imports numpy

    training, endless = config.training, 2**62
    sampler = StepSampler(endless, training.batch_size or 0, None, schedule=training.batch_size_schedule)
    return sampler.samples_before(steps) * config.data.sequence_length


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


def compute_size(config: Config) -> int:
    """Returns the bytes of a number in the forward and backward pass."""
    return NARROW if config.training.mixed_precision in ("bf16", "fp16") else WIDE
