"""Generates text during training."""

from __future__ import annotations

from pathlib import Path

import torch

from fundamentallm.data.datasets import Tokenized, opening
from fundamentallm.data.tokenizers import encode_prompt
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.inference.generation import generate
from fundamentallm.run.folder import SAMPLES, LineFile
from fundamentallm.training.callbacks.base import Callback, RunView, rewind_lines


def continuation(
    trainer: RunView, prompt: str | None, num_tokens: int, temperature: float = 0.7
) -> tuple[str, str] | None:
    """Returns a prompt (None: the beginning of the training text) and its continuation. Same weights, same text.

    None on processes other than the main one, unless the model is sharded.

    Raises:
        ConfigError: if the training data is not text, or the tokenizer does not know a character of the prompt.
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
        prompts: texts to continue; None: the beginning of the training text.
        num_tokens: number of tokens to draw for each; None: the config's `sample_tokens`.
        temperature: divides the logits; 0 takes the most probable token.

    Raises:
        ConfigError: if `prompts` is a text and not a list of texts.

    Examples:
        >>> from fundamentallm import SampleCallback
        >>> callbacks = [SampleCallback(["To be"], num_tokens=20)]  # for a Trainer with a validation set
    """

    def __init__(
        self, prompts: list[str] | None = None, num_tokens: int | None = None, temperature: float = 0.7
    ) -> None:
        if isinstance(prompts, str):  # it would be taken for a list of characters
            raise ConfigError(Problem("prompts", prompts, "a list of text"))
        self.prompts: list[str | None] = [*prompts] if prompts else [None]
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
