"""Counts and memory of a run, from its resolved config alone, whose model has a vocab_size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from fundamentallm.commands.output import say, say_table
from fundamentallm.config.schema import CHUNK, LARGE_VOCABULARY, OPTIMIZER_NAMES, Config
from fundamentallm.config.units import duration_text, size_text
from fundamentallm.data.sampler import StepSampler
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.optimizers import freeze, make_optimizer
from fundamentallm.training.throughput import model_flops_per_token

WIDE, NARROW = 4, 2
"""Bytes of a float32, in which weights, gradients and optimizer state are kept; and of a bfloat16 or float16."""

DEVICES = (1, 8, 64, 512, 4096)
"""Rows of the table without --devices."""


class Counts(NamedTuple):
    """What the model and the optimizer of a config hold and compute; tied parameters count once."""

    parameters: int
    trained: int  # parameters that are not frozen
    block: int  # parameters of one block
    matrices: int  # of one block, norms excluded
    table: int  # of the output projection
    optimizer_bytes: int  # with the average of the weights, if there is one
    flops_per_token: int


def count(config: Config) -> Counts:
    """Returns the counts of a config, by making its model and its optimizer without memory for them.

    A 'module:name' optimizer is assumed to have Adam's state.
    """
    training = config.training
    if training.optimizer not in OPTIMIZER_NAMES:
        training = replace(training, optimizer="adamw", optimizer_options={})
    with torch.device("meta"):
        model = Transformer(config.model)
    freeze(model, training.parameter_groups)
    state_bytes = 0 if training.ema_decay is None else sum(p.nbytes for p in model.parameters())
    for group in make_optimizer(training, model).param_groups:
        size = sum(p.nbytes for p in group["params"])
        if "betas" in group and not group.get("muon"):
            state_bytes += 2 * size + WIDE * len(group["params"])  # two moments, and the number of steps
        elif group["momentum"]:
            state_bytes += size
    block = [parameter for name, parameter in model.named_parameters() if ".layers.0." in name]
    return Counts(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        block=sum(p.numel() for p in block),
        matrices=sum(p.numel() for p in block if p.ndim > 1),
        table=model.lm_head.weight.numel(),
        optimizer_bytes=state_bytes,
        flops_per_token=model_flops_per_token(model, config.data.sequence_length),
    )


def micro_batches(config: Config, devices: int) -> tuple[int, int]:
    """Returns (micro-batches, sequences of the largest one) of a step on the busiest device."""
    rows = -(-(config.training.batch_size or 0) // devices)
    size = config.training.micro_batch_size
    number = -(-rows // (rows if size is None or size == "auto" else size))
    return number, -(-rows // number)


def tokens_of_run(config: Config, steps: int) -> int:
    """Returns the tokens of the first `steps` optimizer steps, following `batch_size_schedule`."""
    training, endless = config.training, 2**62
    sampler = StepSampler(endless, training.batch_size or 0, None, schedule=training.batch_size_schedule)
    return sampler.samples_before(steps) * config.data.sequence_length


class Memory(NamedTuple):
    """Bytes on one device. Activations are freed as gradients are made, so the peak is less than the sum."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept by the forward pass of a micro-batch, without logits
    logits: int  # logits, log-probabilities and their gradients, all in float32
    gathered: int  # FSDP2: blocks gathered for computing, and gradients to be scattered
    peak: int


