"""Shows what a run does: text that its model writes, and the time that its operations take."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate.utils import ProfileKwargs
from torch.profiler import profile

from fundamentallm.data.datasets import Tokenized, opening
from fundamentallm.data.tokenizers import encode_prompt
from fundamentallm.errors import ConfigError, Problem, writing
from fundamentallm.inference.generation import generate
from fundamentallm.run.folder import SAMPLES, LineFile
from fundamentallm.training.callbacks.base import Callback, RunView, rewind_lines


def continuation(
    trainer: RunView, prompt: str | None, num_tokens: int, temperature: float = 0.7
) -> tuple[str, str] | None:
    """Returns a prompt (None: the beginning of the training text) and its continuation. Same weights, same text.

    None on processes other than the main one, unless the model is sharded. Raises ConfigError if the data is not text,
    or the tokenizer does not know a character of the prompt.
    """
    dataset = trainer.train_loader.dataset
    if not isinstance(dataset, Tokenized) or dataset.tokenizer is None:
        raise ConfigError("No text can be generated: train_loader's dataset has no tokenizer. Use a TokenDataset.")
    if not (trainer.is_main_process or trainer.accelerator.is_fsdp2):  # every process has to compute a sharded model
        return None
    ids = opening(trainer.samples.data[0]) if prompt is None else encode_prompt(dataset.tokenizer, prompt)
    stop = () if dataset.end_of_text is None else (dataset.end_of_text,)
    # Compiled blocks of a sharded model would be compiled again for each length.
    with trainer.averaged_weights(), torch.compiler.set_stance("force_eager"):
        drawn = list(generate(trainer.model, ids, num_tokens, dataset.sequence_length, temperature, stop=stop))
    return dataset.tokenizer.decode(ids) if prompt is None else prompt, dataset.tokenizer.decode(drawn)


class SampleCallback(Callback):
    """Generates text after each validation, prints it, and stores it in samples.jsonl in the `output_dir`.

    Args:
        prompts: a text or texts to continue; None: the beginning of the training text.
        num_tokens: number of tokens to draw for each; None: the config's `sample_tokens`.
        temperature: divides the logits; 0 takes the most probable token.

    Examples:
        >>> from fundamentallm import SampleCallback
        >>> callbacks = [SampleCallback(["To be"], num_tokens=20)]  # for a Trainer with a validation set
    """

    def __init__(
        self, prompts: list[str] | str | None = None, num_tokens: int | None = None, temperature: float = 0.7
    ) -> None:
        texts = [prompts] if isinstance(prompts, str) else prompts
        self.prompts: list[str | None] = [*texts] if texts else [None]
        self.num_tokens, self.temperature = num_tokens, temperature
        self._file = LineFile(Path(SAMPLES))

    def on_train_begin(self, trainer: RunView) -> None:
        if trainer.val_loader is None:
            advice = "Samples follow validations; give a val_loader, or leave samples out."
            raise ConfigError(Problem("callbacks", trainer.config.callbacks, advice=advice))
        if self.num_tokens is None:
            self.num_tokens = trainer.config.sample_tokens
        for prompt in self.prompts:  # finds mistakes before the first step
            continuation(trainer, prompt, min(self.num_tokens, 0), self.temperature)
        if trainer.output_dir is not None and trainer.is_main_process:
            self._file.path = trainer.output_dir / SAMPLES
            rewind_lines(trainer, self._file)

    def on_validation_end(self, trainer: RunView, metrics: dict[str, float]) -> None:
        for prompt in self.prompts:
            written, step = continuation(trainer, prompt, self.num_tokens or 0, self.temperature), trainer.global_step
            if written is not None and trainer.is_main_process:
                trainer.say(f"---- step {step}: {written[0]!r} continued ----\n{written[1]}")
                if trainer.output_dir is not None:
                    self._file.append({"step": step, "prompt": written[0], "text": written[1]})


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
        for name, number in (("first_step", first_step), ("num_steps", num_steps)):
            if number is not None and number < 1:
                raise ConfigError(Problem(name, number, "at least 1"))
        self.first_step, self.num_steps = first_step, num_steps
        self.all_processes, self.with_stack = all_processes, with_stack
        self._steps = range(0)  # those traced in this launch
        self._profile: profile | None = None
        self._open = ExitStack()

    def on_train_begin(self, trainer: RunView) -> None:
        done, first = trainer.global_step, self.first_step or trainer.global_step + 10
        self._steps = range(max(first, done + 1), first + self.num_steps)
        if not self._steps or not (self.all_processes or trainer.is_main_process):
            return
        waits, active = self._steps[0] - done - 1, len(self._steps)
        options = ProfileKwargs(
            schedule_option={"skip_first": waits, "wait": 0, "warmup": 1, "active": active, "repeat": 1},
            on_trace_ready=lambda profile: self._write(trainer, profile),
            record_shapes=True,
            profile_memory=True,
            with_stack=self.with_stack,
        )
        self._profile = self._open.enter_context(trainer.accelerator.profile(options))

    def on_step_begin(self, trainer: RunView) -> None:
        # Not in on_step_end: if any callback overrides that hook, the host waits for the device at every step.
        if self._profile is not None:
            self._profile.step()
            if trainer.global_step >= self._steps[-1]:
                self.on_train_end(trainer)

    def on_train_end(self, trainer: RunView) -> None:
        self._open.close()
        self._profile = None

    on_train_abort = on_train_end

    def _write(self, trainer: RunView, done: profile) -> None:
        folder = (trainer.output_dir or Path()) / "traces"
        first, last = self._steps[0], min(self._steps[-1], trainer.global_step)
        name = f"step_{first:08d}-{last:08d}.rank{trainer.accelerator.process_index}"
        order = "self_cpu_time_total" if trainer.accelerator.device.type == "cpu" else "self_device_time_total"
        with writing(folder / name):
            folder.mkdir(parents=True, exist_ok=True)
            done.export_chrome_trace(str(folder / f"{name}.json"))
            table = done.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80)
            (folder / f"{name}.txt").write_text(table, encoding="utf-8")
        trainer.say(f"trace of steps {first} to {last}: {folder / name}.json")
