"""Callbacks that observe or disturb a run, and write what they have measured into its output_dir as JSON.

Configs name them as tests.gpu.hooks:Name. They also work on a CPU, so that they can be tried without a GPU.
"""

import json
import os
import signal
import time
from typing import Any

import torch
from torch import Tensor, nn

from fundamentallm import Callback, Trainer
from fundamentallm.data.loaders import device_batches

STOP_AT = "GPU_CHECK_STOP_AT"
"""Environment variable: the step after which `Preempted` ends the run."""


class Hook(Callback):
    """A callback that writes `seen` to a file with its own name."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_end(self, trainer: Trainer) -> None:
        folder = trainer.output_dir
        (folder / f"{type(self).__name__}.json").write_text(json.dumps(self.seen))


class Facts(Hook):
    """Records device, precision and peak memory of the run, and how long it waited for its checkpoints."""

    def on_train_begin(self, trainer: Trainer) -> None:
        self.waited: list[float] = []
        self.began: float | None = None
        self.first_step: float | None = None
        self.cuda = trainer.accelerator.device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        if (manager := trainer.checkpoint_manager) is not None:
            save = manager.save_in_background

            def timed(*arguments: Any, **options: Any) -> Any:
                if self.cuda:
                    torch.cuda.synchronize()  # so that earlier steps do not count
                started = time.perf_counter()
                result = save(*arguments, **options)
                self.waited.append(time.perf_counter() - started)
                return result

            manager.save_in_background = timed  # type: ignore[method-assign]

    def on_step_begin(self, trainer: Trainer) -> None:
        now = time.perf_counter()
        if self.began is None:
            self.began = now
        elif self.first_step is None:
            self.first_step = now - self.began

    def on_train_end(self, trainer: Trainer) -> None:
        self.seen = {
            "device": trainer.accelerator.device.type,
            "sharded": trainer.is_sharded,
            "mixed_precision": trainer.accelerator.mixed_precision,
            "compiled": trainer.config.training.compile,
            "first_step_seconds": self.first_step,
            "micro_batch_size": trainer.samples.micro_batch_size,
            "peak_bytes": torch.cuda.max_memory_allocated() if self.cuda else None,
            "seconds_waited": self.waited,
            "seconds_written": trainer.checkpoint_manager.seconds if trainer.checkpoint_manager else None,
        }
        super().on_train_end(trainer)


class LittleMemory(Hook):
    """Limits the memory of the GPU before the run begins."""

    GIGABYTES = 12

    def __init__(self) -> None:
        super().__init__()
        if torch.cuda.is_available():
            _, total = torch.cuda.mem_get_info()
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.GIGABYTES * 1e9 / total))


class NoWaiting(Hook):
    """Makes the run fail if the host waits for the device in a step that is not logged."""

    def on_train_begin(self, trainer: Trainer) -> None:
        self.trainer, steps = trainer, set[int]()

        # From the first forward pass of such a step to that of the next one, which includes the loader and all hooks.
        def before_forward(model: nn.Module, _: Any) -> None:
            step = trainer.global_step + 1
            ordinary = (
                model.training and step != trainer.total_steps and step % trainer.config.training.log_every_n_steps != 0
            )
            steps.update({step} if ordinary else ())
            if trainer.accelerator.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error" if ordinary else "default")
            self.seen = {"steps_without_waiting": len(steps)}

        trainer.model.register_forward_pre_hook(before_forward)


class Overflow(Hook):
    """Makes the gradient of one step overflow, and compares weights and moments before and after."""

    step = 5

    def on_train_begin(self, trainer: Trainer) -> None:
        self.before: list[Tensor] | None = None
        scaler: Any = trainer.accelerator.scaler

        def state() -> list[Tensor]:
            moments = [value for values in trainer.optimizer.state.values() for value in values.values()]
            return [tensor.detach().clone() for tensor in (*trainer.model.parameters(), *moments)]

        def before_forward(model: nn.Module, _: Any) -> None:
            step = trainer.global_step
            if step == self.step and self.before is None:
                self.before = state()
                if scaler is not None:
                    self.scale = scaler.get_scale()
                    scaler.update(new_scale=2.0**60)  # the loss is float32 and stays finite; float16 gradients do not
            elif step == self.step + 1 and not self.seen:
                assert self.before is not None
                same = all(torch.equal(old, new) for old, new in zip(self.before, state(), strict=True))
                self.seen = {"unchanged": same, "halved": scaler is None or scaler.get_scale() == 2.0**59}
                if scaler is not None:
                    scaler.update(new_scale=self.scale)

        def after_forward(model: nn.Module, _: Any, logits: Tensor) -> Tensor:
            planted = scaler is None and model.training and trainer.global_step == self.step
            return logits * torch.inf if planted else logits

        trainer.model.register_forward_pre_hook(before_forward)
        trainer.model.register_forward_hook(after_forward)


class Deterministic(Callback):
    """Uses only kernels that add in a fixed order; by default, the backward pass of flash attention does not."""

    def on_train_begin(self, trainer: Trainer) -> None:
        torch.use_deterministic_algorithms(True)


class Preempted(Callback):
    """Ends the run by SIGTERM after a step, as a scheduler does."""

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if os.environ.get(STOP_AT) == str(trainer.global_step):
            os.kill(os.getpid(), signal.SIGTERM)


def now(device: torch.device) -> float:
    """Returns the time at which the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class ModelAlone(Hook):
    """Measures the forward and backward passes of a step alone."""

    times = 10

    def on_train_end(self, trainer: Trainer) -> None:
        device, model = trainer.accelerator.device, trainer.model_with_loss
        batch = next(device_batches(trainer.train_loader, trainer.samples, 0, 1, device))
        for count in (2, self.times):  # the first round warms up
            started = now(device)
            for _ in range(count):
                for micro_batch in batch.micro_batches():
                    trainer.accelerator.backward(model(micro_batch.content))
                trainer.model.zero_grad()
            self.seen = {"seconds": (now(device) - started) / count}
        super().on_train_end(trainer)


class MatrixProduct(Hook):
    """Measures how fast the device multiplies two large matrices in bfloat16."""

    def on_train_end(self, trainer: Trainer) -> None:
        device = trainer.accelerator.device
        size, times = (8192, 20) if device.type == "cuda" else (256, 2)
        a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
        for count in (3, times):  # the first round warms up
            started = now(device)
            for _ in range(count):
                a @ b
            seconds = (now(device) - started) / count
        self.seen = {"flops_per_second": 2 * size**3 / seconds}
        super().on_train_end(trainer)
