"""`micro_batch_size: auto`: the largest that fits, found by trying, and kept with the run."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from fundamentallm.config.schema import TrainingConfig
from fundamentallm.data.loaders import device_batches
from fundamentallm.errors import ConfigError
from fundamentallm.training.guard import Guard
from fundamentallm.training.step import OptimizerStep

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer
if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer


MEMORY = {
    *("training.batch_size", "training.batch_size_schedule", "training.mixed_precision", "training.compile"),
    *("training.activation_checkpointing", "training.optimizer", "training.parameter_groups", "training.ema_decay"),
    *("training.loss", "training.validation_metrics", "data.sequence_length"),
}
"""Settings that say what memory a size takes, or which size is the largest."""


class MicroBatch:
    """The size that was found, and where: the same place goes on with it, so that a resumed run is the same to the bit,
    unless settings have changed that say what memory it takes.

    Attributes:
        size: sequences; None: not found yet.
        place: kind of the device and number of processes for which it was found.
    """

    def __init__(self, device: torch.device, num_processes: int) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
        self.size: int | None = None
        self.place = f"{num_processes} x {name}"

    def state_dict(self) -> dict[str, Any]:
        """Size and place."""
        return {"size": self.size, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the size over, where the place is the same. Raises ValueError if it is none."""
        size = state["size"]
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"the size is {size!r}; allowed: a whole number, at least 1.")
        self.size = size if state["place"] == self.place else None

    def settings_changed(self, names: Collection[str]) -> None:
        """Forget the size, if it may not fit with these settings."""
        if not MEMORY.isdisjoint(names):
            self.size = None

    def settle(self, trainer: Trainer) -> None:
        """Find the size, unless it is known, and let training and validation compute with it. For all processes alike.

        Raises:
            ConfigError: if not even one sequence fits.
        """
        samples, val_samples = trainer.samples, trainer.val_samples
        largest = samples.largest_rank_batch
        if self.size is None:
            self.size = _largest_that_fits(trainer, largest)
            trainer.say(f"micro_batch_size is auto: {self.size} of {largest} sequences at once fit")
        for sampler in (samples, val_samples):
            if sampler is not None:
                sampler.micro_batch_size = self.size


