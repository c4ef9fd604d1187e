"""Profiles a few steps."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from accelerate.utils import ProfileKwargs
from torch.profiler import profile

from fundamentallm.errors import ConfigError, Problem, writing
from fundamentallm.training.callbacks.base import Callback, RunView


class ProfilerCallback(Callback):
    """Profiles chosen optimizer steps: a Chrome trace (open it in https://ui.perfetto.dev) and a table of operations.

    They are in traces of the `output_dir`. A launch that resumes within the chosen steps traces the remaining ones.

    Args:
        first_step: first step traced, from 1; None: the tenth of this launch, as the first ones compile and allocate.
        num_steps: number of steps traced.
        all_processes: whether every process writes a trace; otherwise only the main process does.
        with_stack: whether to record lines of Python code, which takes time.

    Examples:
        >>> from fundamentallm import ProfilerCallback
        >>> callbacks = [ProfilerCallback(first_step=100, num_steps=5)]  # for a Trainer
    """

    def __init__(
        self, first_step: int | None = None, num_steps: int = 3, all_processes: bool = False, with_stack: bool = False
    ) -> None:
        if num_steps < 1:
            raise ConfigError(Problem("num_steps", num_steps, "at least 1"))
        self.first_step, self.num_steps = first_step, num_steps
        self.all_processes, self.with_stack = all_processes, with_stack
        self._last_step = 0
        self._profile: profile | None = None
        self._open = ExitStack()

    def on_train_begin(self, trainer: RunView) -> None:
        step = trainer.global_step
        first = self.first_step or step + 10
        self._last_step = first + self.num_steps - 1
        first = max(first, step + 1)
        if first > self._last_step or not (self.all_processes or trainer.is_main_process):
            return
        active = self._last_step - first + 1
        options = ProfileKwargs(
            schedule_option={"skip_first": first - step - 1, "wait": 0, "warmup": 1, "active": active, "repeat": 1},
            on_trace_ready=lambda profile: self._write(trainer, profile, first),
            record_shapes=True,
            profile_memory=True,
            with_stack=self.with_stack,
        )
        self._profile = self._open.enter_context(trainer.accelerator.profile(options))

    def on_step_begin(self, trainer: RunView) -> None:
        # Not in on_step_end: if any callback overrides that hook, the host waits for the device at every step.
        if self._profile is not None:
            self._profile.step()
            if trainer.global_step >= self._last_step:
                self.on_train_end(trainer)

    def on_train_end(self, trainer: RunView) -> None:
        self._open.close()
        self._profile = None

    on_train_abort = on_train_end

    def _write(self, trainer: RunView, done: profile, first: int) -> None:
        folder = (trainer.output_dir or Path()) / "traces"
        last = min(self._last_step, trainer.global_step)
        name = f"step_{first:08d}-{last:08d}.rank{trainer.accelerator.process_index}"
        order = "self_cpu_time_total" if trainer.accelerator.device.type == "cpu" else "self_device_time_total"
        with writing(folder / name):
            folder.mkdir(parents=True, exist_ok=True)
            done.export_chrome_trace(str(folder / f"{name}.json"))
            table = done.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80)
            (folder / f"{name}.txt").write_text(table, encoding="utf-8")
        trainer.say(f"trace of steps {first} to {last}: {folder / name}.json")
