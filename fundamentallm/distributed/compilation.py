"""Compiling a model by torch.compile: whether and how, what a machine lacks for it, and the time it takes.

Modules are compiled in place, so that parameters keep their names, and for each shape by itself (`dynamic=False`):
which kernels a batch meets then depends on its shape alone and not on what came before, and a resumed run computes to
the bit what the uninterrupted one does. `StepSampler(pad=True)` sees to it that there is one shape, and another in
validation.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

MOST_SHAPES = 64
"""For which a function may be compiled within a process. torch's own 8 are counted over all models that a process
makes, and from the next one on it would compute uncompiled, in silence."""


def is_compiled(accelerator: Accelerator, wanted: bool | None) -> bool:
    """Whether to compile: what the config says (`wanted`), else the accelerate config."""
    return accelerator.state.dynamo_plugin.backend != DynamoBackend.NO if wanted is None else wanted


def compile_problems(accelerator: Accelerator, wanted: bool | None) -> list[str]:
    """Why a model cannot be compiled as the config says (`wanted`; None: nothing), and what to do about it."""
    backend = accelerator.state.dynamo_plugin.backend
    if wanted is False and backend != DynamoBackend.NO:
        return [
            f"training.compile is False and dynamo_backend in the accelerate config is {backend.value.lower()!r}; set "
            "one of them, or both alike."
        ]
    generates_code = backend == DynamoBackend.INDUCTOR or backend == DynamoBackend.NO
    if not (is_compiled(accelerator, wanted) and generates_code):
        return []
    lacks = _lacking(accelerator.device.type)
    return [f"training.compile is True and this machine has no {what}; or set it to false." for what in lacks]


def _lacking(device: str) -> list[str]:
    """What inductor needs to make kernels for a kind of device and does not find."""
    lacks = []
    if device == "cpu":
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            lacks.append(f"C++ compiler {compiler!r}; install it, or name another in the environment variable CXX")
    elif device in ("cuda", "xpu"):
        if find_spec("triton") is None:
            lacks.append("package triton; install the one that your torch was made for")
        if not any(shutil.which(name) for name in [os.environ.get("CC") or "gcc", "clang"]):
            lacks.append("C compiler; install gcc, or name another in the environment variable CC")
    else:
        return []  # a kind whose compiler is not known here
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        lacks.append(f"{header}; install Python's headers (such as the package python3-dev)")
    return lacks


def compile_in_place(accelerator: Accelerator, modules: Iterable[nn.Module]) -> None:
    """Compile modules when they are first called, as the accelerate config says, else by inductor."""
    torch._dynamo.config.recompile_limit = MOST_SHAPES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    _clock.listen()
    plugin = accelerator.state.dynamo_plugin
    options = {"dynamic": False, **plugin.to_kwargs()}
    if plugin.backend == DynamoBackend.NO:
        options["backend"] = "inductor"
    for module in modules:
        module.compile(**options)


class _CompileClock:
    """Adds up how long torch's compiler works, at whatever step, in whichever thread."""

    def __init__(self) -> None:
        self.seconds, self._since = 0.0, 0.0

    def listen(self) -> None:
        """Have torch tell when it compiles, from now on."""
        from torch._dynamo.callback import callback_handler

        if self._start not in callback_handler.start_callbacks:
            callback_handler.register_start_callback(self._start)
            callback_handler.register_end_callback(self._end)

    def _start(self, _: object) -> None:
        self._since = time.perf_counter()

    def _end(self, _: object) -> None:
        self.seconds += time.perf_counter() - self._since


_clock = _CompileClock()


def compile_seconds() -> float:
    """How long this process has compiled so far, from the first `compile_in_place` on."""
    return _clock.seconds
