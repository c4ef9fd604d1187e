"""Profiles a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch.profiler import ProfilerActivity, profile, schedule

from fundamentallm.config.validation import fits
from fundamentallm.errors import ConfigError, writing
from fundamentallm.training.callbacks.base import Callback

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer


TRACES = "traces"


class ProfilerCallback(Callback):
    """Traces chosen optimizer steps with torch's profiler: a Chrome trace (open it in https://ui.perfetto.dev) and a
    table of the most expensive operations.

    A start of the run that begins after them traces nothing; one that begins among them, the rest. The first step of a
    start is never traced: the profiler warms up in the step before.

    Args:
        first_step: number of the first step traced, counted from 1; None: the tenth of this start, so that neither
            compilation nor the first allocations are in the trace.
        num_steps: how many.
        all_processes: whether each process writes a trace; else the main one only.
        with_stack: whether to note the lines of Python, which costs time.
        folder: of the files; None: traces in the `output_dir` of a whole `Config`.

    Raises:
        ConfigError: if a number is less than 1.

    Examples:
        >>> from pathlib import Path
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from fundamentallm import ProfilerCallback, Trainer, TrainingConfig
        >>> numbers = torch.arange(300).reshape(30, 10) % 3
        >>> loader = DataLoader(TensorDataset(numbers, (numbers + 1) % 3), batch_size=4)
        >>> profiler = ProfilerCallback(first_step=3, num_steps=2, folder="traces")
        >>> history = Trainer(nn.Embedding(3, 3), TrainingConfig(), loader, callbacks=[profiler]).train()
        trace of steps 3 to 4: traces/step_00000003-00000004.rank0.json
        >>> sorted(path.suffix for path in Path("traces").iterdir())  # the table of operations is a text
        ['.json', '.txt']
    """

    def __init__(
        self,
        first_step: int | None = None,
        num_steps: int = 3,
        all_processes: bool = False,
        with_stack: bool = False,
        folder: Path | str | None = None,
    ) -> None:
        steps = {"first_step": first_step, "num_steps": num_steps}
        if wrong := {name: n for name, n in steps.items() if n is not None and not (fits(n, int) and n >= 1)}:
            raise ConfigError([f"{name} is {n!r}; allowed: an integer, at least 1." for name, n in wrong.items()])
        self.first_step, self.num_steps = first_step, num_steps
        self.all_processes, self.with_stack = all_processes, with_stack
        self.folder = Path(folder) if folder else None
        self._first = self._last = 0
        self._profile: profile | None = None

    def on_train_begin(self, trainer: Trainer) -> None:
        """Choose the steps of this start."""
        first = self.first_step or trainer.global_step + 10
        self._last = first + self.num_steps - 1
        self._first = max(first, trainer.global_step + 2)
        if trainer.output_dir is not None:
            self.folder = self.folder or trainer.output_dir / TRACES

    def on_step_begin(self, trainer: Trainer) -> None:
        """Start, go on with, or end the trace."""
        step = trainer.global_step + 1
        if self._profile is not None:
            self._profile.step()
            if step > self._last:
                self._stop()
        elif step == self._first - 1 < self._last and (self.all_processes or trainer.is_main_process):
            self._start(trainer)

    def _start(self, trainer: Trainer) -> None:
        folder = self.folder or Path(TRACES)
        device = trainer.accelerator.device.type
        kinds = {"cuda": [ProfilerActivity.CUDA], "xpu": [ProfilerActivity.XPU]}.get(device, [])

        def write(done: profile) -> None:
            last = min(self._last, trainer.global_step)
            name = f"step_{self._first:08d}-{last:08d}.rank{trainer.accelerator.process_index}"
            with writing(folder / name):
                folder.mkdir(parents=True, exist_ok=True)
                done.export_chrome_trace(str(folder / f"{name}.json"))
                order = "self_device_time_total" if kinds else "self_cpu_time_total"
                table = done.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80)
                (folder / f"{name}.txt").write_text(table, encoding="utf-8")
            trainer.say(f"trace of steps {self._first} to {last}: {folder / name}.json")

        self._profile = profile(
            activities=[ProfilerActivity.CPU, *kinds],
            schedule=schedule(wait=0, warmup=1, active=self._last - self._first + 1, repeat=1),
            on_trace_ready=write,
            record_shapes=True,
            profile_memory=True,
            with_stack=self.with_stack,
            acc_events=True,
        )
        self._profile.start()

    def on_train_end(self, trainer: Trainer) -> None:
        """Write what has been traced, where the run ends among the steps."""
        self._stop()

    on_train_abort = on_train_end

    def _stop(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
