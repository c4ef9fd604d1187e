"""Optimizers by name, with decay on matrices only."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from fundamentallm.config.registry import did_you_mean, resolve
from fundamentallm.config.schema import OPTIMIZER_NAMES, ParameterGroup, TrainingConfig
from fundamentallm.config.validation import from_dict, range_problems
from fundamentallm.errors import ConfigError
from fundamentallm.training.muon import AdamW, Muon

FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}
"""Where torch has one kernel for a whole step; on a CPU it was measured 17 times faster than `foreach`."""


def _decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with decay, vectors (norms, biases) without; no empty group."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _hidden_matrices(model: nn.Module) -> set[Tensor]:
    """Weights of linear layers, without the output projection: what Muon is for.

    The output projection is `get_output_embeddings()` where the model has it, else its last linear layer.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    known_head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = [known_head] if known_head is not None else linear[-1:]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outside = {id(parameter) for module in (*heads, *embeddings) for parameter in module.parameters()}  # tied or not
    return {layer.weight for layer in linear if id(layer.weight) not in outside}


def create_optimizer(
    model: nn.Module,
    optimizer_type: str,
    learning_rate: float,
    weight_decay: float = 0.0,
    *,
    adam_learning_rate: float | None = TrainingConfig.adam_learning_rate,
    adam_beta1: float = TrainingConfig.adam_beta1,
    adam_beta2: float = TrainingConfig.adam_beta2,
    adam_epsilon: float = TrainingConfig.adam_epsilon,
    momentum: float = TrainingConfig.momentum,
    muon_momentum: float = TrainingConfig.muon_momentum,
    **options: Any,
) -> Optimizer:
    """An optimizer over the model's trainable parameters, fused where the device has it.

    Args:
        model: already on its device.
        optimizer_type: adamw, adam, sgd, muon, or 'module:name' of an `Optimizer` class.
        learning_rate: peak, per step.
        weight_decay: of matrices; decoupled (adamw, muon) or added to the gradient (adam, sgd).
        adam_learning_rate: of what muon leaves to AdamW; None: `learning_rate`.
        adam_beta1: decay of the first moment.
        adam_beta2: decay of the second moment.
        adam_epsilon: added to the root of the second moment.
        momentum: of sgd.
        muon_momentum: of muon.
        options: further keyword arguments of a 'module:name' class.

    Raises:
        ConfigError: if a name or option is not known, a value is outside its range, or nothing is trainable.

    Examples:
        >>> from torch import nn
        >>> from fundamentallm import create_optimizer
        >>> optimizer = create_optimizer(nn.Linear(4, 2), "adamw", learning_rate=1e-3, weight_decay=0.1)
        >>> [group["weight_decay"] for group in optimizer.param_groups]  # the matrix, the vector
        [0.1, 0.0]
    """
    problems = range_problems(
        learning_rate=learning_rate,
        adam_learning_rate=adam_learning_rate,
        weight_decay=weight_decay,
        adam_beta1=adam_beta1,
        adam_beta2=adam_beta2,
        adam_epsilon=adam_epsilon,
        momentum=momentum,
        muon_momentum=muon_momentum,
    )
    kind = optimizer_type.lower()
    if options and kind in OPTIMIZER_NAMES:
        known = [name for name in inspect.signature(create_optimizer).parameters if name != "options"]
        problems.append(f"{kind} has no {sorted(options)}; allowed: {', '.join(known[4:])}.")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        problems.append("the model has no parameter that requires a gradient; unfreeze some.")
    if problems:
        raise ConfigError(problems)

    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)
    groups = _decay_groups(parameters, weight_decay)
    betas = (adam_beta1, adam_beta2)
    if kind == "adamw":
        made_of = AdamW if fused else torch.optim.AdamW
        return made_of(groups, lr=learning_rate, betas=betas, eps=adam_epsilon, fused=fused)
    if kind == "adam":
        return Adam(groups, lr=learning_rate, betas=betas, eps=adam_epsilon, fused=fused)
    if kind == "sgd":
        # torch's fused kernel does not know DTensors, which sharded parameters are.
        fused = fused and not any(hasattr(parameter, "device_mesh") for parameter in parameters)
        sgd = SGD(groups, lr=learning_rate, momentum=momentum, fused=fused)
        if momentum:
            # torch's fused kernel takes uninitialised memory for momentum where the very first step is skipped.
            for parameter in parameters:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if kind == "muon":
        hidden = _hidden_matrices(model)
        rest = _decay_groups((p for p in parameters if p not in hidden), weight_decay)
        groups = [{"params": [p for p in parameters if p in hidden], "weight_decay": weight_decay, "muon": True}]
        adam = {"muon": False, "lr": learning_rate if adam_learning_rate is None else adam_learning_rate}
        groups = [group for group in groups if group["params"]] + [group | adam for group in rest]
        return Muon(groups, learning_rate, betas, adam_epsilon, muon_momentum, fused)
    made_by = resolve("optimizer", optimizer_type, dict.fromkeys(OPTIMIZER_NAMES))
    try:
        return made_by(groups, lr=learning_rate, **options)  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer {optimizer_type} cannot be made with {options!r}: {error}.") from error


