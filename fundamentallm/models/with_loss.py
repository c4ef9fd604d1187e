"""Model and loss in one module."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from fundamentallm.models.transformer import cache_option


class ModelWithLoss(nn.Module):
    """Model and loss in one forward pass.

    The Accelerator wraps this module instead of the model. The logits then stay inside the forward pass: accelerate
    does not cast or copy them, and DistributedDataParallel sees a scalar.
    """

    def __init__(self, model: nn.Module, loss_fn: Any) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn
        self._options = cache_option(model, False)
        # If both can compute the loss from hidden states, the logits of a large vocabulary never exist all at once.
        self._by_hidden = hasattr(loss_fn, "of_hidden") and "of_hidden" in inspect.signature(model.forward).parameters

    def forward(self, inputs: Tensor, targets: Tensor, with_logits: bool = False) -> Any:
        """Returns the loss summed over targets, or (loss, logits) if `with_logits`, which only metrics need."""
        if self._by_hidden and not with_logits:
            return self.model(inputs, of_hidden=lambda hidden, weight: self.loss_fn.of_hidden(hidden, weight, targets))
        output = self.model(inputs, **self._options)
        logits = output if isinstance(output, Tensor) else output.logits
        loss = self.loss_fn(logits, targets)
        return (loss, logits) if with_logits else loss
