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
"""Peak TFLOP/s of dense matrix products in bfloat16 or float16, accumulated in float32, by words of the device's name,
the first that fit. From NVIDIA's data sheets; half of what they state with sparsity."""


def known_peak(device_name: str, precision: str) -> float | None:
    """Returns the peak TFLOP/s of a device, or None if it is not known (as in float32, which may use TF32)."""
    words = {*device_name.upper().replace("-", " ").split()}
    if precision not in ("bf16", "fp16") or "NVIDIA" not in words:
        return None
    return next((peak for name, peak in PEAK_TFLOPS.items() if words.issuperset(name.split())), None)


def model_flops_per_token(model: nn.Module, sequence_length: int) -> int:
    """Returns the floating-point operations of a training step per token: 6 N + 12 L H Q T.

    (PaLM, arXiv:2204.02311, appendix B.) N is the number of parameters that take part in matrix products, so without
    embedding tables that are only looked up; L that of blocks, H Q the features of all attention heads (of the model's
    config, ours or one of transformers; without a config, attention is left out), and T the sequence length. A
    multiplication and its addition are two operations, forward once and backward twice. Attention counts in full,
    although a causal kernel may skip half of it, and recomputation in the backward pass does not count.
    """
    from torch import nn

    others = {p for module in model.modules() if not isinstance(module, nn.Embedding) for p in module.parameters(False)}
    multiplied = sum(p.numel() for p in others if p.ndim >= 2)  # with a tied table, which is the output projection too
    config: Any = getattr(model, "config", None)
    layers: int = getattr(config, "num_layers", 0) or getattr(config, "num_hidden_layers", 0)  # ours, transformers'
    width: int = getattr(config, "d_model", 0) or getattr(config, "hidden_size", 0)
    return 6 * multiplied + 12 * layers * width * sequence_length


class Throughput:
    """Measures training speed, from `tokens` on. Speeds leave out validations and checkpoints, the time left does not.

    `peak` is the speed in tokens per second at which all devices would compute at their peak; None: not known.
    """

    def __init__(self, tokens: int = 0, peak: float | None = None) -> None:
        self.peak = peak
        self._window_start, self._window_tokens = time.perf_counter(), tokens
        self._first: tuple[int, float] | None = None  # step and time of the first call, before which torch compiles
        self._seconds_per_step = math.nan

    def pause(self, seconds: float) -> None:
        """Leave so many seconds out of the speed."""
        self._window_start += seconds

    def log(self, step: int, tokens: int) -> dict[str, float]:
        """Returns `tokens_per_second` since the last call, and `mfu`, the fraction of the peak, if that is known."""
        now = time.perf_counter()
        speed = (tokens - self._window_tokens) / (now - self._window_start)
        self._window_start, self._window_tokens = now, tokens
        if self._first is None:
            self._first = step, now
        else:
            self._seconds_per_step = (now - self._first[1]) / (step - self._first[0])
        return {"tokens_per_second": speed} | ({} if self.peak is None else {"mfu": speed / self.peak})

    def seconds_left(self, steps: int) -> float:
        """Returns the seconds that so many steps take; NaN before the second call of `log`."""
        return self._seconds_per_step * steps


def peak_speed(config: TrainingConfig, accelerator: Accelerator, model: nn.Module, dataset: Any) -> float | None:
    """Returns the tokens per second of all devices at their peak, or None if that is not known.

    The cost of a target is known if a sample has one for each of its input tokens.
    """
    import numpy as np

    from fundamentallm.distributed.dtensor import device_name

    peak = config.peak_tflops or known_peak(device_name(accelerator.device), accelerator.mixed_precision)
    sample = dataset[0] if peak else None  # a `Stream` has its first sample
    pair: Any = (sample.get("input_ids"), sample.get("labels")) if isinstance(sample, Mapping) else sample
    is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
    inputs, targets = map(np.shape, pair) if is_pair else ((), ())
    flops = model_flops_per_token(model, targets[0]) if inputs == targets and len(targets) == 1 else 0
    return 1e12 * peak * accelerator.num_processes / flops if peak and flops else None
