"""Preparing model and optimizer with accelerate: placement, DistributedDataParallel, FSDP2, compilation.

The model stays the caller's object, and its parameters keep their names. Under FSDP2, each decoder block is a unit;
parameters, gradients and optimizer state are DTensors, of which each process holds a shard.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, broadcast
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.optim import SGD, Optimizer

from fundamentallm.errors import ConfigError, Problem

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def place_model(
    accelerator: Accelerator,
    model: nn.Module,
    seed: int,
    activation_checkpointing: bool | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Give a model its memory, before an optimizer is made for its parameters. Raises ConfigError if that cannot be.

    Under FSDP2 the model may be on the meta device, so that only the main process holds a full copy of the weights.
    They come from its `initial_weights()`, and those that are drawn follow from `seed`. If `activation_checkpointing`
    is None, the accelerate config decides. `say` prints a line if weights were converted.
    """
    fsdp = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    if activation_checkpointing is None:
        activation_checkpointing = fsdp is not None and fsdp.activation_checkpointing
    if activation_checkpointing:
        if not hasattr(model, "gradient_checkpointing_enable"):
            reason = f"and {type(model).__name__} has no method gradient_checkpointing_enable()"
            raise ConfigError(Problem("training.activation_checkpointing", True, "false", reason=reason))
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    if converted := _widen(model, None if accelerator.is_fsdp2 else NARROW.get(accelerator.mixed_precision)):
        say(converted)
    if not any(parameter.is_meta for parameter in model.parameters()):
        if not accelerator.is_fsdp2:  # which moves one block after the other
            model.to(accelerator.device)
        return
    if not accelerator.is_fsdp2 or not hasattr(model, "initial_weights") or any(b.is_meta for b in model.buffers()):
        allowed = "under FSDP2, one whose initial_weights() yields (name, tensor) of each parameter, without buffers"
        raise ConfigError(Problem("model", text=f"{type(model).__name__} is on the meta device", allowed=allowed))
    _draw_weights(model, seed, accelerator.is_main_process)


def _widen(model: nn.Module, computed_in: torch.dtype | None) -> str:
    """Converts 16-bit weights and buffers to float32, as updates are too small for 16 bits. Returns a line to print.

    Frozen weights stay in the precision that autocast uses (`computed_in`), quantized ones (own classes) as they are.
    """
    narrow = [p for p in model.parameters() if p.dtype in NARROW.values()]
    wide = [p for p in narrow if p.requires_grad or (type(p) is nn.Parameter and p.dtype != computed_in)]
    if not wide:
        return ""
    kinds = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in wide}))
    for tensor in (*wide, *(buffer for buffer in model.buffers() if buffer.dtype in NARROW.values())):
        tensor.data = tensor.data.float()
    return f"{len(wide)} weights were {kinds} and are now float32 (training.mixed_precision computes in 16 bits)"


