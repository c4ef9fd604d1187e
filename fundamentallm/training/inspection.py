"""Callbacks that look into a training: what the model writes, where the time goes, how far weights move."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.hooks import RemovableHandle

from fundamentallm.config import Config
from fundamentallm.data.datasets import TokenSamples
from fundamentallm.data.tokenizers import encode_prompt
from fundamentallm.errors import ConfigError, writing
from fundamentallm.models.generation import generate
from fundamentallm.training.callbacks import Callback, keep_file
from fundamentallm.training.json_lines import append
from fundamentallm.training.run_folder import SAMPLES
from fundamentallm.training.tensor_files import total_norm
from fundamentallm.validation import allowed_values, fits

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer

TRACES = "traces"


def continuation(
    trainer: Trainer, prompt: str | None, num_tokens: int, temperature: float = 0.7
) -> tuple[str, str] | None:
    """(prompt, what the model goes on with), on the main process, the same each time for the same weights; else None.

    Args:
        trainer: whose model writes.
        prompt: None: the beginning of the training text.
        num_tokens: to draw.
        temperature: see `generate`.

    Raises:
        ConfigError: if the training data is no text, or the prompt has characters that the tokenizer does not know.
    """
    dataset = trainer.train_loader.dataset
    if not isinstance(dataset, TokenSamples) or dataset.tokenizer is None:
        raise ConfigError(
            "the train_loader's dataset has no tokenizer, so no text can be generated; use a TokenDataset."
        )
    if not (trainer.is_main_process or trainer.is_sharded):  # all have to compute a sharded model
        return None
    ids = dataset.opening().tolist() if prompt is None else encode_prompt(dataset.tokenizer, prompt)
    stop = () if dataset.end_of_text is None else (dataset.end_of_text,)
    with trainer.averaged_weights():
        drawn = list(generate(trainer.model, ids, num_tokens, dataset.sequence_length, temperature, stop=stop))
    return dataset.tokenizer.decode(ids) if prompt is None else prompt, dataset.tokenizer.decode(drawn)


class SampleCallback(Callback):
    """Has the model write after each validation; in samples.jsonl, and on the console.

    Args:
        prompts: texts to go on from; None: the beginning of the training text.
        num_tokens: to draw for each; None: the config's `sample_tokens`.
        temperature: divides the logits; 0 takes the most probable token.
        path: of the file; None: samples.jsonl in the `output_dir` of a whole `Config`.

    Raises:
        ConfigError: listing what is of another type.

    Examples:
        >>> import torch
        >>> from fundamentallm import Config, DataConfig, ModelConfig, SampleCallback, Trainer
        >>> from fundamentallm import TrainingConfig, Transformer, create_dataloaders, create_tokenizer
        >>> text = "to be or not to be " * 100
        >>> tokenizer = create_tokenizer("char", lambda: [text], lambda: [text])
        >>> model = ModelConfig(vocab_size=tokenizer.get_vocab_size(), d_model=16, num_heads=2, num_layers=1)
        >>> config = Config("runs/one", model, DataConfig(sequence_length=19), TrainingConfig(learning_rate=0.03))
        >>> loaders = create_dataloaders(text, tokenizer, config)
        >>> trainer = Trainer(Transformer(model), config, *loaders, callbacks=[SampleCallback(["to be"], 20)])
        >>> history = trainer.train()
        ---- step 3: 'to be' continued ----
        ...
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        num_tokens: int | None = None,
        temperature: float = 0.7,
        path: Path | str | None = None,
    ) -> None:
        wanted = {"prompts": (prompts, list[str] | None), "num_tokens": (num_tokens, int | None)}
        # Of a text, each character would be a prompt. (What else is wrong, generating nothing finds out.)
        if wrong := {name: pair for name, pair in wanted.items() if not fits(*pair)}:
            raise ConfigError(
                [f"{name} is {value!r}; allowed: {allowed_values(t)}." for name, (value, t) in wrong.items()]
            )
        self.prompts: list[str | None] = [*prompts] if prompts else [None]
        self.num_tokens, self.temperature = num_tokens, temperature
        self.path = Path(path) if path else None

    def on_train_begin(self, trainer: Trainer) -> None:
        """Bring the file back to the step the run goes on from."""
        if trainer.val_loader is None:
            raise ConfigError("samples are written after validations, and there is no val_loader; leave them out.")
        config = trainer.run_config
        if isinstance(config, Config):
            self.path = self.path or Path(config.output_dir) / SAMPLES
            self.num_tokens = config.sample_tokens if self.num_tokens is None else self.num_tokens
        if self.num_tokens is None:
            self.num_tokens = Config.sample_tokens
        for prompt in self.prompts:
            continuation(trainer, prompt, min(self.num_tokens, 0), self.temperature)  # finds out what is wrong
        if self.path is not None and trainer.is_main_process:
            keep_file(trainer, self.path, lambda _: True)  # all lines are made at validations

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Write."""
        for prompt in self.prompts:
            written = continuation(trainer, prompt, self.num_tokens or 0, self.temperature)
            if written is None or not trainer.is_main_process:
                continue
            trainer.say(f"---- step {trainer.global_step}: {written[0]!r} continued ----\n{written[1]}")
            if self.path is not None:
                append(self.path, {"step": trainer.global_step, "prompt": written[0], "text": written[1]})


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
        if isinstance(trainer.run_config, Config):
            self.folder = self.folder or Path(trainer.run_config.output_dir) / TRACES

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


class RatioCallback(Callback):
    """Measures, in the steps that are logged, how large gradients are and how far weights move: for each block of the
    model `grad_norm/<block>` (as the optimizer gets it, clipped) and `update_ratio/<block>`, the norm of the change of
    its weights over their norm before. (Around 1e-3 is what trains well with Adam, by A. Karpathy's rule of thumb.)

    In those steps the weights are there twice; in the others it costs nothing.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from fundamentallm import Callback, RatioCallback, Trainer, TrainingConfig
        >>> numbers = torch.arange(300).reshape(30, 10) % 3
        >>> loader = DataLoader(TensorDataset(numbers, (numbers + 1) % 3), batch_size=4)
        >>> class Show(Callback):
        ...     def on_log(self, trainer, metrics):
        ...         print([name for name in metrics if "/" in name])
        >>> trainer = Trainer(nn.Embedding(3, 3), TrainingConfig(), loader, callbacks=[RatioCallback(), Show()])
        >>> history = trainer.train()
        ['grad_norm/weight', 'update_ratio/weight']
    """

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []
        self._blocks: dict[str, list[Tensor]] = {}
        self._before: dict[str, list[Tensor]] = {}
        self._norms: dict[str, Tensor] = {}

    def on_train_begin(self, trainer: Trainer) -> None:
        """Listen to the optimizer, which alone sees gradients and both weights."""
        trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        self._blocks = {}
        for name, parameter in trainer.model.named_parameters():
            if id(parameter) in trained:
                self._blocks.setdefault(block_of(name), []).append(parameter)
        optimizer = trainer.optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._look(trainer)),
            optimizer.register_step_post_hook(lambda *_: self._compare()),
        ]

    @torch.no_grad()
    def _look(self, trainer: Trainer) -> None:
        step = trainer.global_step + 1
        self._norms, self._before = {}, {}
        if step != trainer.total_steps and step % trainer.config.log_every_n_steps:
            return
        clips_by = getattr(trainer.optimizer, "grad_scale", None)  # a fused kernel does it; others get them clipped
        for block, parameters in self._blocks.items():
            if gradients := [parameter.grad for parameter in parameters if parameter.grad is not None]:
                norm = total_norm(gradients)
                self._norms[f"grad_norm/{block}"] = norm if clips_by is None else norm / clips_by
                self._before[block] = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def _compare(self) -> None:
        for block, before in self._before.items():
            moved = [parameter - old for parameter, old in zip(self._blocks[block], before, strict=True)]
            self._norms[f"update_ratio/{block}"] = total_norm(moved) / total_norm(before)
        self._before = {}

    def measure(self, trainer: Trainer) -> dict[str, float]:
        """The numbers of the step just taken; none of one that an optimizer without a fused kernel has left out."""
        if not self._norms:
            return {}
        names, norms = list(self._norms), torch.stack(list(self._norms.values()))
        self._norms = {}
        return dict(zip(names, norms.tolist(), strict=True))

    def on_train_end(self, trainer: Trainer) -> None:
        """Listen no more."""
        for hook in self._hooks:
            hook.remove()

    on_train_abort = on_train_end


def block_of(name: str) -> str:
    """The block that a parameter belongs to: its name up to the first number, else its module's."""
    numbered = re.match(r"(.*?\.)??\d+(?=\.)", name)
    return numbered.group() if numbered else name.rpartition(".")[0] or name
