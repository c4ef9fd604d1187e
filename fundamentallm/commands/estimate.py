"""Estimate memory, FLOPs and time of a run, for any model size."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fundamentallm.commands.common import option_problems, parse_settings, say, say_table, settings_parser
from fundamentallm.config.schema import CHUNK, LARGE_VOCABULARY, OPTIMIZER_NAMES, Config
from fundamentallm.config.units import duration_text, size_text
from fundamentallm.config.validation import AT_LEAST_ONE
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.training.throughput import PEAK_TFLOPS, model_flops_per_token

UTILISATION = 0.4
"""Fraction of a GPU's peak in bfloat16 that a well-made run reaches."""
WIDE, NARROW = 4, 2
"""Bytes of a float32, in which weights, gradients and optimizer state are kept; and of a bfloat16 or float16."""
DEVICES = (1, 8, 64, 512, 4096)
"""Rows of the table without --devices."""


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line and return the exit code."""
    read = "The data is read only to count the characters of a character-level model without a model.vocab_size."
    about = f"{__doc__} Nothing is allocated. {read}"
    parser = settings_parser(program, "[--devices INT] [--gpu NAME]", about)
    devices = "number of devices; default: a table up to thousands"
    parser.add_argument("--devices", type=int, metavar="INT", help=devices)
    gpus = f"{', '.join(PEAK_TFLOPS)}; training.peak_tflops for another device [H100]"
    parser.add_argument("--gpu", default="H100", type=str.upper, metavar="NAME", help=gpus)
    options, rest = parser.parse_known_args(arguments)
    problems = option_problems(options, devices=AT_LEAST_ONE)
    if options.gpu not in PEAK_TFLOPS:
        problems.append(Problem("--gpu", options.gpu, gpus))
    config = _with_vocabulary(parse_settings(rest, program, problems, check_files=False))
    batch_size, peak = config.training.batch_size or 0, config.training.peak_tflops
    if (options.devices or 1) > batch_size:
        allowed = f"at most {batch_size}, the training.batch_size; other devices would have nothing to compute"
        raise ConfigError(Problem("--devices", options.devices, allowed))
    counts, tflops = count(config), UTILISATION * (peak or PEAK_TFLOPS[options.gpu])
    say_table(_run_rows(config, counts), "<<")
    of = f"the peak of one {options.gpu}, see --gpu" if peak is None else "training.peak_tflops"
    say(f"\nmemory of each device, and time to compute ({tflops:.0f} TFLOP/s, {UTILISATION:.0%} of {of})")
    rows: list[tuple[str, ...]] = [("devices", "layout", *Memory._fields, "step", "run")]
    for number in [options.devices] if options.devices else [n for n in DEVICES if n <= batch_size]:
        for layout in ("ddp", "fsdp2") if number > 1 else ("ddp",):
            sizes = map(size_text, memory(config, counts, number, layout))
            rows.append((f"{number:,}", layout, *sizes, *_times(config, counts, number * tflops * 1e12)))
    say_table(rows, "><" + ">" * (len(rows[0]) - 2))
    return 0


def _with_vocabulary(config: Config) -> Config:
    """Returns the config with the shape of a pretrained model, or with the vocabulary of its data."""
    if (pretrained := config.model.pretrained) is not None:
        from fundamentallm.run.resume import completed

        config, found = completed(config)
        if found.shape is None:
            raise ConfigError(Problem("model.pretrained", pretrained, "a Transformer", reason=found.why_not))
    if config.model.vocab_size is not None:
        return config
    from fundamentallm.data.corpus import vocabulary_size

    size = vocabulary_size(config.data)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


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
    import torch  # which --help need not wait for

    from fundamentallm.models.transformer import Transformer
    from fundamentallm.training.optimizers import freeze, make_optimizer

    training = config.training
    if training.optimizer not in OPTIMIZER_NAMES:
        training = dataclasses.replace(training, optimizer="adamw", optimizer_options={})
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


def sampler_of(config: Config, devices: int = 1) -> Any:
    """Returns the `StepSampler` of the busiest device, over endless data."""
    from fundamentallm.data.sampler import StepSampler  # imports torch

    training, size = config.training, config.training.micro_batch_size
    layout = devices - 1, devices, None if size == "auto" else size
    return StepSampler(2**62, training.batch_size or 0, None, *layout, schedule=training.batch_size_schedule)


def tokens_of_run(config: Config, steps: int) -> int:
    """Returns the tokens of the first `steps` optimizer steps, following `batch_size_schedule`."""
    return int(sampler_of(config).at(steps).samples) * config.data.sequence_length


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
    batch = sampler_of(config, devices).rank_batch(0)
    tokens = -(-batch.rows // batch.micro_batches) * config.data.sequence_length
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
    has_mask = config.data.packing or config.data.mask_documents  # one for all blocks, T x T for each sequence
    mask = size * tokens * config.data.sequence_length * has_mask
    activations = (model.num_layers - 1) * others + block + top + mask

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
    held = gradients if batch.micro_batches > 1 or shards == 1 < devices else 0
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


def _times(config: Config, counts: Counts, flops_per_second: float) -> Iterator[str]:
    """Yields the time of a step, and of the run or a dash."""
    # Activation checkpointing repeats the forward pass, a third of the FLOPs of a step.
    flops_per_token = counts.flops_per_token * (4 / 3 if config.training.activation_checkpointing else 1)
    for steps in (1, config.training.max_steps):
        yield "-" if steps is None else duration_text(tokens_of_run(config, steps) * flops_per_token / flops_per_second)
