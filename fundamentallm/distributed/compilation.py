"""torch.compile: whether and how to compile a model.

Modules are compiled in place, so parameters keep their names. Each shape gets its own kernels (`dynamic=False`). The
kernels of a batch then depend on its shape alone, not on earlier batches, and a resumed run is bit-identical.
`StepSampler` pads micro-batches, so there is one shape in training and another in validation.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
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


def compile_problems(accelerator: Accelerator, wanted: bool | None) -> list[Problem]:
    """Returns the problem of a `training.compile` (`wanted`) that the accelerate config contradicts, if it does."""
    if wanted is not False or not is_compiled(accelerator, None):
        return []
    backend = accelerator.state.dynamo_plugin.backend.value.lower()
    reason = f"and dynamo_backend in the accelerate config is {backend!r}"
    return [Problem("training.compile", False, reason=reason, advice="Set only one of them, or both alike.")]


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
