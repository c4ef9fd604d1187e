"""Callbacks that look into a training: what the model writes, where the time goes, how far weights move."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fundamentallm.config.validation import allowed_values, fits
from fundamentallm.data.datasets import TokenSamples
from fundamentallm.data.tokenizers import encode_prompt
from fundamentallm.errors import ConfigError
from fundamentallm.inference.generation import generate
from fundamentallm.run.folder import SAMPLES
from fundamentallm.run.json_lines import append, keep_file
from fundamentallm.training.callbacks.base import Callback

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer


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
        >>> tokenizer = create_tokenizer("char", text)
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
        if trainer.output_dir is not None:
            self.path = self.path or trainer.output_dir / SAMPLES
        if self.num_tokens is None:
            self.num_tokens = trainer.config.sample_tokens
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
