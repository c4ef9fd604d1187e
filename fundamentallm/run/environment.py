"""Record of the program, packages and machine of a launch."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shlex
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fundamentallm.errors import is_launched

PACKAGES = ("fundamentallm", "torch", "accelerate", "safetensors", "tokenizers")
GIT_SECONDS = 5.0
"""Timeout of a git command; on a file system that is slower, the commit is not recorded."""


@functools.cache  # asked at each save; reading the packages' metadata takes 2 ms
def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that influence the results."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def environment(device: str, processes: int, mixed_precision: str) -> dict[str, Any]:
    """Returns what may explain why two launches differ: versions, machine, devices, command and commit."""
    return {
        **versions(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "device": device,
        "processes": processes,
        "mixed_precision": mixed_precision,
        "command": command(),
        "commit": commit(),
    }


def command() -> str:
    """Returns the command line that started this process, or its launcher if it has one."""
    words = sys.orig_argv
    if is_launched():
        with contextlib.suppress(OSError):  # without /proc, the launcher's own options are not known
            parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            words = parent if {*sys.argv[1:]} <= {*parent} else words
    if len(words) > 1 and os.access(words[1], os.X_OK) and not words[1].endswith(".py"):
        words = words[1:]  # a console script, which its first line runs with Python
    return shlex.join([os.path.basename(words[0]), *words[1:]])


def commit() -> str | None:
    """Returns the commit of the working directory, with "+" if files differ from it; None if there is none."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=GIT_SECONDS).stdout.strip()
    return None
