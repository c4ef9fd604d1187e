"""Checks on one GPU what tests on a CPU cannot: `tests/gpu/run.sh`, or `python -m tests.gpu` if all is installed."""

import argparse
import dataclasses
import json
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from fundamentallm.commands.common import say, say_table
from tests.gpu.checks import CHECKS, Finding, described
from tests.gpu.runs import Runs, Skipped


def main() -> int:
    """Runs the checks; returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    names = ", ".join(f"{name}: {described(check)}" for name, check in CHECKS.items())
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"all by default. {names}".replace("%", "%%"))
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu only shows that the checks work [cuda]"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("gpu.json"), metavar="FILE", help="for the results [gpu.json]"
    )
    options = parser.parse_args()
    if unknown := set(options.checks) - set(CHECKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; allowed: {', '.join(CHECKS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; give --device cpu to try the checks out.")

    about = machine(options.device)
    say_table(list(about.items()), "<<")
    findings = []
    with tempfile.TemporaryDirectory(prefix="fundamentallm-gpu-") as folder:
        runs = Runs(Path(folder), options.device)
        for name in options.checks or CHECKS:
            say(f"... {name}: {described(CHECKS[name])}")
            findings.append(_finding(name, runs))
            say(f"    {findings[-1].status}: {findings[-1].text}")
    say("")
    say_table([(f.name, f.status, f"{f.seconds:.0f} s", f.text[:120]) for f in findings], "<<><")
    results = {"machine": about, "checks": [dataclasses.asdict(finding) for finding in findings]}
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    say(f"written to {options.output}")
    return int(any(finding.status == "FAILED" for finding in findings))


def _finding(name: str, runs: Runs) -> Finding:
    started = time.perf_counter()
    try:
        status, text = "passed", CHECKS[name](runs)
    except Skipped as reason:
        status, text = "skipped", str(reason)
    except Exception as error:  # the other checks still run
        status, text = "FAILED", f"{type(error).__name__}: {error}"
    return Finding(name, status, text, time.perf_counter() - started)


def machine(device: str) -> dict[str, str]:
    """Returns hardware and versions."""
    found = {"device": platform.processor() or platform.machine()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found = {
            "device": f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {torch.cuda.device_count()} in all",
            "CUDA": str(torch.version.cuda),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        }
    packages = {name: version(name) for name in ("torch", "accelerate", "safetensors", "tokenizers", "numpy")}
    return {**found, "Python": platform.python_version(), **packages}


if __name__ == "__main__":
    sys.exit(main())
