"""Optimizers by name, with weight decay on matrices only."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fundamentallm.config.entries import ParameterGroup
from fundamentallm.config.registry import did_you_mean, resolve, unknown_options
from fundamentallm.config.schema import OPTIMIZER_NAMES, TrainingConfig
from fundamentallm.config.validation import from_dict, range_problems
from fundamentallm.distributed.dtensor import is_dense
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.training.muon import Muon

FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}
"""Devices for which torch has one kernel for a whole step. On a CPU it was measured 17 times faster than `foreach`."""
TWO_PASSES = ("first_step", "second_step", "fused_backward")
"""Methods of optimizers that take part in the backward pass: SAM and its relatives, LOMO."""


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
    """Returns an optimizer over the model's trainable parameters, fused if the device allows it.

    Args:
        model: the model to train, on its device.
        optimizer_type: adamw, adam, sgd, muon, or 'module:name' of an `Optimizer` class.
        learning_rate: peak learning rate.
        weight_decay: decay of matrices; decoupled (adamw, muon) or added to the gradient (adam, sgd).
        adam_learning_rate: peak learning rate of muon's AdamW parameters; None: `learning_rate`.
        adam_beta1: decay of the first moment.
        adam_beta2: decay of the second moment.
        adam_epsilon: added to the root of the second moment.
        momentum: momentum of sgd.
        muon_momentum: momentum of muon.
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
    rates = {"learning_rate": learning_rate, "adam_learning_rate": adam_learning_rate, "weight_decay": weight_decay}
    adam = {"adam_beta1": adam_beta1, "adam_beta2": adam_beta2, "adam_epsilon": adam_epsilon}
    numbers = {**rates, **adam, "momentum": momentum, "muon_momentum": muon_momentum}
    problems: list[str] = [*range_problems(**numbers)]
    if optimizer_type.lower() in OPTIMIZER_NAMES:
        problems += unknown_options("optimizer_options", optimizer_type, options, numbers)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        problems.append("the model has no parameter that requires a gradient; unfreeze some.")
    if problems:
        raise ConfigError(problems)
    return _create(model, optimizer_type, numbers, options)


def _create(model: nn.Module, optimizer_type: str, numbers: dict[str, Any], options: dict[str, Any]) -> Optimizer:
    kind, lr, weight_decay = optimizer_type.lower(), numbers["learning_rate"], numbers["weight_decay"]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = _decay_groups(parameters, weight_decay)
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() and is_dense(p) for p in parameters)
    adam = {"betas": (numbers["adam_beta1"], numbers["adam_beta2"]), "eps": numbers["adam_epsilon"], "fused": fused}
    if kind == "adamw":
        return AdamW(groups, lr=lr, **adam)
    if kind == "adam":
        return Adam(groups, lr=lr, **adam)
    if kind == "sgd":
        return SGD(groups, lr=lr, momentum=numbers["momentum"], fused=fused)
    if kind == "muon":
        groups = _muon_groups(model, parameters, weight_decay, numbers["adam_learning_rate"] or lr)
        return Muon(groups, lr, momentum=numbers["muon_momentum"], **adam)
    made_by = resolve("optimizer", optimizer_type, dict.fromkeys(OPTIMIZER_NAMES))
    try:
        return made_by(groups, lr=lr, **options)  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            Problem("optimizer_options", options, reason=f"with which {optimizer_type} cannot be made: {error}")
        ) from error


def _decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Returns a group of matrices with decay and one of vectors (norms, biases) without, leaving out an empty one."""
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for parameter in parameters:
        groups[parameter.ndim < 2]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def _muon_groups(
    model: nn.Module, parameters: Sequence[nn.Parameter], weight_decay: float, adam_lr: float
) -> list[dict[str, Any]]:
    """Muon trains the weights of linear layers: all but the output projection, and none that is tied to an embedding.

    The output projection is `get_output_embeddings()` if the model has it, otherwise its last linear layer.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    known_head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = [known_head] if known_head is not None else linear[-1:]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outside = {parameter for module in (*heads, *embeddings) for parameter in module.parameters()}
    hidden = {layer.weight for layer in linear} - outside
    rest = _decay_groups((p for p in parameters if p not in hidden), weight_decay)
    matrices = {"params": [p for p in parameters if p in hidden], "weight_decay": weight_decay, "muon": True}
    return [matrices] * bool(matrices["params"]) + [{**group, "muon": False, "lr": adam_lr} for group in rest]


