"""Estimate memory, FLOPs and time of a run, for any model size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fundamentallm.commands.options import option_problems, parse_settings, settings_parser
from fundamentallm.config.schema import Config
from fundamentallm.config.validation import AT_LEAST_ONE, POSITIVE
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.training.throughput import PEAK_TFLOPS

UTILISATION = 0.4
"""Fraction of a GPU's peak in bfloat16 that a well-made run reaches."""


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line and return the exit code."""
    about = f"{__doc__} Nothing is allocated. The data is read only to count the characters of a character-level model."
    parser = settings_parser(program, "[--devices INT] [--gpu NAME]", about)
    devices = "number of devices; default: a table up to thousands"
    parser.add_argument("--devices", type=int, metavar="INT", help=devices)
    parser.add_argument("--gpu", default="H100", metavar="NAME", help=f"{', '.join(PEAK_TFLOPS)} [H100]")
    rate = f"10^12 operations per second of one device [{UTILISATION:.0%}% of the GPU's peak in bfloat16]"
    parser.add_argument("--tflops", type=float, metavar="FLOAT", help=rate)
    options, rest = parser.parse_known_args(arguments)
    problems = option_problems(options, devices=AT_LEAST_ONE, tflops=POSITIVE)
    gpu = " ".join(options.gpu.upper().replace("-", " ").split())
    if gpu not in PEAK_TFLOPS:
        advice = "Or set --tflops for another device."
        problems.append(Problem("--gpu", options.gpu, ", ".join(PEAK_TFLOPS), advice))
    config = _with_vocabulary(parse_settings(rest, program, problems, check_files=False))
    from fundamentallm.commands.estimate.counts import show  # imports torch

    if options.tflops is not None:
        show(config, options.devices, options.tflops, f"{options.tflops:g} TFLOP/s")
        return 0
    tflops = UTILISATION * PEAK_TFLOPS[gpu]
    rate = f"{tflops:.0f} TFLOP/s, {UTILISATION:.0%} of the peak of one {gpu}; --gpu or --tflops for others"
    show(config, options.devices, tflops, rate)
    return 0


def _with_vocabulary(config: Config) -> Config:
    """Returns the config with the shape of a pretrained model, or with the vocabulary of its data."""
    if config.model.lora is not None:
        advice = "Leave it out to estimate the training of all weights."
        raise ConfigError(Problem("model.lora", config.model.lora, "null: adapters are not counted", advice))
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
