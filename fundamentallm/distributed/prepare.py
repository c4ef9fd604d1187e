"""A model spread over devices: accelerate's FSDP2, each decoder block a unit.

Parameters, gradients and optimizer state are DTensors then, of which each process holds a slice. The model stays the
caller's object, and its parameters keep their names.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, broadcast, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import distribute_tensor
from torch.optim import SGD, Optimizer

from fundamentallm.distributed.compilation import compile_in_place
from fundamentallm.errors import ConfigError
from fundamentallm.models.with_loss import ModelWithLoss


def prepare_model(
    accelerator: Accelerator,
    model: nn.Module,
    loss_fn: Any,
    seed: int,
    activation_checkpointing: bool | None = None,
    compiles: bool = False,
) -> nn.Module:
    """Model and loss in one module, on its device and spread as the processes were launched.

    Args:
        accelerator: of this process.
        model: maps inputs to logits. Under FSDP2 it may be on the meta device, to get its memory, and the weights of
            its `initial_weights()`, slice by slice: thus a model larger than a device can start.
        loss_fn: maps (logits, targets) to the sum over targets.
        seed: of initial weights that are drawn here.
        activation_checkpointing: whether to compute each block again in the backward pass; None: as the accelerate
            config says.
        compiles: whether to compile it; under FSDP2, each block by itself, since its weights come and go.

    Raises:
        ConfigError: if the model, or the accelerate config, does not allow it.
    """
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    has_values = hasattr(model, "initial_weights") and not any(buffer.is_meta for buffer in model.buffers())
    if is_meta and not (accelerator.is_fsdp2 and has_values):
        raise ConfigError(
            f"the model, a {type(model).__name__}, has parameters on the meta device; allowed: under FSDP2, where it "
            "has a method initial_weights() that yields (name, tensor) for each, and no buffer there."
        )
    if _recomputes(accelerator, activation_checkpointing):
        if not hasattr(model, "gradient_checkpointing_enable"):
            raise ConfigError(
                f"training.activation_checkpointing is true and the model, a {type(model).__name__}, has no method "
                "gradient_checkpointing_enable(), as transformers' models and our Transformer do; set it to false."
            )
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    if not accelerator.is_fsdp2:
        whole = ModelWithLoss(model.to(accelerator.device), loss_fn)
        compiler = accelerator.state.dynamo_plugin
        backend = compiler.backend
        if compiles:
            compile_in_place(accelerator, [whole])
        compiler.backend = DynamoBackend.NO  # or accelerate would compile it too, wrapped
        try:
            return accelerator.prepare_model(whole)  # type: ignore[no-any-return]
        finally:
            compiler.backend = backend
    if isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
        raise ConfigError("fsdp_offload_params is true in the accelerate config; allowed: false.")
    if is_meta:
        torch.manual_seed(seed)
        for layer in model.modules():
            # What their constructors would have drawn on a CPU, so that the weights are those of a single process.
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                copy.deepcopy(layer).to_empty(device="cpu").reset_parameters()
    else:
        _begin_alike(accelerator, model)
    if compiles:
        compile_in_place(accelerator, _blocks(model))
    _shard(accelerator, model)
    if is_meta:
        model.to_empty(device=accelerator.device)
        _fill(model)
    return ModelWithLoss(model, loss_fn)


def _recomputes(accelerator: Accelerator, wanted: bool | None) -> bool:
    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    launched = plugin is not None and plugin.activation_checkpointing
    if wanted is False and launched:
        raise ConfigError(
            "training.activation_checkpointing is False and fsdp_activation_checkpointing in the accelerate config is "
            "True; set one of them, or both alike."
        )
    return bool(wanted or launched)


def _blocks(model: nn.Module) -> list[nn.Module]:
    kinds = getattr(model, "_no_split_modules", None) or ()
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise ConfigError(
            f"training.compile is true and the model, a {type(model).__name__}, does not name its blocks' classes in "
            "_no_split_modules, as transformers' models and our Transformer do; set it to false under FSDP2."
        )
    return blocks


def _shard(accelerator: Accelerator, model: nn.Module) -> None:
    plugin = accelerator.state.fsdp_plugin
    # accelerate's own policy adds gradients up in the precision of the forward pass.
    computed_in = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=computed_in, reduce_dtype=torch.float32)
    plugin.cpu_ram_efficient_loading = False  # `_begin_alike` and `_fill` see to the same
    # Not by accelerator.prepare, which wants the optimizer too, and finds its parameters by their addresses: those of
    # the meta device have none.
    fsdp2_prepare_model(accelerator, model)


@torch.no_grad()
def _begin_alike(accelerator: Accelerator, model: nn.Module) -> None:
    """Give all processes the first one's weights and buffers, as DistributedDataParallel does.

    Where they drew others, the weights would be made of pieces that do not belong together, and replicas differ.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.copy_(broadcast(tensor.detach().to(accelerator.device).contiguous()))


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Give each process its slices of the initial weights, whose whole tensors exist one at a time.

    Raises:
        ConfigError: if some parameters are given none.
    """
    empty = {parameter: name for name, parameter in model.named_parameters()}
    for name, values in model.initial_weights():  # type: ignore[operator]
        parameter = model.get_parameter(name)
        empty.pop(parameter, None)
        # All processes have drawn the same values: none has to send any (src_data_rank=None).
        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        parameter.copy_(distribute_tensor(values.to(parameter.device), mesh, placements, src_data_rank=None))
    if empty:
        raise ConfigError(
            f"initial_weights() of the model yields nothing for {', '.join(empty.values())}, and has to for "
            "each parameter."
        )


def follow(optimizer: Optimizer, names: dict[int, str], model: nn.Module) -> None:
    """Have an optimizer that was made before the model was sharded train the parameters it has now.

    Args:
        optimizer: fresh.
        names: of the parameters it was made for, by id.
        model: sharded since.

    Raises:
        ConfigError: if it has taken steps already, or has parameters that are not the model's.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    if any(id(parameter) not in names for parameter in parameters) or any(bool(moment.any()) for moment in moments):
        raise ConfigError(
            "the optimizer has taken steps, or has parameters that are not the model's; under FSDP2, give one that is "
            "fresh and over this model, or name it in training.optimizer."
        )
    states = dict(optimizer.state)
    optimizer.state.clear()
    for parameter, state in states.items():  # which some make at once, and rely on
        sharded = model.get_parameter(names[id(parameter)])
        optimizer.state[sharded] = {
            key: torch.zeros_like(sharded) if isinstance(value, Tensor) and value.shape == sharded.shape else value
            for key, value in state.items()
        }
    for group in optimizer.param_groups:
        group["params"] = [model.get_parameter(names[id(parameter)]) for parameter in group["params"]]
        if isinstance(optimizer, SGD) and group["fused"]:  # a kernel that does not know DTensors
            group["fused"] = optimizer._step_supports_amp_scaling = False
