"""How fast a training is: tokens in a second, the part of the devices' peak that is used, the time that is left.

Imports torch only where a model is counted: `fundamentallm estimate` needs the formula and no torch.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from torch import nn

from fundamentallm.distributed.dtensor import device_name

if TYPE_CHECKING:
    from torch import nn
if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer

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
"""10^12 operations in a second of dense matrix products in bfloat16 or float16, added up in float32, by a word in the
device's name: NVIDIA's data sheets (where they state it with sparsity, half of that)."""


def known_peak(device_name: str, precision: str) -> float | None:
    """Peak TFLOP/s of a device; None where it is not known (other devices, and float32, whose peak depends on TF32)."""
    words = device_name.upper().replace("-", " ").split()
    if precision not in ("bf16", "fp16") or "NVIDIA" not in words:
        return None
    fitting = [name for name in PEAK_TFLOPS if set(name.split()) <= set(words)]
    return PEAK_TFLOPS[max(fitting, key=lambda name: len(name.split()))] if fitting else None


def flops_per_token(multiplied: int, layers: int, width: int, sequence_length: int) -> int:
    """Floating-point operations of a training step for each token: 6 N + 12 L H Q T.

    (PaLM, arXiv:2204.02311, appendix B. Two for a multiplication and its addition, forward once and backward twice;
    N parameters are multiplied with, L blocks have H heads of Q features, and T is the sequence length.) As in PaLM's
    model FLOPs utilisation, attention counts in full, although a causal kernel may leave out half of it, and what is
    computed again in the backward pass does not.

    Args:
        multiplied: N.
        layers: L.
        width: H Q, features over all heads.
        sequence_length: T.
    """
    return 6 * multiplied + 12 * layers * width * sequence_length


def model_flops_per_token(model: nn.Module, sequence_length: int) -> int:
    """`flops_per_token` of a model: N are its matrices, without embedding tables that are only looked up in.

    L and H Q are told by its config, ours or that of transformers; of a model without one, attention is left out.
    """
    from torch import nn

    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    others = {p for module in model.modules() if not isinstance(module, nn.Embedding) for p in module.parameters(False)}
    looked_up = tables - others  # a tied table is the output projection too
    multiplied = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and p not in looked_up)
    config: Any = getattr(model, "config", None)
    layers, width = (_first(config, names) for names in (LAYERS, WIDTHS))
    return flops_per_token(multiplied, layers, width, sequence_length)


LAYERS = ("num_layers", "num_hidden_layers")
WIDTHS = ("d_model", "hidden_size")
"""What our config and transformers' call them."""


def _first(config: Any, names: tuple[str, ...]) -> int:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 0)


class Throughput:
    """The clock of a training. Between `begin` and the log lines, time spent validating and saving is left out of
    speeds, and counted in the time that is left.

    Args:
        peak_tflops: of all devices together; None: not known.
        flops_of_token: of a training step; see `flops_per_token`.
    """

    def __init__(self, peak_tflops: float | None = None, flops_of_token: int = 0) -> None:
        self.peak_tflops, self.flops_of_token = peak_tflops, flops_of_token
        self.begin(0, 0)

    def begin(self, step: int, tokens: int) -> None:
        """A start of the run goes on from here."""
        now = time.perf_counter()
        self._since, self._tokens = now, tokens  # of the window of the next log line
        self._first_step, self._began, self._warm = step, now, False
        self._seconds_per_step = math.nan

    def pause(self, seconds: float) -> None:
        """Leave out so many seconds of the window."""
        self._since += seconds

    def log(self, step: int, tokens: int) -> dict[str, float]:
        """`tokens_per_second` since the last line, and `mfu`, the part of the peak used, where that is known."""
        now = time.perf_counter()
        speed = (tokens - self._tokens) / (now - self._since)
        self._since, self._tokens = now, tokens
        if step > self._first_step:
            self._seconds_per_step = (now - self._began) / (step - self._first_step)
        if not self._warm:  # the first window has compilation and allocations in it, which do not come again
            self._first_step, self._began, self._warm = step, now, True
        peak = None if self.peak_tflops is None else speed * self.flops_of_token / (1e12 * self.peak_tflops)
        return {"tokens_per_second": speed, **({} if peak is None else {"mfu": peak})}

    def seconds_left(self, steps: int) -> float:
        """For so many steps, at the pace of this start, validations and checkpoints included; NaN: not known yet."""
        return self._seconds_per_step * steps


def make_throughput(trainer: Trainer) -> Throughput:
    """The clock of a run on its devices; their peak is the config's, or known by their name."""
    accelerator, device = trainer.accelerator, trainer.accelerator.device
    peak = trainer.config.training.peak_tflops or known_peak(device_name(device), accelerator.mixed_precision)
    if peak is None:
        return Throughput()
    length = len(trainer.train_loader.dataset[0][0])
    return Throughput(peak * accelerator.num_processes, model_flops_per_token(trainer.model, length))
