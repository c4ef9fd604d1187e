"""Optimizers by name, with weight decay on matrices only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fundamentallm.config.registry import did_you_mean, resolve, unknown_options
from fundamentallm.config.schema import OPTIMIZER_NAMES, TrainingConfig
from fundamentallm.config.validation import ParameterGroup, from_dict, range_problems
from fundamentallm.distributed.dtensor import is_dense
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.training.muon import Muon

CLASSES: dict[str, Any] = dict(zip(OPTIMIZER_NAMES, (AdamW, Adam, SGD, Muon), strict=True))
SETTINGS = ("adam_learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "momentum", "muon_momentum")
FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}
"""Devices for which torch has one kernel for a whole step. On a CPU it was measured 17 times faster than `foreach`."""


def create_optimizer(
    model: nn.Module, optimizer_type: str, learning_rate: float, weight_decay: float = 0.0, **options: Any
) -> Optimizer:
    """Returns an optimizer over the model's trainable parameters, fused if the device allows it.

    Args:
        model: the model to train, on its device.
        optimizer_type: adamw, adam, sgd, muon, or 'module:name' of an `Optimizer` class.
        learning_rate: peak learning rate.
        weight_decay: decay of matrices; decoupled (adamw, muon) or added to the gradient (adam, sgd).
        options: keyword arguments of a 'module:name' class. For the others the settings of `TrainingConfig`, and its
            defaults: adam_learning_rate, adam_beta1, adam_beta2, adam_epsilon, momentum, muon_momentum.

    Raises:
        ConfigError: if a name or option is not known, a value is outside its range, or nothing is trainable.

    Examples:
        >>> from torch import nn
        >>> from fundamentallm import create_optimizer
        >>> optimizer = create_optimizer(nn.Linear(4, 2), "adamw", learning_rate=1e-3, weight_decay=0.1)
        >>> [group["weight_decay"] for group in optimizer.param_groups]  # the matrix, the vector
        [0.1, 0.0]
    """
    kind = optimizer_type.lower()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = _decay_groups(parameters, weight_decay)
    problems: list[str] = [*range_problems(learning_rate=learning_rate, weight_decay=weight_decay)]
    if not parameters:
        problems.append("the model has no parameter that requires a gradient; unfreeze some.")
    if kind in CLASSES:
        numbers = {name: options.pop(name, getattr(TrainingConfig, name)) for name in SETTINGS}
        problems += range_problems(**numbers) + unknown_options("optimizer_options", kind, options, SETTINGS)
        settings = SimpleNamespace(**numbers)
        if kind == "muon":
            groups = _muon_groups(model, parameters, weight_decay, settings.adam_learning_rate or learning_rate)
        fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() and is_dense(p) for p in parameters)
        adam = {"betas": (settings.adam_beta1, settings.adam_beta2), "eps": settings.adam_epsilon}
        own = {"sgd": {"momentum": settings.momentum}, "muon": {**adam, "momentum": settings.muon_momentum}}
        options = {**own.get(kind, adam), "fused": fused}
    if problems:
        raise ConfigError(problems)
    made_by = CLASSES.get(kind) or resolve("optimizer", optimizer_type, CLASSES)
    try:
        return made_by(groups, lr=learning_rate, **options)  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        reason = f"with which {optimizer_type} cannot be made: {error}"
        raise ConfigError(Problem("optimizer_options", options, reason=reason)) from error


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
    options = config.optimizer_options
    if config.optimizer in CLASSES:
        options = {name: getattr(config, name) for name in SETTINGS}
    optimizer = create_optimizer(model, config.optimizer, config.learning_rate, config.weight_decay, **options)
    if config.parameter_groups:
        split_groups(optimizer, model, config.parameter_groups)
    return optimizer


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> Optimizer:
    """Returns the optimizer. Raises ConfigError if a fused kernel of torch would write into the gaps of a slice."""
    fused = {p for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    if slices := [name for name, p in model.named_parameters() if p in fused and not is_dense(p)]:
        raise ConfigError(f"a fused optimizer cannot update {', '.join(slices)}; make it of tensor.contiguous().")
    return optimizer


def freeze(model: nn.Module, entries: Sequence[dict[str, Any]]) -> None:
    """Turn off gradients of the parameters that `training.parameter_groups` freezes, in a model not wrapped yet."""
    for parameter, entry in _assigned(model, entries).items():
        if entry.frozen:
            parameter.requires_grad_(False)


def split_groups(optimizer: Optimizer, model: nn.Module, entries: Sequence[dict[str, Any]]) -> None:
    """Split an optimizer's groups so that parameters get the learning rate and the decay of their entry."""
    assigned, unchanged = _assigned(model, entries), ParameterGroup("*")
    groups: list[dict[str, Any]] = []
    scaled: list[dict[str, Any]] = []  # after the others, because log lines show the learning rate of the first group
    for group in optimizer.param_groups:
        by_entry: dict[ParameterGroup, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            by_entry[assigned.get(parameter, unchanged)].append(parameter)
        for entry, parameters in by_entry.items():
            decay = group["weight_decay"] if entry.weight_decay is None else entry.weight_decay
            new = {"params": parameters, "lr": group["lr"] * entry.learning_rate_scale, "weight_decay": decay}
            (groups if entry.learning_rate_scale == 1 else scaled).append({**group, **new})
    optimizer.param_groups[:] = groups + scaled


def _assigned(model: nn.Module, entries: Sequence[dict[str, Any]]) -> dict[Tensor, ParameterGroup]:
    """Maps each parameter to the first entry that matches one of its names (a tied parameter has several).

    Raises:
        ConfigError: listing the entries that match no parameter.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    assigned: dict[Tensor, ParameterGroup] = {}
    problems = []
    for index, entry in enumerate(from_dict(ParameterGroup, entry) for entry in entries):
        new = {parameter for name, parameter in named if fnmatchcase(name, entry.pattern)} - assigned.keys()
        if not new:
            names = [name for name, _ in named]
            advice = did_you_mean(entry.pattern, names) or f"Names are {', '.join(names[:3])} and so on."
            setting, reason = f"training.parameter_groups[{index}].pattern", "which matches no further parameter"
            problems.append(Problem(setting, entry.pattern, reason=reason, advice=advice))
        assigned |= dict.fromkeys(new, entry)
    if problems:
        raise ConfigError(problems)
    return assigned