def memory(config: Config, counts: Counts, devices: int = 1, layout: str = "ddp") -> Memory:
    """Estimate the memory of the busiest device, with torch's GPU kernels.

    Activations are counted by the method of Korthikanti et al. (arXiv:2205.05198, section 4), for our block: RMSNorm,
    SwiGLU, grouped-query FlashAttention (which keeps no T x T weights), and no dropout.
    """
    model, vocabulary = config.model, config.model.vocab_size or 0
    shards = devices if layout == "fsdp2" else 1
    number, rows = micro_batches(config, devices)
    tokens = rows * config.data.sequence_length
    size = NARROW if config.training.mixed_precision in ("bf16", "fp16") else WIDE
    is_autocast = size == NARROW and shards == 1  # it copies matrices and inputs; FSDP2 casts weights and stream
    stream, casts = WIDE if is_autocast else size, NARROW * is_autocast

    d, keys = model.d_model, (model.num_kv_heads or model.num_heads) * (model.d_model // model.num_heads)
    norms = stream * (2 * d + (d + keys) * model.qk_norm)  # the input of each
    inputs = size * d * (5 if is_autocast else 2)  # of q, k, v, gate and up
    attention = size * (3 * d + 2 * keys)  # q, k, v, the output, and its copy in the order of the tokens
    feed_forward = size * 4 * (model.d_ff or 0)  # gate, silu(gate), up, and their product
    block = tokens * (norms + inputs + attention + feed_forward) + casts * counts.matrices
    others = tokens * stream * d if config.training.activation_checkpointing else block  # its input alone
    top = tokens * d * (stream + size) + casts * counts.table
    activations = (model.num_layers - 1) * others + block + top

    state = WIDE * counts.parameters, WIDE * counts.trained, counts.optimizer_bytes
    weights, gradients, optimizer = (-(-part // shards) for part in state)
    # Large vocabularies are computed in chunks, which make the gradient of the output projection in the forward pass.
    is_chunked = vocabulary >= LARGE_VOCABULARY and tokens > CHUNK and not config.training.compile
    copies = 1 if is_chunked and size == WIDE else 3  # 1: fused by torch
    logits = copies * WIDE * vocabulary * (CHUNK if is_chunked else tokens)
    early = WIDE * (counts.table + tokens * d) if is_chunked else 0
    # The block being computed and the next one, and float32 gradients to be scattered.
    gathered = (3 * size + WIDE) * counts.block + size * counts.table if shards > 1 else 0
    # Gradients of earlier micro-batches, and the buckets of DDP, exist before the backward pass begins.
    held = gradients if number > 1 or shards == 1 < devices else 0
    peak = weights + optimizer + gathered + max(held + activations + logits + early, gradients)
    return Memory(weights, gradients, optimizer, activations, logits, gathered, peak)


def _run_rows(config: Config, counts: Counts) -> Iterator[tuple[str, str]]:
    """Yields (title, text) of what does not depend on the devices."""
    training, steps, step_tokens = config.training, config.training.max_steps, tokens_of_run(config, 1)
    yield "parameters", f"{counts.parameters:,}, of which {counts.trained:,} are trained"
    yield "optimizer step", f"{step_tokens:,} tokens, {step_tokens * counts.flops_per_token:.3g} FLOPs"
    if steps is not None:
        tokens = tokens_of_run(config, steps)
        yield "whole run", f"{steps:,} steps, {tokens:,} tokens, {tokens * counts.flops_per_token:.3g} FLOPs"
    kept = training.keep_last_n + (config.data.train_split < 1) + 1  # with the best, and the one being written
    size, state = WIDE * counts.parameters + counts.optimizer_bytes, size_text(counts.optimizer_bytes)
    yield "checkpoint", f"{size_text(size)} ({state} of it optimizer state); up to {kept}: {size_text(kept * size)}"
    yield "mixed precision", training.mixed_precision or "no"
    if training.optimizer not in OPTIMIZER_NAMES:
        yield "optimizer", f"{training.optimizer} is assumed to have Adam's state"
    if training.micro_batch_size == "auto":
        yield "micro-batches", "auto: one per step is assumed"
    if training.batch_size_schedule:
        yield "batches", "step and memory are those of the first batch_size"


def show(config: Config, only_devices: int | None, tflops: float, rate: str) -> None:
    """Print the counts, then memory and time as replicas (DDP), and sharded over all devices (FSDP2).

    A device computes `tflops`, which `rate` says in words.
    """
    counts, training = count(config), config.training
    say_table(_run_rows(config, counts), "<<")
    # Activation checkpointing repeats the forward pass, a third of the FLOPs of a step.
    flops_per_token = counts.flops_per_token * (4 / 3 if training.activation_checkpointing else 1)
    batch_size = training.batch_size or 0
    rows: list[tuple[str, ...]] = [("devices", "layout", *Memory._fields, "step", "run")]
    for devices in [only_devices] if only_devices else [n for n in DEVICES if n <= batch_size]:
        seconds_per_token, run = flops_per_token / devices / tflops / 1e12, "-"
        if training.max_steps is not None:
            run = duration_text(seconds_per_token * tokens_of_run(config, training.max_steps))
        step = duration_text(seconds_per_token * tokens_of_run(config, 1))
        for layout in ("ddp", "fsdp2") if devices > 1 else ("ddp",):
            sizes = map(size_text, memory(config, counts, devices, layout))
            rows.append((f"{devices:,}", layout, *sizes, step, run))
    say(f"\nmemory of each device, and time to compute ({rate})")
    say_table(rows, "><" + ">" * (len(rows[0]) - 2))
    if only_devices is not None and only_devices > batch_size:
        idle = only_devices - batch_size
        say(f"\n{idle:,} devices have nothing to compute: training.batch_size is {batch_size:,}, over all devices.")
