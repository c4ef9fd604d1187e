"""`micro_batch_size: auto`: finds the largest micro-batch that fits by trying, and keeps it with the run."""

from __future__ import annotations

import copy
import platform
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from fundamentallm.config.schema import TrainingConfig
from fundamentallm.data.sampler import StepSampler
from fundamentallm.distributed.batches import StepBatch, take_rows
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.training.guard import copied_buffers
from fundamentallm.training.metrics import Metric
from fundamentallm.training.step import OptimizerStep


class MicroBatch:
    """The size found, and the hardware it was found on.

    A run that resumes on the same hardware with the same settings keeps its size, so that it is bit-identical.

    Attributes:
        size: sequences in a micro-batch; None: not found yet.
        hardware: number of processes, and kind of the device.
    """

    def __init__(self, device: torch.device, num_processes: int) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
        self.size: int | None = None
        self.hardware = f"{num_processes} x {name}"

    def state_dict(self) -> dict[str, Any]:
        """Returns size and hardware."""
        return {"size": self.size, "place": self.hardware}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the size if the hardware is the same. Raises ValueError if it is not a size."""
        size = state["size"]
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"the size is {size!r}; allowed: an integer, at least 1.")
        self.size = size if state["place"] == self.hardware else None

    def settle(
        self,
        step: OptimizerStep,
        batches: Iterator[StepBatch],
        samplers: Sequence[StepSampler],
        group: HostGroup,
        metrics: Mapping[str, Metric],
    ) -> str:
        """Finds the size, unless it is known, and has the samplers use it. Returns a line for the user.

        The next batch is tried, with its rows repeated to each size.

        Raises:
            ConfigError: if not even one sequence fits.
        """
        largest = samplers[0].largest_rank_batch
        size = self.size or self._find(step, next(batches), largest, group, metrics)
        self.size = size
        for sampler in samplers:
            sampler.micro_batch_size = size
        return f"micro_batch_size is auto: {size} of {largest} sequences at once fit"

    def _find(
        self, step: OptimizerStep, batch: StepBatch, largest: int, group: HostGroup, metrics: Mapping[str, Metric]
    ) -> int:
        """Returns the largest size that fits on every process.

        A try exchanges nothing, so that a process that runs out of memory leaves no other one waiting.
        """

        def fits(size: int) -> bool:
            rows = take_rows(batch.content, batch.size, [row % batch.size for row in range(size)])
            with group.barrier_with_errors():
                fits_here = _fits(step, rows, 1 + (size < largest), metrics)
            return all(group.all_gather(fits_here))

        # Uncompiled, which needs no less memory: otherwise each size tried would be compiled for.
        with torch.compiler.set_stance("force_eager"), restored(step.objective, step.accelerator.device):
            count = fewest_micro_batches(largest, fits)
        if count is None:
            advice = (
                "Not even one sequence fits into the memory of the device: try a smaller model, a shorter "
                "data.sequence_length, training.activation_checkpointing, or FSDP2."
            )
            raise ConfigError(Problem("training.micro_batch_size", "auto", advice=advice))
        return -(-largest // count)


def fewest_micro_batches(largest: int, fits: Callable[[int], bool]) -> int | None:
    """Returns the smallest number of micro-batches of which one fits, if `largest` sequences are split evenly.

    None: not even one sequence fits.
    """
    if fits(largest):  # often
        return 1
    counts = range(2, largest + 1)
    found = bisect_left(counts, True, key=lambda count: fits(-(-largest // count)))
    return counts[found] if found < len(counts) else None


def _fits(step: OptimizerStep, batch: Any, num_micro_batches: int, metrics: Mapping[str, Metric]) -> bool:
    """Returns whether this process has the memory to train and to validate on a micro-batch."""
    model, optimizer, fits = step.objective, step.optimizer, False
    try:
        # The optimizer state of the first step, at most as much as Adam's.
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = [] if any(optimizer.state.values()) else [torch.empty_like(p) for p in trained for _ in range(2)]
        model.train()
        for _ in range(num_micro_batches):  # the second one runs beside the gradients of the first
            model(batch).backward()
        model.eval()
        with torch.no_grad():
            result = model(batch, with_outputs=bool(metrics))
            for metric in metrics.values():
                if callable(metric):
                    metric(convert_to_fp32(result[1]), model.metric_batch(batch))
        del state, result
        fits = True
    except Exception as error:  # accelerate knows the errors by which torch says that memory is short
        if not should_reduce_batch_size(error):
            raise
    finally:
        model.zero_grad()
        # Frees cached memory, and the tensors that the frames of an error hold in reference cycles.
        clear_device_cache(garbage_collection=not fits)
    return fits


UNCHANGEABLE = (bool, int, float, complex, str, bytes, tuple, type(None))
"""Types of attributes that can be set back without a copy."""


@contextmanager
def restored(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Set random numbers, buffers, training modes and what modules count otherwise back on exit."""
    buffers = copied_buffers(model.modules())
    attributes = [
        (vars(module), {name: value for name, value in vars(module).items() if isinstance(value, UNCHANGEABLE)})
        for module in model.modules()
    ]
    extra = [
        (module, copy.deepcopy(module.get_extra_state()))
        for module in model.modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            yield
        finally:
            for module, name, buffer, before in buffers:
                buffer.copy_(before)
                setattr(module, name, buffer)  # a forward pass may have replaced it
            for own, before_it in attributes:
                own.update(before_it)
            for module, state in extra:
                module.set_extra_state(state)


def make_micro_batch(config: TrainingConfig, accelerator: Accelerator) -> MicroBatch | None:
    """Returns what finds the micro-batch size, or None if `config` gives it.

    Raises:
        ConfigError: if the model is sharded.
    """
    if config.micro_batch_size != "auto":
        return None
    if accelerator.is_fsdp2:
        reason = "and under FSDP2 a process that runs out of memory would leave the others waiting for its shards"
        advice = "Set a number; `fundamentallm estimate` predicts what fits."
        raise ConfigError(Problem("training.micro_batch_size", "auto", reason=reason, advice=advice))
    return MicroBatch(accelerator.device, accelerator.num_processes)