def prepare_model(
    accelerator: Accelerator, model_with_loss: nn.Module, optimizer: Optimizer, compiles: bool = False
) -> nn.Module:
    """Returns model and loss distributed as the processes were launched. Raises ConfigError if that cannot be.

    `model_with_loss.model` is as `place_model` left it. Under FSDP2 the groups of the optimizer hold the sharded
    parameters afterwards, and each block is compiled by itself: its weights are gathered for its forward pass only.
    """
    dynamo = accelerator.state.dynamo_plugin
    if not accelerator.is_fsdp2:
        if compiles:
            compile_in_place(accelerator, [model_with_loss])
        with _changed(dynamo, backend=DynamoBackend.NO):  # otherwise accelerate compiles it too, in a wrapper
            return accelerator.prepare(model_with_loss, optimizer)[0]  # type: ignore[no-any-return]
    fsdp = accelerator.state.fsdp_plugin
    if isinstance(fsdp.cpu_offload, CPUOffloadPolicy):
        raise ConfigError(Problem("accelerate_config.fsdp_offload_params", True, "false"))
    model: nn.Module = model_with_loss.model  # type: ignore[assignment]
    of_model = set(model.parameters())
    # accelerate takes over the groups of an optimizer, but no state.
    if optimizer.state or any(p not in of_model for group in optimizer.param_groups for p in group["params"]):
        allowed = "under FSDP2, one over this model's parameters that has taken no step"
        raise ConfigError(Problem("optimizer", type(optimizer).__name__, allowed))
    for group in optimizer.param_groups if type(optimizer) is SGD else ():
        group["fused"] = False  # torch's fused kernel for SGD does not know DTensors
    for parameter in of_model:
        parameter.data = parameter.data.contiguous()  # FSDP2 refuses other layouts
    if compiles:
        kinds = getattr(model, "_no_split_modules", None)
        if not kinds:
            reason = f"and {type(model).__name__} does not name its blocks' classes in _no_split_modules"
            raise ConfigError(Problem("training.compile", True, "false under FSDP2", reason=reason))
        compile_in_place(accelerator, [module for module in model.modules() if type(module).__name__ in kinds])
    loads = fsdp.cpu_ram_efficient_loading and _can_load_efficiently(model)
    if not loads:
        _copy_from_main(accelerator, model)
    # accelerate's activation checkpointing and compilation would rename parameters.
    off = _changed(fsdp, activation_checkpointing=False, cpu_ram_efficient_loading=loads)
    with off, _changed(dynamo, backend=DynamoBackend.NO):
        accelerator.prepare(model, optimizer)
    # The model itself is the FSDP2 root, so that generating text can call it without the loss.
    return model_with_loss


@contextmanager
def _changed(settings: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(settings, name) for name in values}
    for name, value in values.items():
        setattr(settings, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


@torch.no_grad()
def _draw_weights(model: nn.Module, seed: int, is_main_process: bool) -> None:
    """Moves a model from the meta device to the CPU, and draws the weights of a single process on the main one."""
    # Memory that is not written to costs nothing. (`to_empty` would untie parameters.)
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in replaced:
                empty = torch.empty_like(parameter, device="cpu")
                replaced[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module.register_parameter(name, replaced[parameter])
    torch.manual_seed(seed)
    for layer in model.modules() if is_main_process else ():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            layer.reset_parameters()  # draws as the constructor on a CPU does
    missing = {parameter: name for name, parameter in model.named_parameters()}
    for name, values in model.initial_weights():  # type: ignore[operator]
        missing.pop(model.get_parameter(name), None)
        if is_main_process:
            model.get_parameter(name).copy_(values)
    if missing:
        raise ConfigError(f"initial_weights() of the model yields nothing for {', '.join(missing.values())}.")


def _can_load_efficiently(model: nn.Module) -> bool:
    # accelerate fails for persistent buffers, and unties parameters unless the model has a method `tie_weights`.
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    is_tied = len(names) > len(list(model.parameters()))
    return names >= model.state_dict().keys() and (not is_tied or hasattr(model, "tie_weights"))


@torch.no_grad()
def _copy_from_main(accelerator: Accelerator, model: nn.Module) -> None:
    """Give all processes the parameters and buffers of the main one, as DistributedDataParallel does."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.copy_(broadcast(tensor.detach().to(accelerator.device).contiguous()))


def compile_in_place(accelerator: Accelerator, modules: Iterable[nn.Module]) -> None:
    """Have modules compiled at their first call, with the backend of the accelerate config, or inductor.

    Each shape gets its own kernels (`dynamic=False`). The kernels of a batch then depend on its shape alone, not on
    earlier batches, and a resumed run is bit-identical. `StepSampler` pads micro-batches to one shape.
    """
    plugin = accelerator.state.dynamo_plugin
    options: dict[str, Any] = {"dynamic": False, **plugin.to_kwargs()}
    if plugin.backend == DynamoBackend.NO:
        options["backend"] = "inductor"
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # which older versions lack
        options["recompile_limit"] = 64  # shapes; after 8, torch would run a function uncompiled
    for module in modules:
        module.compile(**options)
