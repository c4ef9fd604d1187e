"""Every setting of a run, as frozen dataclasses. Field docstrings are the help texts.

This module imports no torch, so that `--help` and a config error answer at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from fundamentallm.files import BUILT_IN_CORPUS, data_problems, expand_user, is_no_folder
from fundamentallm.registry import did_you_mean, unknown_name
from fundamentallm.validation import Section

LARGE_VOCABULARY, CHUNK = 1024, 512
"""Tokens in a vocabulary from which on logits are made for so many positions at a time only."""
IGNORE_INDEX = -100
"""Target that is not trained on: torch's and transformers' convention."""

# The tables behind these names live in the modules that import torch (a test holds the two together).
OPTIMIZER_NAMES = ("adamw", "adam", "sgd", "muon")
SCHEDULE_NAMES = ("constant", "linear", "cosine", "cosine_with_restarts", "wsd")
METRIC_NAMES = ("val_loss", "val_perplexity", "val_bits_per_byte")
LOSS_NAMES = ("cross_entropy", "label_smoothing", "focal", "z_loss")


@dataclass(frozen=True)
class ModelConfig(Section):
    """Shape of the `Transformer`."""

    vocab_size: int | None = None
    """Rows of the embedding table, in tokens; default: the tokenizer's vocabulary."""
    d_model: int = 256
    """Width of the residual stream, in features."""
    num_heads: int = 8
    """Query heads in each attention layer."""
    num_kv_heads: int | None = None
    """Key and value heads, each shared by num_heads / num_kv_heads query heads; default: num_heads."""
    num_layers: int = 6
    """Decoder blocks."""
    d_ff: int | None = None
    """Hidden width of the SwiGLU, in features; default: 8/3 of d_model, rounded up to a multiple of 8."""
    dropout: float = 0.0
    """Probability of dropping an embedding feature, an attention weight or a block's output feature."""
    tie_embeddings: bool = False
    """Use the embedding table as the output projection too."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths, in tokens (RoFormer, arXiv:2104.09864)."""
    init_from: str | None = None
    """A checkpoint whose weights a new run begins with (nothing else of it); null: random weights."""
    qk_norm: bool = True
    """RMS-normalise queries and keys for each head (opens in transformers as Qwen3; without, as Llama)."""

    def _relations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.d_model % max(2 * self.num_heads, 1):
            yield (
                ("d_model", "num_heads"),
                f"d_model is {self.d_model} and num_heads is {self.num_heads}; allowed: a d_model that "
                f"2 x num_heads = {2 * self.num_heads} divides, since rotary positions turn pairs of features.",
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            yield (
                ("num_heads", "num_kv_heads"),
                f"num_kv_heads is {self.num_kv_heads} and num_heads is {self.num_heads}; "
                "allowed: a num_kv_heads that divides num_heads.",
            )

    def resolved(self) -> ModelConfig:
        """The same shape with every derived default filled in."""
        return dataclasses.replace(
            self,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            d_ff=self.d_ff or 8 * math.ceil(self.d_model / 3),
        )


@dataclass(frozen=True)
class DataConfig(Section):
    """The text, and how it becomes samples."""

    source: str | dict[str, float] = BUILT_IN_CORPUS
    """A file, folder, glob, 'datasets:NAME', 'python-docs' (CPython's own); or several, each with its weight."""
    tokenizer: str = "char"
    """'char', 'byte', 'bpe:<vocabulary size>' trained on the training text, or a tokenizer.json file."""
    train_split: float = 0.9
    """Leading fraction of the text that is trained on; the rest is validation (1: no validation)."""
    text_field: str = "text"
    """Field of a row (of .jsonl, .parquet, datasets) that holds the text."""
    prompt_field: str | None = None
    """Field of what the text answers: each row is a sample, whose prompt is not trained on; null: there is none."""
    end_of_text: str | None = None
    """Token after each document, such as '<|endoftext|>'; null: an empty line between documents."""
    mask_documents: bool = False
    """Let no token attend to what comes before its document's beginning (needs end_of_text)."""
    suffixes: list[str] = field(default_factory=lambda: [".txt", ".md"])
    """Endings of the files that a folder means."""
    max_bad_rows: int = 0
    """Rows (and text files) that cannot be read and may be left out, counted and named; with more it is an error."""
    sequence_length: int = 256
    """Tokens the model sees at once; one sample."""
    num_workers: int = 0
    """Processes that prepare batches ahead; 0: the training process itself, fastest for memory-mapped text."""
    cache_dir: str | None = None
    """Folder for tokenized text, keyed by content and tokenizer; default: the user's cache folder."""

    def _relations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        kind, _, size = self.tokenizer.partition(":")
        if kind == "bpe":
            # 256 bytes and at least one merge.
            if not (size.isascii() and size.isdecimal() and len(size) < 10 and int(size) > 256):
                yield (
                    ("tokenizer",),
                    f"tokenizer is {self.tokenizer!r}; allowed: 'bpe:<vocabulary size>' with a size above 256.",
                )
        elif self.tokenizer not in ("char", "byte") and not self.tokenizer.endswith(".json"):
            near = did_you_mean(self.tokenizer, ("char", "byte"))
            yield (
                ("tokenizer",),
                f"tokenizer is {self.tokenizer!r}; allowed: 'char', 'byte', 'bpe:<vocabulary size>', "
                f"or the path of a tokenizer.json.{near}",
            )
        for source, weight in self.sources().items():
            if not 0 < weight < math.inf:
                yield ("source",), f"source has {source!r} with weight {weight}; allowed: greater than 0."
        if not self.sources():
            yield ("source",), "source is {}; allowed: at least one source with its weight."
        if self.end_of_text == "":
            yield ("end_of_text",), "end_of_text is ''; allowed: the text of a token, or null."
        if self.mask_documents and self.end_of_text is None:
            yield (
                ("mask_documents", "end_of_text"),
                "mask_documents is true and end_of_text is null; allowed: with an end_of_text, which shows where "
                "documents begin. Set data.end_of_text, such as '<|endoftext|>'.",
            )
        if self.prompt_field is not None and self.end_of_text is None:
            yield (
                ("prompt_field", "end_of_text"),
                f"prompt_field is {self.prompt_field!r} and end_of_text is null; allowed: with an end_of_text, or the "
                "model never learns where an answer ends. Set data.end_of_text, such as '<|endoftext|>'.",
            )
        if self.prompt_field == self.text_field:
            yield ("prompt_field", "text_field"), f"prompt_field and text_field are both {self.text_field!r}."

    def sources(self) -> dict[str, float]:
        """Each source with its weight."""
        return self.source if isinstance(self.source, dict) else {self.source: 1.0}


@dataclass(frozen=True)
class TrainingConfig(Section):
    """How the model is trained. Every interval counts optimizer steps, or epochs where it says so."""

    batch_size: int | None = None
    """Sequences per optimizer step, over all devices; default: the train loader's, 32 on the command line."""
    micro_batch_size: int | None = None
    """Most sequences a process computes at once; bounds memory, changes no result; default: all it has."""
    max_epochs: int | None = None
    """Passes over the training data; default: 1 where max_steps is not set either."""
    max_steps: int | None = None
    """Optimizer steps; with max_epochs too, whichever ends first."""
    optimizer: str = "adamw"
    """adamw, adam, sgd, muon (hidden matrices; AdamW for the rest), or 'module:name' of an Optimizer class."""
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of a 'module:name' optimizer."""
    learning_rate: float = 3e-4
    """Peak learning rate, per optimizer step."""
    weight_decay: float = 0.1
    """Decay of matrices (vectors have none), per optimizer step and unit of learning rate."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment, per optimizer step."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment, per optimizer step."""
    adam_epsilon: float = 1e-8
    """Added to the root of Adam's second moment."""
    momentum: float = 0.9
    """Momentum of sgd, per optimizer step (Muon's is fixed at 0.95, as published)."""
    lr_scheduler: str = "cosine"
    """constant, linear, cosine, cosine_with_restarts, wsd (warm-up, stable, decay), or 'module:name'."""
    lr_scheduler_options: dict[str, Any] = field(default_factory=dict)
    """Options of the schedule: cycles (cosine_with_restarts, 2), decay_fraction (wsd, 0.2)."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up, the last of them at the peak."""
    min_lr_ratio: float = 0.1
    """Learning rate of the last optimizer step, as a fraction of the peak."""
    loss: str = "cross_entropy"
    """cross_entropy, label_smoothing, focal, z_loss, or 'module:name'; validation is cross entropy for all four."""
    loss_options: dict[str, Any] = field(default_factory=dict)
    """Options of the loss: smoothing (label_smoothing, 0.1), gamma (focal, 2.0), weight (z_loss, 1e-4)."""
    gradient_clip_norm: float | None = 1.0
    """Largest global gradient norm; null: no clipping."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Arithmetic of the forward and backward pass; default: what the accelerate config says, else no."""
    activation_checkpointing: bool | None = None
    """Recompute each block in the backward pass: memory for time; default: what the accelerate config says, else no."""
    max_bad_steps: int = 10
    """Optimizer steps in a row with a loss or gradient that is not finite before the run ends with an error."""
    skip_spikes_above: float | None = None
    """Robust z-score, against the last 128 steps, of a loss or gradient norm that makes a step left out; null: none."""
    early_stopping_patience: int | None = None
    """Validations without improvement before training stops; null: never."""
    early_stopping_metric: str = "val_loss"
    """Validation metric that decides about stopping and about the best checkpoint."""
    early_stopping_mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger early_stopping_metric is better."""
    early_stopping_min_delta: float = 0.0
    """Smallest change of the metric that counts as an improvement, in the metric's unit."""
    eval_every_n_epochs: int | None = 1
    """Epochs between validations; null: none by epoch. The last step is always validated."""
    eval_every_n_steps: int | None = None
    """Optimizer steps between validations; null: none by step."""
    checkpoint_dir: str | None = None
    """Folder of checkpoints; default: <output_dir>/checkpoints on the command line, none in Python."""
    save_every_n_epochs: int | None = 1
    """Epochs between checkpoints; null: none by epoch. The end of the run is always saved."""
    save_every_n_steps: int | None = None
    """Optimizer steps between checkpoints; null: none by step."""
    keep_last_n: int = 3
    """Checkpoints kept, besides the best."""
    log_every_n_steps: int = 10
    """Optimizer steps between log lines; the host waits for the device at no other step."""
    resume: str = "auto"
    """auto: from the newest checkpoint that verifies, else afresh; never: afresh, in an unused folder; or a path."""
    resume_changes: list[str] = field(default_factory=list)
    """Settings that may differ from the checkpoint's although they change the course of the run; or sections."""
    max_minutes: float | None = None
    """Minutes of training after which a start of the run ends, saved, with exit code 75; null: no limit."""
    hang_minutes: float | None = 5.0
    """Minutes without progress after which a process that holds up the others is named, with its stack; null: never."""
    seed: int = 0
    """Seed of initial weights, order of samples, and dropout."""

    def _relations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        tables = {"optimizer": OPTIMIZER_NAMES, "lr_scheduler": SCHEDULE_NAMES, "loss": LOSS_NAMES}
        for name, known in tables.items():
            if problem := unknown_name(name, getattr(self, name), known):
                yield (name,), problem
        if self.early_stopping_metric not in METRIC_NAMES:
            near = did_you_mean(self.early_stopping_metric, METRIC_NAMES)
            yield (
                ("early_stopping_metric",),
                f"early_stopping_metric is {self.early_stopping_metric!r}; allowed: {', '.join(METRIC_NAMES)}.{near}",
            )
        if self.optimizer_options and self.optimizer in OPTIMIZER_NAMES:
            yield (
                ("optimizer_options",),
                f"optimizer_options is {self.optimizer_options!r} and optimizer is {self.optimizer!r}; "
                "allowed: options for a 'module:name' optimizer only. Set adam_beta1 and the like directly.",
            )
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            yield (
                ("warmup_steps", "max_steps"),
                f"warmup_steps is {self.warmup_steps} and max_steps is {self.max_steps}; "
                "allowed: a warm-up shorter than the run. Set training.warmup_steps lower.",
            )
        changeable = _names_of_changes()
        for name in self.resume_changes:
            if name not in changeable:
                near = did_you_mean(name, changeable)
                yield ("resume_changes",), f"resume_changes has {name!r}; allowed: settings, such as data.source.{near}"
        if self.resume not in ("auto", "never") and not os.path.isdir(expand_user(self.resume)):
            near = did_you_mean(self.resume, ("auto", "never"))
            yield ("resume",), f"resume is {self.resume!r}; allowed: auto, never, or a checkpoint's folder.{near}"

    def resolved(self) -> TrainingConfig:
        """The same settings with the length of the run filled in."""
        return dataclasses.replace(self, max_epochs=1) if self.max_epochs is self.max_steps is None else self


DATA_FACTS = ("data.num_samples", "data.shuffle", "data.drop_last", "data.content")
"""What else of the data a run depends on, and a checkpoint knows; named like settings in `resume_changes`."""


def _names_of_changes() -> set[str]:
    sections: dict[str, type[Section]] = {"model": ModelConfig, "data": DataConfig, "training": TrainingConfig}
    dotted = {f"{section}.{entry.name}" for section, kind in sections.items() for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return {*sections, *dotted, *DATA_FACTS}


@dataclass(frozen=True)
class Config(Section):
    """One run."""

    output_dir: str = "runs/default"
    """Folder of everything the run writes: metrics.jsonl, curves.png, checkpoints."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The training."""
    callbacks: list[str] = field(default_factory=list)
    """Further callbacks: 'module:name' of Callback classes, made without arguments."""
    sample_tokens: int = 200
    """Tokens of text generated and shown after training; 0: none."""

    def file_problems(self) -> list[str]:
        """What is wrong with the files and folders of this run, found without creating any."""
        problems = [f"data.{problem}" for problem in data_problems(self.data)]
        if is_no_folder(self.output_dir):
            problems.append(f"output_dir is {self.output_dir!r}, which is no folder; give another.")
        resume = self.training.resume
        if resume not in ("auto", "never") and not os.path.isfile(os.path.join(expand_user(resume), "manifest.json")):
            problems.append(f"training.resume is {resume!r}, which is no checkpoint; give the folder of one.")
        checkpoints = self.training.checkpoint_dir
        if checkpoints is not None and is_no_folder(checkpoints):
            problems.append(f"training.checkpoint_dir is {checkpoints!r}, which is no folder; give another.")
        return problems

    def resolved(self) -> Config:
        """The same run with every default that depends on another setting filled in."""
        training = self.training.resolved()
        return dataclasses.replace(
            self,
            model=self.model.resolved(),
            training=dataclasses.replace(
                training,
                batch_size=training.batch_size or 32,
                checkpoint_dir=training.checkpoint_dir or os.path.join(self.output_dir, "checkpoints"),
            ),
        )