def make_optimizer(config: TrainingConfig, model: nn.Module) -> Optimizer:
    """The optimizer of `config` over a model that is on its device already."""
    optimizer = create_optimizer(
        model,
        config.optimizer,
        config.learning_rate,
        config.weight_decay,
        adam_learning_rate=config.adam_learning_rate,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        momentum=config.momentum,
        muon_momentum=config.muon_momentum,
        **config.optimizer_options,
    )
    if config.parameter_groups:
        split_groups(optimizer, model, config.parameter_groups)
    return optimizer


SHOWN = 3
"""Names of parameters that an error shows."""


def freeze(model: nn.Module, entries: Sequence[dict[str, Any]]) -> None:
    """Take what `entries` freeze from the training, before anything is made of the model's parameters.

    Args:
        model: not wrapped yet, since DistributedDataParallel waits for each gradient that was to be trained.
        entries: of `training.parameter_groups`.

    Raises:
        ConfigError: naming each entry that is about no parameter.
    """
    for parameter, group in _assigned(model, entries).items():
        if group.frozen:
            parameter.requires_grad_(False)


def split_groups(optimizer: Optimizer, model: nn.Module, entries: Sequence[dict[str, Any]]) -> None:
    """Give parameters the learning rate and the decay of their entry; a schedule scales each group's rate from there.

    Args:
        optimizer: over the model's parameters, before its first step; of any class, since its groups are divided.
        model: whose names are meant.
        entries: of `training.parameter_groups`.

    Raises:
        ConfigError: naming each entry that is about no parameter.
    """
    assigned = _assigned(model, entries)
    parts: list[tuple[bool, dict[str, Any]]] = []
    for whole in optimizer.param_groups:
        by_entry: dict[ParameterGroup | None, list[Tensor]] = {}
        for parameter in whole["params"]:
            by_entry.setdefault(assigned.get(parameter), []).append(parameter)
        for entry, parameters in by_entry.items():
            part = {**whole, "params": parameters}
            if entry is not None:
                part["lr"] = whole["lr"] * entry.learning_rate_scale
                part["weight_decay"] = whole["weight_decay"] if entry.weight_decay is None else entry.weight_decay
            parts.append((part["lr"] != whole["lr"], part))
    # Log lines show the first group's rate: one that nothing scales, if there is one.
    optimizer.param_groups[:] = [part for _, part in sorted(parts, key=lambda item: item[0])]


def _assigned(model: nn.Module, entries: Sequence[dict[str, Any]]) -> dict[Tensor, ParameterGroup]:
    """Each parameter's entry: the first that matches one of its names (a tied one has several)."""
    groups = [from_dict(ParameterGroup, entry) for entry in entries]
    named = list(model.named_parameters(remove_duplicate=False))
    assigned: dict[Tensor, ParameterGroup] = {}
    problems = []
    for index, group in enumerate(groups):
        matched = {parameter: name for name, parameter in named if fnmatchcase(name, group.pattern)}
        left = matched.keys() - assigned.keys()
        if not left:
            problem = (
                "parameters that an entry before has" if matched else f"no parameter.{_near(group.pattern, named)}"
            )
            problems.append(f"training.parameter_groups[{index}].pattern is {group.pattern!r}, which matches {problem}")
        assigned |= dict.fromkeys(left, group)
    if problems:
        raise ConfigError(problems)
    return assigned


def _near(pattern: str, named: Sequence[tuple[str, Tensor]]) -> str:
    names = [name for name, _ in named]
    shown = ", ".join(names[:SHOWN])
    return did_you_mean(pattern, names) or f" There are {len(names)}, such as {shown}."