def make_optimizer(config: TrainingConfig, model: nn.Module) -> Optimizer:
    """Returns the optimizer of `config` over a model on its device."""
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


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> Optimizer:
    """Returns the optimizer, unless it needs more than `step()`, or would update some parameters wrongly.

    torch's fused kernels walk through memory, where a slice has gaps. (Other optimizers raise an error of torch if
    elements share memory.)

    Raises:
        ConfigError: naming the optimizer or the parameters.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    needs_closure = closure is not None and closure.default is closure.empty
    if needs_closure or any(hasattr(optimizer, name) for name in TWO_PASSES):
        allowed, reason = "an optimizer whose step() takes no closure", "which needs one, or a backward pass of its own"
        raise ConfigError(Problem("the optimizer", type(optimizer).__name__, allowed, reason=reason))
    fused = {p for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    problems = [
        f"the parameter {name} has shape {tuple(p.shape)} and strides {p.stride()}, which a fused optimizer cannot "
        "update; make it of tensor.contiguous()."
        for name, p in model.named_parameters()
        if p in fused and not is_dense(p)
    ]
    if problems:
        raise ConfigError(problems)
    return optimizer


def freeze(model: nn.Module, entries: Sequence[dict[str, Any]]) -> None:
    """Turn off gradients of the parameters that `training.parameter_groups` freezes, in a model not wrapped yet.

    Raises:
        ConfigError: listing the entries that match no parameter.
    """
    for parameter, group in _assigned(model, entries).items():
        if group.frozen:
            parameter.requires_grad_(False)


def split_groups(optimizer: Optimizer, model: nn.Module, entries: Sequence[dict[str, Any]]) -> None:
    """Split an optimizer's groups so that parameters get the learning rate and the decay of their entry.

    Raises:
        ConfigError: listing the entries that match no parameter.
    """
    assigned = _assigned(model, entries)
    same_rate: list[dict[str, Any]] = []
    scaled: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_entry: dict[ParameterGroup | None, list[Tensor]] = {}
        for parameter in group["params"]:
            by_entry.setdefault(assigned.get(parameter), []).append(parameter)
        for entry, parameters in by_entry.items():
            new = {**group, "params": parameters}
            if entry is not None:
                new["lr"] = group["lr"] * entry.learning_rate_scale
                new["weight_decay"] = group["weight_decay"] if entry.weight_decay is None else entry.weight_decay
            (same_rate if new["lr"] == group["lr"] else scaled).append(new)
    optimizer.param_groups[:] = [*same_rate, *scaled]  # log lines show the learning rate of the first group


def _assigned(model: nn.Module, entries: Sequence[dict[str, Any]]) -> dict[Tensor, ParameterGroup]:
    """Maps each parameter to the first entry that matches one of its names (a tied parameter has several)."""
    named = list(model.named_parameters(remove_duplicate=False))
    assigned: dict[Tensor, ParameterGroup] = {}
    problems = []
    for index, group in enumerate(from_dict(ParameterGroup, entry) for entry in entries):
        matched = [parameter for name, parameter in named if fnmatchcase(name, group.pattern)]
        new = set(matched) - assigned.keys()
        if not new:
            names = [name for name, _ in named]
            some = f"There are {len(names)} names, such as {', '.join(names[:3])}."
            reason = "which matches " + ("only parameters of earlier entries" if matched else "no parameter")
            advice = "" if matched else did_you_mean(group.pattern, names) or some
            setting = f"training.parameter_groups[{index}].pattern"
            problems.append(Problem(setting, group.pattern, reason=reason, advice=advice))
        assigned |= dict.fromkeys(new, group)
    if problems:
        raise ConfigError(problems)
    return assigned
