"""Optimizers by name, with weight decay on matrices only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fundamentallm.config.registry import did_you_mean, resolve, unknown_options
from fundamentallm.config.schema import OPTIMIZER_NAMES, TrainingConfig
from fundamentallm.config.validation import ParameterGroup, from_dict
from fundamentallm.distributed.dtensor import is_dense
from fundamentallm.errors import ConfigError, Problem, raise_all
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
    if (kind := optimizer_type.lower()) not in CLASSES:
        kind, options = optimizer_type, {"optimizer_options": options}
    elif problems := unknown_options("optimizer_options", kind, options, SETTINGS):
        raise ConfigError(problems)
    config = TrainingConfig(optimizer=kind, learning_rate=learning_rate, weight_decay=weight_decay, **options)
    return make_optimizer(config, model)


def make_optimizer(config: TrainingConfig, model: nn.Module) -> Optimizer:
    """Returns the optimizer of `config` over a model on its device."""
    kind, options, groups = config.optimizer, config.optimizer_options, _groups(config, model)
    if kind in CLASSES:
        parameters = [p for group in groups for p in group["params"]]
        fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() and is_dense(p) for p in parameters)
        adam: dict[str, Any] = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
        own = {"sgd": {"momentum": config.momentum}, "muon": {**adam, "momentum": config.muon_momentum}}
        options = {**own.get(kind, adam), "fused": fused}
    made_by = resolve("optimizer", kind, CLASSES)
    try:
        return made_by(groups, lr=config.learning_rate, **options)  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise ConfigError(Problem("optimizer", kind, reason=f"which cannot be made with {options}: {error}")) from error


def _groups(config: TrainingConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Groups the trained parameters by learning rate and decay, which vectors (norms, biases) have none of."""
    assigned, unchanged = _assigned(model, config.parameter_groups), ParameterGroup("*")
    is_muon = config.optimizer == "muon"
    hidden = _hidden_matrices(model) if is_muon else set()
    members: dict[tuple[bool, bool, bool, ParameterGroup], list[Tensor]] = defaultdict(list)
    for parameter in [parameter for parameter in model.parameters() if parameter.requires_grad]:
        entry = assigned.get(parameter, unchanged)
        # Scaled rates come last, because log lines show the learning rate of the first group.
        members[entry.learning_rate_scale != 1, parameter not in hidden, parameter.ndim < 2, entry].append(parameter)
    groups: list[dict[str, Any]] = []
    for key in sorted(members, key=lambda key: key[:3]):
        _, is_other, is_vector, entry = key
        rate = (is_muon and is_other and config.adam_learning_rate) or config.learning_rate
        decay = 0.0 if is_vector else config.weight_decay
        decay = decay if entry.weight_decay is None else entry.weight_decay
        groups.append({"params": members[key], "lr": rate * entry.learning_rate_scale, "weight_decay": decay})
        if is_muon:
            groups[-1]["muon"] = not is_other
    return groups


def _hidden_matrices(model: nn.Module) -> set[Tensor]:
    """Returns the weights of linear layers, except for the output projection and what is tied to an embedding.

    The output projection is `get_output_embeddings()` if the model has it, otherwise its last linear layer.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    known_head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = [known_head] if known_head is not None else linear[-1:]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outside = {parameter for module in (*heads, *embeddings) for parameter in module.parameters()}
    return {layer.weight for layer in linear} - outside


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


def _assigned(model: nn.Module, entries: Sequence[dict[str, Any]]) -> dict[Tensor, ParameterGroup]:
    """Maps each parameter to the first entry that matches one of its names (a tied parameter has several)."""
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
    raise_all(problems)
    return assigned
