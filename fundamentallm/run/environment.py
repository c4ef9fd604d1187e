"""What a run was made with: program, packages, machine; written down at each of its starts."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import version
from typing import Any

PACKAGES = ("fundamentallm", "torch", "accelerate", "safetensors", "tokenizers")
GIT_SECONDS = 5.0
"""After which a slow file system goes without a commit."""


@functools.cache  # each save asks, and the packages' files take 2 ms to read
def versions() -> dict[str, str]:
    """Of Python and of the packages that make the numbers."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def environment(device: str, processes: int, precision: str) -> dict[str, Any]:
    """What a start of a run would have to be told apart by.

    Args:
        device: its name.
        processes: in the group, one for each device.
        precision: of the forward and backward pass.
    """
    return {
        **versions(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "device": device,
        "processes": processes,
        "mixed_precision": precision,
        "command": " ".join(sys.argv),
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of the working directory, with '+' where files differ from it; None where there is none."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return _git("rev-parse", "HEAD") + "+" * bool(_git("status", "--porcelain", "--untracked-files=no"))
    return None


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=GIT_SECONDS)
    return done.stdout.strip()
