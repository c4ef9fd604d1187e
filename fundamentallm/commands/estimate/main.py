"""Work out what a run takes, at once for any size of model: parameters, memory, operations, bytes to send and save."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence

from fundamentallm.commands.estimate.counts import (
    DEVICES_OF_A_MACHINE,
    LAYOUTS,
    checkpoint_bytes,
    count_parameters,
    layout_of,
    micro_batches,
    optimizer_bytes,
    recomputed_flops,
    sent_bytes,
    step_flops,
    tokens_of_run,
    tokens_per_step,
)
from fundamentallm.commands.estimate.memory import memory
from fundamentallm.commands.output import say, say_table, size_text
from fundamentallm.config.command_line import parse_config
from fundamentallm.config.schema import OPTIMIZER_NAMES, Config
from fundamentallm.errors import ConfigError

COUNTS = (1, 8, 64, 512, 4096)
"""Devices of the table, where --devices does not say."""
SIZES = ("weights", "gradients", "optimizer", "activations", "logits", "exchange", "batch", "peak")
TIMES = ("sequences", "micro-batches", "computing", "sent", "sending", "saved", "saving")


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line; returns the exit code.

    Raises:
        ConfigError: listing what is wrong with the settings, or with the options.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        usage="%(prog)s --config FILE [--SECTION.SETTING VALUE ...] [--devices N] [--layout LAYOUT] ...",
        description=f"{__doc__} Settings are those of `fundamentallm train --help`; nothing is read but the text of a "
        "character-level model (to count its characters) or a tokenizer.json, and neither with model.vocab_size.",
        allow_abbrev=False,
    )
    parser.add_argument("--devices", type=int, metavar="N", help="how many; without it, from one to thousands")
    parser.add_argument(
        "--layout", choices=LAYOUTS,
        help="ddp: a copy of the model on each device; fsdp2: one among all; hsdp: one among the "
        f"{DEVICES_OF_A_MACHINE} of each machine; without it, all three",
    )  # fmt: skip
    parser.add_argument(
        "--kernels", choices=("gpu", "cpu"), default="gpu", help="torch's, which keep differently [gpu]"
    )
    parser.add_argument("--tflops", type=float, default=400, help="10^12 operations a device does in a second [400]")
    parser.add_argument("--network", type=float, default=50, help="10^9 bytes a device sends in a second [50]")
    parser.add_argument("--disk", type=float, default=1, help="10^9 bytes a device writes in a second [1]")
    options, rest = parser.parse_known_args(arguments)
    config = _parse(rest, options, program)
    _show_model(config)
    _show_devices(config, options)
    return 0


def _parse(arguments: Sequence[str], options: argparse.Namespace, program: str) -> Config:
    """The config with its vocabulary, once all that the command line says has been found right."""
    problems = []
    for name in ("devices", "tflops", "network", "disk"):
        value, least = getattr(options, name), "at least 1" if name == "devices" else "greater than 0"
        if value is not None and not 0 < value < float("inf"):
            problems.append(f"--{name} is {value}; allowed: {least}.")
    if options.layout == "hsdp" and options.devices and options.devices % min(options.devices, DEVICES_OF_A_MACHINE):
        problems.append(
            f"--devices is {options.devices} and --layout is hsdp; allowed: a multiple of {DEVICES_OF_A_MACHINE}, the "
            "devices of a machine."
        )
    config = Config()
    try:
        config = parse_config(arguments, program, check_files=False)  # the text may lie on another machine
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    if config.model.pretrained is not None:
        from fundamentallm.models.transformers_format import find_pretrained

        found = find_pretrained(config.model.pretrained)
        if found.shape is None:
            raise ConfigError(
                f"model.pretrained is {config.model.pretrained!r}; allowed: a Transformer; {found.why_not}."
            )
        return dataclasses.replace(config, model=dataclasses.replace(found.shape, dropout=config.model.dropout))
    if config.model.vocab_size is not None:
        return config
    from fundamentallm.data.corpus import vocabulary_size  # which takes half a second to import

    try:
        size = vocabulary_size(config.data)
    except ConfigError as error:
        raise ConfigError(
            [f"{problem} Or set model.vocab_size, and no text is needed." for problem in error.problems]
        ) from error
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def _show_model(config: Config) -> None:
    """What is the same for any number of devices."""
    training, p = config.training, count_parameters(config.model)
    inner, steps = p.without_tables, training.max_steps
    rows = [
        ("parameters", f"{p.total:,}; {inner:,} without embedding table and output projection"),
        ("optimizer step", f"{tokens_per_step(config):,} tokens, {step_flops(config):.3g} FLOPs"),
    ]
    if steps is not None:
        tokens = tokens_of_run(config, steps)
        flops = tokens * step_flops(config) / tokens_per_step(config)
        rows.append(("whole run", f"{steps:,} steps, {tokens:,} tokens, {flops:.3g} FLOPs"))
    kept = training.keep_last_n + (config.data.train_split < 1) + 1  # with the best, and the one being written
    guessed = "" if training.optimizer in OPTIMIZER_NAMES else ", taken to hold what Adam does"
    averaged = "" if training.ema_decay is None else " and the weights' average"
    state = f"{training.optimizer}{guessed}{averaged}: {size_text(optimizer_bytes(config))}"
    size = checkpoint_bytes(config)
    rows.append(("checkpoint", f"{size_text(size)} ({state}); on the disk up to {kept}: {size_text(kept * size)}"))
    unset = " (training.mixed_precision is not set)" if training.mixed_precision is None else ""
    rows.append(("mixed precision", f"{training.mixed_precision or 'no'}{unset}"))
    if training.micro_batch_size == "auto":
        rows.append(("micro-batches", "auto; below, each device computes all its sequences at once"))
    if training.batch_size_schedule:
        rows.append(("batches", "steps, memory and time are those of the first batch_size"))
    if training.parameter_groups:
        rows.append(("parameter groups", "left out of account: all parameters are taken to be trained"))
    say_table(rows, "<<")


def _show_devices(config: Config, options: argparse.Namespace) -> None:
    """Memory, time and bytes of each device, by number of devices and layout."""
    sizes: list[tuple[str, ...]] = [("devices", "layout", *SIZES)]
    times: list[tuple[str, ...]] = [("devices", "layout", *TIMES)]
    for devices, name in _layouts(config, options):
        layout = layout_of(name, devices)
        m = memory(config, layout, on_cpu=options.kernels == "cpu")
        parts = (m.weights, m.gradients, m.optimizer, m.activations, m.logits, m.gathered, m.batch, m.peak)
        sizes.append((f"{devices:,}", name, *map(size_text, parts)))
        rows, micro, _ = micro_batches(config, devices)
        sent, saved = sent_bytes(config, layout), checkpoint_bytes(config) // layout.shards
        computing = (step_flops(config) + recomputed_flops(config)) / devices / options.tflops / 1e12
        times.append(
            (
                *(f"{devices:,}", name, f"{rows:,}", f"{micro:,}", _seconds(computing)),
                *(size_text(sent), _seconds(sent / options.network / 1e9)),
                *(size_text(saved), _seconds(saved / options.disk / 1e9)),
            )
        )
    say("\nmemory of each device (its peak is below the sum: activations go as gradients come)")
    say_table(sizes, "><" + ">" * len(SIZES))
    say(
        f"\neach device, in one optimizer step and to save a checkpoint, at {options.tflops:g} TFLOP/s, "
        f"{options.network:g} GB/s sent and {options.disk:g} GB/s written"
    )
    say_table(times, "><" + ">" * len(TIMES))
    if options.devices is not None and options.devices > (config.training.batch_size or 0):
        say(
            f"\n{options.devices - (config.training.batch_size or 0):,} devices have nothing to compute: "
            f"training.batch_size is {config.training.batch_size:,} sequences over all devices."
        )


def _layouts(config: Config, options: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """Those asked for; else all that differ, on numbers of devices that all have something to compute."""
    counts = [count for count in COUNTS if count <= (config.training.batch_size or 0)]
    for devices in counts if options.devices is None else [options.devices]:
        machines, rest = divmod(devices, DEVICES_OF_A_MACHINE)
        all_that_differ = ["ddp", *["fsdp2"] * (devices > 1), *["hsdp"] * (machines > 1 and rest == 0)]
        yield from ((devices, name) for name in (options.layout and [options.layout]) or all_that_differ)


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
