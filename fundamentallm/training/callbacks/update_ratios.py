"""Logs how far each block's weights move in a step, relative to their size."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fundamentallm.distributed.dtensor import total_norm
from fundamentallm.training.callbacks.base import Callback

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer


class RatioCallback(Callback):
    """Measures, in the steps that are logged, how large gradients are and how far weights move: for each block of the
    model `grad_norm/<block>` (as the optimizer gets it, clipped) and `update_ratio/<block>`, the norm of the change of
    its weights over their norm before. (Around 1e-3 is what trains well with Adam, by A. Karpathy's rule of thumb.)

    In those steps the weights are there twice; in the others it costs nothing.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from fundamentallm import Callback, RatioCallback, Trainer, TrainingConfig
        >>> numbers = torch.arange(300).reshape(30, 10) % 3
        >>> loader = DataLoader(TensorDataset(numbers, (numbers + 1) % 3), batch_size=4)
        >>> class Show(Callback):
        ...     def on_log(self, trainer, metrics):
        ...         print([name for name in metrics if "/" in name])
        >>> trainer = Trainer(nn.Embedding(3, 3), TrainingConfig(), loader, callbacks=[RatioCallback(), Show()])
        >>> history = trainer.train()
        ['grad_norm/weight', 'update_ratio/weight']
    """

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []
        self._blocks: dict[str, list[Tensor]] = {}
        self._before: dict[str, list[Tensor]] = {}
        self._norms: dict[str, Tensor] = {}

    def on_train_begin(self, trainer: Trainer) -> None:
        """Listen to the optimizer, which alone sees gradients and both weights."""
        trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        self._blocks = {}
        for name, parameter in trainer.model.named_parameters():
            if id(parameter) in trained:
                self._blocks.setdefault(block_of(name), []).append(parameter)
        optimizer = trainer.optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._look(trainer)),
            optimizer.register_step_post_hook(lambda *_: self._compare()),
        ]

    @torch.no_grad()
    def _look(self, trainer: Trainer) -> None:
        step = trainer.global_step + 1
        self._norms, self._before = {}, {}
        if step != trainer.total_steps and step % trainer.config.training.log_every_n_steps:
            return
        clips_by = getattr(trainer.optimizer, "grad_scale", None)  # a fused kernel does it; others get them clipped
        for block, parameters in self._blocks.items():
            if gradients := [parameter.grad for parameter in parameters if parameter.grad is not None]:
                norm = total_norm(gradients)
                self._norms[f"grad_norm/{block}"] = norm if clips_by is None else norm / clips_by
                self._before[block] = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def _compare(self) -> None:
        for block, before in self._before.items():
            moved = [parameter - old for parameter, old in zip(self._blocks[block], before, strict=True)]
            self._norms[f"update_ratio/{block}"] = total_norm(moved) / total_norm(before)
        self._before = {}

    def measure(self, trainer: Trainer) -> dict[str, float]:
        """The numbers of the step just taken; none of one that an optimizer without a fused kernel has left out."""
        if not self._norms:
            return {}
        names, norms = list(self._norms), torch.stack(list(self._norms.values()))
        self._norms = {}
        return dict(zip(names, norms.tolist(), strict=True))

    def on_train_end(self, trainer: Trainer) -> None:
        """Listen no more."""
        for hook in self._hooks:
            hook.remove()

    on_train_abort = on_train_end


def block_of(name: str) -> str:
    """The block that a parameter belongs to: its name up to the first number, else its module's."""
    numbered = re.match(r"(.*?\.)??\d+(?=\.)", name)
    return numbered.group() if numbered else name.rpartition(".")[0] or name
