"""torch.compile: whether and how to compile a model, and what this machine lacks for it.

Modules are compiled in place, so parameters keep their names. Each shape gets its own kernels (`dynamic=False`). The
kernels of a batch then depend on its shape alone, not on earlier batches, and a resumed run is bit-identical.
`StepSampler` pads micro-batches, so there is one shape in training and another in validation.
"""

from __future__ import annotations

import inspect
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

from fundamentallm.errors import Problem

MAX_SHAPES = 64
"""Most shapes that one function is compiled for. torch's default of 8 counts over all models of a process; beyond it,
torch warns and runs the function uncompiled."""


def is_compiled(accelerator: Accelerator, wanted: bool | None) -> bool:
    """Returns whether to compile: `training.compile` (`wanted`), or the accelerate config if that is None."""
    return accelerator.state.dynamo_plugin.backend != DynamoBackend.NO if wanted is None else wanted


def compile_problems(accelerator: Accelerator, wanted: bool | None) -> list[str]:
    """Returns the reasons why a model cannot be compiled as `training.compile` (`wanted`) says."""
    backend = accelerator.state.dynamo_plugin.backend
    if wanted is False and backend != DynamoBackend.NO:
        reason = f"and dynamo_backend in the accelerate config is {backend.value.lower()!r}"
        return [Problem("training.compile", False, reason=reason, advice="Set only one of them, or both alike.")]
    generates_code = backend == DynamoBackend.INDUCTOR or backend == DynamoBackend.NO
    if not (is_compiled(accelerator, wanted) and generates_code):
        return []
    return [
        Problem("training.compile", True, reason=f"and {lack}", advice=f"{advice}, or set it to false.")
        for lack, advice in _missing_tools(accelerator.device.type)
    ]


def _missing_tools(device_type: str) -> list[tuple[str, str]]:
    """Returns what inductor needs to make kernels for a device and does not find, each with what to do."""
    missing = []
    if device_type == "cpu":
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            missing.append((f"there is no C++ compiler {compiler!r}", "Install it, or set CXX to another"))
    elif device_type in ("cuda", "xpu"):
        if find_spec("triton") is None:
            missing.append(("the package triton is not installed", "Install the version that your torch was built for"))
        if not any(shutil.which(name) for name in [os.environ.get("CC") or "gcc", "clang"]):
            missing.append(("there is no C compiler", "Install gcc, or set CC to another"))
    else:
        return []  # the needs of other devices are not known here
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        missing.append((f"there is no {header}", "Install Python's headers (such as the package python3-dev)"))
    return missing


def compile_in_place(accelerator: Accelerator, modules: Iterable[nn.Module]) -> None:
    """Have modules compiled at their first call, with the backend of the accelerate config, or inductor."""
    plugin = accelerator.state.dynamo_plugin
    options: dict[str, Any] = {"dynamic": False, **plugin.to_kwargs()}
    if plugin.backend == DynamoBackend.NO:
        options["backend"] = "inductor"
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # older versions of torch have none
        options["recompile_limit"] = MAX_SHAPES
    for module in modules:
        module.compile(**options)
