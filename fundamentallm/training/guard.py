"""Decides on the device which optimizer steps to skip, and undoes what a skipped step did to buffers."""

from __future__ import annotations

import logging

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fundamentallm.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)

WINDOW = 128
"""Steps that a spike is measured against."""
FEWEST = 32
"""Steps that the window must hold before a step can be a spike."""
LEAST_DEVIATION = 1e-3
"""Smallest deviation, as a fraction of the median. Otherwise any value above a window of equal ones is a spike."""
MAD_TO_STD = 1.4826
"""Ratio of the standard deviation to the median absolute deviation of normally distributed numbers."""
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LARGE = 2**24
"""Bytes of a buffer from which it is copied in each step only if the first step has changed it."""
MAX_NAMES_SHOWN = 5
"""Most names of layers and parameters that a message lists."""


class Guard:
    """Decides whether to skip a step before the optimizer takes it. The host does not wait for the answer.

    A step is bad if its loss or gradient is not finite. After `max_bad_steps` bad steps in a row, every later step
    counts as bad too: weights stop changing until the host sees it at the next log line, so the final weights do not
    depend on the logging interval.

    A step is a spike if its loss or gradient norm is more than `skip_spikes_above` robust standard deviations above the
    median of the last `WINDOW` steps. (Median and median absolute deviation, since outliers move mean and standard
    deviation: Leys et al., J. Exp. Soc. Psychol. 49, 2013.) Spikes enter the window too, so that a lasting change of
    level is accepted after a while.

    Args:
        device: the device of the losses.
        max_bad_steps: bad steps in a row after which every step is skipped.
        skip_spikes_above: robust z-score of a spike; None: nothing is a spike.
    """

    def __init__(self, device: torch.device, max_bad_steps: int, skip_spikes_above: float | None = None) -> None:
        self.max_bad_steps, self.skip_spikes_above = max_bad_steps, skip_spikes_above
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # bad in a row, all bad, spikes
        self._in_a_row, self._in_all, self._spikes = self.counts.unbind()  # views of `counts`
        self._recent = torch.full((2, WINDOW), torch.nan, device=device)  # loss and norm; NaN: no step yet

    def skips(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Returns whether to skip `step` (a boolean scalar), given its mean loss and gradient norm (scalars)."""
        has_stopped = self._in_a_row >= self.max_bad_steps
        bad = ~(loss + norm).isfinite() | has_stopped
        self._in_a_row.add_(1).mul_(bad)
        self._in_all.add_(bad & ~has_stopped)
        if self.skip_spikes_above is None:
            return bad
        spike = self._is_spike(step, torch.stack((loss.float(), norm.float())), self.skip_spikes_above) & ~bad
        self._spikes.add_(spike)
        return bad | spike

    def _is_spike(self, step: int, values: Tensor, threshold: float) -> Tensor:
        median = self._recent.nanmedian(dim=1, keepdim=True).values
        spread = (self._recent - median).abs().nanmedian(dim=1).values * MAD_TO_STD
        deviation = spread.maximum(LEAST_DEVIATION * median.squeeze(1).abs())
        known = (~self._recent.isnan()).sum(dim=1) >= FEWEST
        above = values - median.squeeze(1) > threshold * deviation
        slot = step % WINDOW
        self._recent[:, slot] = values.where(values.isfinite(), self._recent[:, slot])
        return (above & known).any()

    def read(self) -> list[int]:
        """Returns the bad steps in a row, all bad steps, and the skipped spikes. The host waits for the device."""
        return self.counts.tolist()

    def raise_if_stopped(self, bad_in_a_row: int | None = None) -> None:
        """Raises TrainingError if `max_bad_steps` steps in a row were bad. The host waits for the device.

        Args:
            bad_in_a_row: the count, if the caller has read it already.
        """
        if (int(self._in_a_row) if bad_in_a_row is None else bad_in_a_row) >= self.max_bad_steps:
            raise TrainingError(
                f"The loss or the gradient was not finite in {self.max_bad_steps} consecutive optimizer steps; none of "
                "them changed the weights. Lower training.learning_rate, and check the data."
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the counts and the window."""
        return {"counts": self.counts, "recent": self._recent}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore saved counts and window. Raises ValueError if they have another shape."""
        if state["counts"].shape != self.counts.shape or state["recent"].shape != self._recent.shape:
            raise ValueError(f"the shapes are {state['counts'].shape} and {state['recent'].shape}.")
        self.counts.copy_(state["counts"])
        self._recent.copy_(state["recent"])


class ModelGuard:
    """Undoes what a skipped step did to buffers, and names what makes a run depend on its layout.

    The first step shows which buffers training changes, such as the running statistics of BatchNorm; the host waits for
    the device there. Others that may change later, such as those of a layer in evaluation mode, are copied in each step
    too: persistent ones of floating-point numbers, up to `LARGE` bytes. The rest costs nothing after the first step.
    `model` has no wrapper that exchanges gradients.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        self.model, self._is_first, self._reports = model, True, accelerator.is_main_process
        self.num_processes = accelerator.num_processes
        finds_unused = getattr(accelerator.ddp_handler, "find_unused_parameters", False)
        self._needs_gradients = self.num_processes > 1 and not accelerator.is_fsdp2 and not finds_unused
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._modules = dict(model.named_modules())
        self._changed: set[tuple[str, str]] = set()
        self._buffers = [(at, name) for at, m in self._modules.items() for name, _ in m.named_buffers(recurse=False)]
        self._before: list[Tensor | None] = []
        self._saved = {name for name in model.state_dict() if name.startswith("model.")}  # of the model, not the loss

    def _buffer(self, path: str, name: str) -> Tensor | None:
        return getattr(self._modules[path], name, None)

    def begin(self) -> None:
        """Remembers the buffers that the step may change."""
        now = (self._buffer(*at) for at in self._buffers)
        self._before = [None if buffer is None else buffer.clone() for buffer in now]

    def check(self, num_micro_batches: int) -> None:
        """Checks the model after the backward pass of a step.

        Raises:
            ConfigError: if DistributedDataParallel would wait for the gradient of a parameter that got none.
        """
        unused = [name for name, p in self._trained.items() if p.grad is None] if self._needs_gradients else []
        if unused:
            raise ConfigError(
                f"{_listed(unused)}: no part in the loss, and several processes exchange the gradients of all "
                "parameters. Freeze them (training.parameter_groups), or give the Trainer an Accelerator with "
                "kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]."
            )
        if self._is_first:
            self._is_first = False
            self._narrow()
        if self._reports and (num_micro_batches > 1 or self.num_processes > 1):
            self._reports = False
            layers = {path for path, module in self._modules.items() if isinstance(module, BATCH_NORMS)}
            layers = {path for path in layers if self._modules[path].training} | {path for path, _ in self._changed}
            kinds = {path: type(self._modules[path]) for path in sorted(layers)}
            if num_micro_batches == 1:  # it has the statistics of all processes
                kinds = {path: kind for path, kind in kinds.items() if not issubclass(kind, nn.SyncBatchNorm)}
            if kinds:
                logger.warning(
                    "The loss curve depends on micro_batch_size and on the number of processes, since these layers use "
                    "statistics of one micro-batch on one process: %s. LayerNorm and GroupNorm do not.",
                    _listed([f"{path} ({kind.__name__})" for path, kind in kinds.items()]),
                )

    def _narrow(self) -> None:
        """Keeps the buffers that the step has changed, or that a later one may change."""
        before = dict(zip(self._buffers, self._before, strict=True))
        names = {at: ".".join(filter(None, at)) for at in before}
        self._changed = {at for at, value in before.items() if _differ(value, self._buffer(*at))}
        unsaved = [names[at] for at in before if at in self._changed and names[at] not in self._saved]
        if unsaved and self._reports:
            logger.warning(
                "Training changes buffers that no checkpoint holds, so that a resumed run starts with other values: "
                "%s. Register them in the model, with persistent=True.",
                _listed(unsaved),
            )
        floats = {at: b for at, b in before.items() if b is not None and b.is_floating_point() and b.nbytes <= LARGE}
        self._buffers = [at for at in before if at in self._changed or (at in floats and names[at] in self._saved)]
        self._before = [before[at] for at in self._buffers]

    @torch.no_grad()
    def end(self, skip: Tensor) -> None:
        """Sets the buffers back if the step was skipped (`skip`, a boolean scalar)."""
        for at, before in zip(self._buffers, self._before, strict=True):
            buffer = self._buffer(*at)
            if before is not None and buffer is not None and buffer.shape == before.shape:
                buffer.copy_(before.where(skip, buffer))


def _differ(before: Tensor | None, now: Tensor | None) -> bool:
    """Returns whether a buffer has other values; one that grew or went away, such as a cache, is not compared."""
    return before is not None and now is not None and now.shape == before.shape and not torch.equal(before, now)


def _listed(names: list[str]) -> str:
    names = [name.removeprefix("model.") for name in names]  # of the model, not of the module with its loss
    return ", ".join(names[:MAX_NAMES_SHOWN]) + (
        f" and {more} more" if (more := len(names) - MAX_NAMES_SHOWN) > 0 else ""
    )
