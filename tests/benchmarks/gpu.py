"""How fast training is on one GPU: tests/benchmarks/gpu.sh, or python -m tests.benchmarks.gpu where all is installed.

Each row is a real run by the command line, in bf16. Its tokens per second are the median over log lines of 5 steps, but
for the first two; the time of compiling is told apart. The model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B)
is

    tokens per second x (6 N + 12 L H Q T) / P

with N parameters that tokens are multiplied with, L blocks of H heads of Q features, T tokens in a sequence (attention
in full, although a causal kernel may leave out half), and P the FLOP/s of a product of two 8192 x 8192 matrices in
bf16, measured in the same process after the run: what the card reaches, rather than what its data sheet says. What
lies outside the model is the part of a step that is not its forward and backward passes, which are timed by themselves
after the run, on the same batch.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fundamentallm.commands.common import say, say_table
from fundamentallm.commands.estimate import count, memory
from fundamentallm.config.schema import Config
from tests.gpu.__main__ import machine
from tests.gpu.runs import Runs, lines, seen

TARGET = 0.5
STEPS, EVERY = 40, 5
GPT2 = {"vocab_size": 50_304, "d_model": 768, "num_heads": 12, "num_layers": 12, "tie_embeddings": True}
ONE_B = {"vocab_size": 50_304, "d_model": 2048, "num_heads": 16, "num_layers": 24, "tie_embeddings": True}
ROWS: dict[str, tuple[dict[str, Any], int, int, bool]] = {
    "GPT-2 124M": (GPT2, 1024, 64, True),
    "GPT-2 124M, uncompiled": (GPT2, 1024, 64, False),
    "1B": (ONE_B, 2048, 32, True),
}
"""Model, sequence length, sequences a step, and whether it is compiled. The blocks are ours (SwiGLU, rotary positions)
with as many parameters as GPT-2's; a vocabulary that 128 divides, since kernels like that."""
TINY: dict[str, Any] = {"vocab_size": 2048, "d_model": 32, "num_heads": 2, "num_layers": 2}


def config_of(runs: Runs, name: str, memory_bytes: int) -> Config:
    """The run of a row, with the largest micro-batch that takes at most 85 % of the device's memory."""
    model, length, batch, compiles = ROWS[name]
    training = {"mixed_precision": "bf16", "compile": compiles, "max_steps": STEPS, "log_every_n_steps": EVERY}
    training |= {"hooks": ["ModelAlone", "MatrixProduct"]}
    folder = name.replace(" ", "-").replace(",", "")
    if not runs.on_gpu:
        return runs.config(folder, TINY, **training, sequence_length=64, batch_size=4, micro_batch_size=2)
    size, counts = batch, None
    while True:
        config = runs.config(folder, model, **training, sequence_length=length, batch_size=batch, micro_batch_size=size)
        counts = counts or count(config)
        if size == 1 or memory(config, counts).peak < 0.85 * memory_bytes:
            return config
        size //= 2


def measured(config: Config, folder: Path) -> dict[str, Any]:
    """The figures of a run that has ended."""
    rate = statistics.median(line["tokens_per_second"] for line in lines(folder)[2:])
    counts, tokens = count(config), (config.training.batch_size or 0) * config.data.sequence_length
    facts, alone = seen(folder, "Facts"), seen(folder, "ModelAlone")["seconds"]
    product = seen(folder, "MatrixProduct")["flops_per_second"]
    return {
        "parameters": counts.parameters,
        "micro_batch_size": config.training.micro_batch_size,
        "first_step_seconds": facts["first_step_seconds"],
        "tokens_per_second": rate,
        "flops_per_second": rate * counts.flops_per_token,
        "product_flops_per_second": product,
        "utilisation": rate * counts.flops_per_token / product,
        "outside_the_model": 1 - alone * rate / tokens,
        "peak_bytes": facts["peak_bytes"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tests/benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(map(repr, ROWS))}; all by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries it out [cuda]")
    parser.add_argument(
        "--output", type=Path, default=Path("gpu_speed.json"), metavar="FILE", help="of the figures [gpu_speed.json]"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; allowed: {', '.join(ROWS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; give --device cpu to try it out.")
    about = machine(options.device)
    say_table(list(about.items()), "<<")
    memory_bytes = torch.cuda.get_device_properties(0).total_memory if options.device == "cuda" else 0
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="fundamentallm-gpu-") as folder:
        runs = Runs(Path(folder), options.device)
        for name in options.rows or ROWS:
            say(f"... {name}")
            config = config_of(runs, name, memory_bytes)
            try:
                found[name] = measured(config, runs.run(config, module="tests.gpu.unsaved"))
            except AssertionError as error:  # the run failed; the others go on
                found[name] = {"error": str(error)}
                say(f"    FAILED: {error}")
            options.output.write_text(json.dumps({"machine": about, "rows": found}, indent=2) + "\n")
    right = {name: row for name, row in found.items() if "error" not in row}
    columns = (
        "run",
        "micro-batch",
        "first step",
        "tokens/s",
        "TFLOP/s",
        "product's",
        "utilisation",
        "outside the model",
    )
    say("\n| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    for name, row in right.items():
        ours, product = row["flops_per_second"] / 1e12, row["product_flops_per_second"] / 1e12
        say(
            f"| {name} | {row['micro_batch_size']} | {row['first_step_seconds']:.0f} s "
            f"| {row['tokens_per_second']:,.0f} | {ours:,.3g} | {product:,.3g} | {row['utilisation']:.1%} "
            f"| {row['outside_the_model']:.1%} |"
        )
    say(f"\nThe target is {TARGET:.0%}. Written to {options.output}.")
    return int(len(right) < len(found))


if __name__ == "__main__":
    sys.exit(main())
