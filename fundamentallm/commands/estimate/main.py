"""Estimate memory, FLOPs and time of a run, for any model size."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from fundamentallm.commands.estimate import counts
from fundamentallm.commands.estimate.memory import memory
from fundamentallm.commands.options import option_problems, parse_settings, settings_parser
from fundamentallm.commands.output import say, say_table
from fundamentallm.config.schema import OPTIMIZER_NAMES, Config
from fundamentallm.config.units import duration_text, size_text
from fundamentallm.config.validation import AT_LEAST_ONE, POSITIVE
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.training.throughput import PEAK_TFLOPS

DEVICES = (1, 8, 64, 512, 4096)
"""Rows of the table without --devices."""
COLUMNS = ("weights", "gradients", "optimizer", "activations", "logits", "gathered", "peak")
UTILISATION = 0.4
"""Fraction of a GPU's peak in bfloat16 that a well-made run reaches."""


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line and return the exit code."""
    about = f"{__doc__} Nothing is allocated. The data is read only to count the characters of a character-level model."
    parser = settings_parser(program, "[--devices INT] [--gpu NAME]", about)
    parser.add_argument(
        "--devices", type=int, metavar="INT", help="number of devices; default: a table up to thousands"
    )
    parser.add_argument("--gpu", default="H100", metavar="NAME", help=f"{', '.join(PEAK_TFLOPS)} [H100]")
    rate = f"10^12 operations per second of one device [{UTILISATION:.0%}% of the GPU's peak in bfloat16]"
    parser.add_argument("--tflops", type=float, metavar="FLOAT", help=rate)
    options, rest = parser.parse_known_args(arguments)
    problems = option_problems(options, devices=AT_LEAST_ONE, tflops=POSITIVE)
    options.gpu = " ".join(options.gpu.upper().replace("-", " ").split())
    if options.gpu not in PEAK_TFLOPS:
        advice = "Or set --tflops for another device."
        problems.append(Problem("--gpu", options.gpu, ", ".join(PEAK_TFLOPS), advice))
    config = _with_vocabulary(parse_settings(rest, program, problems, check_files=False))
    say_table(_run_rows(config), "<<")
    _show_devices(config, options)
    return 0


def _with_vocabulary(config: Config) -> Config:
    """Returns the config with the shape of a pretrained model, or with the vocabulary of its data."""
    if (pretrained := config.model.pretrained) is not None:
        from fundamentallm.checkpoint.reading import explained
        from fundamentallm.models.transformers_format import find_pretrained

        with explained(Path(pretrained)):
            found = find_pretrained(pretrained)
        if found.shape is None:
            raise ConfigError([Problem("model.pretrained", pretrained, "a Transformer", reason=str(found.why_not))])
        return dataclasses.replace(config, model=dataclasses.replace(found.shape, dropout=config.model.dropout))
    if config.model.vocab_size is not None:
        return config
    from fundamentallm.data.corpus import vocabulary_size

    try:
        size = vocabulary_size(config.data)
    except ConfigError as error:
        advice = Problem("", advice="Or set model.vocab_size: no text is needed then.")
        raise ConfigError([*error.problems, advice]) from error
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def _run_rows(config: Config) -> Iterator[tuple[str, str]]:
    """Yields (title, text) of what does not depend on the devices."""
    training, p, steps = config.training, counts.count_parameters(config.model), config.training.max_steps
    step_tokens, step_flops = counts.tokens_per_step(config), counts.step_flops(config)
    yield "parameters", f"{p.total:,}; {p.without_tables:,} without embedding table and output projection"
    yield "optimizer step", f"{step_tokens:,} tokens, {step_flops:.3g} FLOPs"
    if steps is not None:
        tokens = counts.tokens_of_run(config, steps)
        yield "whole run", f"{steps:,} steps, {tokens:,} tokens, {tokens / step_tokens * step_flops:.3g} FLOPs"
    kept = training.keep_last_n + (config.data.train_split < 1) + 1  # with the best, and the one being written
    size, state = counts.checkpoint_bytes(config), size_text(counts.optimizer_bytes(config))
    yield "checkpoint", f"{size_text(size)} ({state} of it optimizer state); up to {kept}: {size_text(kept * size)}"
    yield "mixed precision", training.mixed_precision or "no"
    if training.optimizer not in OPTIMIZER_NAMES:
        yield "optimizer", f"{training.optimizer} is assumed to have Adam's state"
    if training.micro_batch_size == "auto":
        yield "micro-batches", "auto: one per step is assumed"
    if training.batch_size_schedule:
        yield "batches", "steps and memory are those of the first batch_size"
    if training.parameter_groups:
        yield "parameter groups", "ignored: all parameters are assumed to be trained"


def _show_devices(config: Config, options: argparse.Namespace) -> None:
    """Print memory and time of each device: as replicas (DDP), and sharded over all of them (FSDP2)."""
    training, steps = config.training, config.training.max_steps
    batch_size, tflops = training.batch_size or 0, options.tflops or UTILISATION * PEAK_TFLOPS[options.gpu]
    rate = f"{tflops:g} TFLOP/s"
    if options.tflops is None:
        rate = f"{tflops:.0f} TFLOP/s, {UTILISATION:.0%} of the peak of one {options.gpu}; --gpu or --tflops for others"
    # Activation checkpointing repeats the forward pass, a third of the FLOPs of a step.
    flops = counts.step_flops(config) * (4 / 3 if training.activation_checkpointing else 1)
    rows: list[tuple[str, ...]] = [("devices", "layout", *COLUMNS, "step", "run")]
    for devices in [options.devices] if options.devices else [n for n in DEVICES if n <= batch_size]:
        seconds, run = flops / devices / tflops / 1e12, "-"
        if steps is not None:
            run = duration_text(seconds * counts.tokens_of_run(config, steps) / counts.tokens_per_step(config))
        for layout in ("ddp", "fsdp2") if devices > 1 else ("ddp",):
            sizes = map(size_text, memory(config, devices, layout))
            rows.append((f"{devices:,}", layout, *sizes, duration_text(seconds), run))
    say(f"\nmemory of each device, and time to compute ({rate})")
    say_table(rows, "><" + ">" * (len(COLUMNS) + 2))
    if options.devices is not None and options.devices > batch_size:
        idle = options.devices - batch_size
        say(f"\n{idle:,} devices have nothing to compute: training.batch_size is {batch_size:,}, over all devices.")
