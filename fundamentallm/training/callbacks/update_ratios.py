"""Logs how far each block's weights move in a step, relative to their size."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fundamentallm.distributed.dtensor import total_norm
from fundamentallm.training.callbacks.base import Callback, RunView


class RatioCallback(Callback):
    """Adds two numbers for each block of the model to the log lines.

    `grad_norm/<block>` is the norm of the gradient after clipping. `update_ratio/<block>` is the norm of the change
    of the weights over the norm of the weights before. A ratio around 1e-3 is a good sign with Adam, by A. Karpathy's
    rule of thumb. In a logged step, the weights are held in memory twice; other steps cost nothing.

    Examples:
        >>> from fundamentallm import RatioCallback
        >>> callbacks = [RatioCallback()]  # for a Trainer
    """

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []
        self._blocks: dict[str, list[Tensor]] = {}
        self._weights_before: dict[str, list[Tensor]] = {}
        self._measured: dict[str, Tensor] = {}

    def on_train_begin(self, trainer: RunView) -> None:
        """Hook into the optimizer step, because only there are the gradients and the weights before and after."""
        optimizer = trainer.optimizer
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._blocks = {}
        for name, parameter in trainer.model.named_parameters():
            if id(parameter) in trained:
                self._blocks.setdefault(block_of(name), []).append(parameter)
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_update(trainer)),
            optimizer.register_step_post_hook(lambda *_: self._after_update()),
        ]

    @torch.no_grad()
    def _before_update(self, trainer: RunView) -> None:
        step = trainer.global_step + 1
        self._measured, self._weights_before = {}, {}
        if step != trainer.total_steps and step % trainer.config.training.log_every_n_steps:
            return
        for block, parameters in self._blocks.items():
            if gradients := [parameter.grad for parameter in parameters if parameter.grad is not None]:
                self._measured[f"grad_norm/{block}"] = total_norm(gradients)
                self._weights_before[block] = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def _after_update(self) -> None:
        for block, before in self._weights_before.items():
            change = [parameter - old for parameter, old in zip(self._blocks[block], before, strict=True)]
            self._measured[f"update_ratio/{block}"] = total_norm(change) / total_norm(before)
        self._weights_before = {}

    def measure(self, trainer: RunView) -> dict[str, float]:
        """Returns the numbers of the step just done; {} if the optimizer was not called in it."""
        if not self._measured:
            return {}
        names, values = list(self._measured), torch.stack(list(self._measured.values()))
        self._measured = {}
        return dict(zip(names, values.tolist(), strict=True))

    def on_train_end(self, trainer: RunView) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    on_train_abort = on_train_end


def block_of(name: str) -> str:
    """Returns the block of a parameter: its name up to the first number, or the name of its module without one."""
    numbered = re.match(r"(.*?\.)??\d+(?=\.)", name)
    return numbered.group() if numbered else name.rpartition(".")[0] or name