def smallest_number_of_parts(largest: int, fits: Callable[[int], bool]) -> int | None:
    """Into how few parts at least `largest` sequences are to be divided so that one of them fits; None: none does.

    A step divides its sequences evenly, so that no other sizes would be computed. Twice as many parts each time, then
    bisection: some 2 log2(parts) questions, of which few fail.

    Args:
        largest: sequences.
        fits: whether so many at once do.
    """
    too_few, parts = 0, 1
    while not fits(-(-largest // parts)):
        if parts >= largest:
            return None
        too_few, parts = parts, min(2 * parts, largest)
    while parts - too_few > 1:
        middle = (too_few + parts) // 2
        too_few, parts = (too_few, middle) if fits(-(-largest // middle)) else (middle, parts)
    return parts


def _largest_that_fits(trainer: Trainer, largest: int) -> int:
    first = trainer.global_step
    share = trainer.train_loader, trainer.samples, first, first + 1, trainer.accelerator.device
    rows, targets, *_ = next(device_batches(*share))

    def fits(size: int) -> bool:
        # Every process has tried, and says how it went, before any tries the next: nobody waits within a step.
        with trainer.group.barrier_with_errors():
            fits_here = _fits_here(trainer, rows, targets, size, in_several=size < largest)
        return all(trainer.group.all_gather(fits_here))

    # Else every size tried would be compiled for; uncompiled, it needs more memory rather than less.
    with (
        torch.compiler.set_stance("force_eager") if trainer.config.training.compile else nullcontext(),
        _leaving_no_trace(trainer),
    ):
        parts = smallest_number_of_parts(largest, fits)
    if parts is None:
        raise ConfigError(
            "training.micro_batch_size is auto and not even one sequence fits into the memory of the device; try a "
            "smaller model, a shorter data.sequence_length, training.activation_checkpointing, or FSDP2."
        )
    return -(-largest // parts)


def _fits_here(trainer: Trainer, rows: Tensor, targets: Tensor, size: int, in_several: bool) -> bool:
    """Whether this process can train on `size` sequences at once, and validate on them; they are some, repeated."""
    accelerator, fits = trainer.accelerator, False
    scaler = accelerator.scaler
    accelerator.scaler = copy.deepcopy(scaler)  # one that a try leaves half-way could not be used again
    try:
        index = torch.arange(size * (1 + in_several), device=rows.device) % len(rows)
        _try(trainer, rows[index], targets[index], size)
        fits = True
    except Exception as error:  # accelerate knows what torch raises where memory is short
        if not should_reduce_batch_size(error):
            raise
    finally:
        accelerator.scaler = scaler
    for parameter in trainer.model.parameters():
        parameter.grad = None
    # So that every size, and the run, begins with unbroken memory. An error's frames hold tensors, in circles.
    clear_device_cache(garbage_collection=not fits)
    return fits


def _try(trainer: Trainer, inputs: Tensor, targets: Tensor, size: int) -> None:
    """A step that changes nothing, and a validation's forward pass.

    What a save needs is less: it copies tensor after tensor to the host.
    """
    step, optimizer = _step_of_this_process(trainer), trainer.optimizer
    ballast: list[Tensor] = []
    if not getattr(optimizer, "_step_supports_amp_scaling", False) and not any(optimizer.state.values()):
        # It will not be called for a step that is left out; what it is going to keep is taken to be as much as Adam's.
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        ballast = [torch.empty_like(parameter) for parameter in trained for _ in range(2)]
    step.model_with_loss.train()
    # Of several micro-batches, the second comes when there are gradients already.
    step(trainer.global_step, inputs, targets, len(inputs) // size)
    model = step.model_with_loss.eval()
    with torch.no_grad():
        result = model(inputs[:size], targets[:size], with_logits=bool(trainer.validation_metrics))
        for metric in trainer.validation_metrics.values():
            metric(result[1].float(), targets[:size])
    del ballast


def _step_of_this_process(trainer: Trainer) -> OptimizerStep:
    """The run's own step, with a guard that lets no step be taken, and without any exchange between processes.

    Thus a process that runs out of memory leaves no other waiting.
    """
    step = copy.copy(trainer.optimizer_step)
    step.guard, step.num_processes = Guard(trainer.accelerator.device, max_bad_steps=0), 1
    step.model_with_loss = trainer.accelerator.unwrap_model(step.model_with_loss)
    return step


@contextmanager
def _leaving_no_trace(trainer: Trainer) -> Iterator[None]:
    """Afterwards random numbers, buffers, optimizer and mode are as before; no weight ever changes."""
    device, optimizer = trainer.accelerator.device, trainer.optimizer
    buffers = [(buffer, buffer.clone()) for buffer in trainer.model.buffers()]
    modes = {module: module.training for module in trainer.model_with_loss.modules()}
    had_state = {parameter for parameter, state in optimizer.state.items() if state}
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        trainer.model_with_loss.train()
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)
            for module, mode in modes.items():
                module.training = mode
            for parameter in [parameter for parameter in optimizer.state if parameter not in had_state]:
                del optimizer.state[parameter]


def make_micro_batch(config: TrainingConfig, accelerator: Accelerator) -> MicroBatch | None:
    """What finds the micro-batches' size; None where `config` says it.

    Raises:
        ConfigError: where it could not be found.
    """
    if config.micro_batch_size != "auto":
        return None
    if accelerator.is_fsdp2:
        raise ConfigError(
            "training.micro_batch_size is auto and the model is sharded (FSDP2), where a process that runs out of "
            "memory would leave the others waiting for its slices; set a number. (`fundamentallm estimate` foretells "
            "what fits.)"
        )
    return MicroBatch(accelerator.device, accelerator.num_processes)
