"""Training speed: tokens per second, the fraction of the devices' peak that is used, and the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fundamentallm.config.schema import TrainingConfig

if TYPE_CHECKING:  # `fundamentallm estimate` needs the formula without torch and numpy
    from accelerate import Accelerator
    from torch import nn

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIE": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Peak TFLOP/s of dense matrix products in bfloat16 or float16, accumulated in float32, by a word in the device's name.
From NVIDIA's data sheets; half of what they state with sparsity."""


def known_peak(device_name: str, precision: str) -> float | None:
    """Returns the peak TFLOP/s of a device, or None if it is not known (as in float32, which may use TF32)."""
    words = device_name.upper().replace("-", " ").split()
    if precision not in ("bf16", "fp16") or "NVIDIA" not in words:
        return None
    matching = [name for name in PEAK_TFLOPS if set(name.split()) <= set(words)]
    return PEAK_TFLOPS[max(matching, key=lambda name: len(name.split()))] if matching else None


def model_flops_per_token(model: nn.Module, sequence_length: int) -> int:
    """Returns the floating-point operations of a training step per token: 6 N + 12 L H Q T.

    (PaLM, arXiv:2204.02311, appendix B.) N is the number of parameters that take part in matrix products, so without
    embedding tables that are only looked up; L that of blocks, H Q the features of all attention heads (of the model's
    config, ours or one of transformers; without a config, attention is left out), and T the sequence length. A
    multiplication and its addition are two operations, forward once and backward twice. Attention counts in full,
    although a causal kernel may skip half of it, and recomputation in the backward pass does not count.
    """
    from torch import nn

    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    others = {p for module in model.modules() if not isinstance(module, nn.Embedding) for p in module.parameters(False)}
    looked_up = tables - others  # a tied table is the output projection too
    multiplied = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and p not in looked_up)
    config: Any = getattr(model, "config", None)
    layers: int = getattr(config, "num_layers", 0) or getattr(config, "num_hidden_layers", 0)  # ours, transformers'
    width: int = getattr(config, "d_model", 0) or getattr(config, "hidden_size", 0)
    return 6 * multiplied + 12 * layers * width * sequence_length


class Throughput:
    """Measures training speed. Speeds leave out the time of validations and checkpoints; the time left includes it.

    `peak` is the speed in tokens per second at which all devices would compute at their peak; None: not known.
    """

    def __init__(self, peak: float | None = None) -> None:
        self.peak = peak
        self.begin(0, 0)

    def begin(self, step: int, tokens: int) -> None:
        """Start the clock, with so many steps and tokens done."""
        self._window_start = self._started = time.perf_counter()
        self._window_tokens, self._first_step = tokens, step
        self._is_warm, self._seconds_per_step = False, math.nan

    def pause(self, seconds: float) -> None:
        """Leave so many seconds out of the speed."""
        self._window_start += seconds

    def log(self, step: int, tokens: int) -> dict[str, float]:
        """Returns `tokens_per_second` since the last call, and `mfu`, the fraction of the peak, if that is known."""
        now = time.perf_counter()
        speed = (tokens - self._window_tokens) / (now - self._window_start)
        self._window_start, self._window_tokens = now, tokens
        if step > self._first_step:
            self._seconds_per_step = (now - self._started) / (step - self._first_step)
        if not self._is_warm:  # compilation and allocations are in the first window only
            self._first_step, self._started, self._is_warm = step, now, True
        return {"tokens_per_second": speed} | ({} if self.peak is None else {"mfu": speed / self.peak})

    def seconds_left(self, steps: int) -> float:
        """Returns the seconds that so many steps take, with their validations and checkpoints; NaN: not known yet."""
        return self._seconds_per_step * steps


def make_throughput(config: TrainingConfig, accelerator: Accelerator, model: nn.Module, dataset: Any) -> Throughput:
    """Returns the clock of a run: without a peak if a target does not stand for one token, whose cost is not known."""
    from fundamentallm.distributed.dtensor import device_name

    peak = config.peak_tflops or known_peak(device_name(accelerator.device), accelerator.mixed_precision)
    length = _targets_of(dataset[0]) if peak else None  # a `Stream` has its first sample
    flops = model_flops_per_token(model, length) if length else 0
    return Throughput(1e12 * peak * accelerator.num_processes / flops if peak and flops else None)


def _targets_of(sample: Any) -> int | None:
    """Returns the number of targets of a sample with one for each input token, or None if there are others."""
    import numpy as np

    pair = (sample.get("input_ids"), sample.get("labels")) if isinstance(sample, Mapping) else sample
    is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
    inputs, targets = map(np.shape, pair) if is_pair else ((), ())
    return targets[0] if inputs == targets and len(targets) == 1 else None
