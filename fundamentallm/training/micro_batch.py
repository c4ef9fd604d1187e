"""`micro_batch_size: auto`: finds the largest micro-batch that fits by trying, and keeps it with the run."""

import math
import platform
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from fundamentallm.distributed.batches import StepBatch, take_rows
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.training.first_batch import restored
from fundamentallm.training.step import OptimizerStep


class MicroBatch:
    """The size found, and the hardware it was found on.

    A run that resumes on the same hardware with the same settings keeps its size, so that it is bit-identical.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        device = accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
        self.size: int | None = None  # sequences in a micro-batch; None: not found yet
        self.hardware = f"{accelerator.num_processes} x {name}"

    def state_dict(self) -> dict[str, Any]:
        """Returns size and hardware (key "place" in format 2)."""
        return {"size": self.size, "place": self.hardware}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the size if the hardware is the same. Raises ValueError if it is not a size."""
        size = state["size"]
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"the size is {size!r}; allowed: an integer, at least 1.")
        self.size = size if state["place"] == self.hardware else None

    def settle(
        self, step: OptimizerStep, batches: Iterator[StepBatch], largest: int, group: HostGroup, has_metrics: bool
    ) -> int:
        """Returns the size. Unless it is known, the next batch is tried, with its rows repeated to each size.

        A batch of `largest` sequences is split evenly, into the fewest micro-batches that fit on every process. A try
        exchanges nothing, so that a process that runs out of memory leaves no other one waiting. Raises ConfigError if
        not even one sequence fits.
        """
        if self.size is not None:
            return self.size
        batch = next(batches)

        def fits(count: int) -> bool:
            rows = [row % batch.size for row in range(math.ceil(largest / count))]
            with group.barrier_with_errors():
                fits_here = _fits(step, take_rows(batch.content, batch.size, rows), min(count, 2), has_metrics)
            return all(group.all_gather(fits_here))

        # Uncompiled, which needs no less memory: otherwise each size tried would be compiled for.
        with torch.compiler.set_stance("force_eager"), restored(step.objective, step.accelerator.device):
            # Often the whole batch fits, which bisection alone would try last.
            count = 1 if fits(1) else 2 + bisect_left(range(2, largest + 1), True, key=fits)
        if count > largest:
            reason = "and not even one sequence fits into the memory of the device"
            advice = "Try a smaller model, a shorter data.sequence_length, training.activation_checkpointing, or FSDP2."
            raise ConfigError(Problem("training.micro_batch_size", "auto", "", advice, reason))
        self.size = math.ceil(largest / count)
        return self.size


def _fits(step: OptimizerStep, batch: Any, num_micro_batches: int, has_metrics: bool) -> bool:
    """Returns whether this process has the memory to train and to validate on a micro-batch."""
    model, optimizer, fits = step.objective, step.optimizer, False
    try:
        # The optimizer state of the first step, at most as much as Adam's.
        state = [] if any(optimizer.state.values()) else [torch.empty_like(p) for p in step.parameters * 2]
        model.train()
        for _ in range(num_micro_batches):  # the second one runs beside the gradients of the first
            model(batch).backward()
        model.eval()
        with torch.no_grad():
            model(batch, with_outputs=has_metrics)
        del state
        fits = True
    except Exception as error:  # accelerate knows the errors by which torch says that memory is short
        if not should_reduce_batch_size(error):
            raise
    finally:
        model.zero_grad()
        # Frees cached memory, and the tensors that the frames of an error hold in reference cycles.
        clear_device_cache(garbage_collection=not fits)
    return fits
