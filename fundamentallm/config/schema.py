"""Every setting of a run, as frozen dataclasses. Field docstrings are the help texts.

This module imports no torch, so that `--help` and a config error answer at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from fundamentallm.config.registry import did_you_mean, unknown_name
from fundamentallm.config.validation import Section, expand_user, from_dict, range_problems
from fundamentallm.errors import ConfigError

LARGE_VOCABULARY, CHUNK = 1024, 512
"""Tokens in a vocabulary from which on logits are made for so many positions at a time only."""
BUILT_IN_CORPUS = "python-docs"
IGNORE_INDEX = -100
"""Target that is not trained on: torch's and transformers' convention."""

END_OF_TEXT = "<|endoftext|>"
"""Token that ends a text, where a vocabulary has it (GPT-2's)."""

# The tables behind these names live in the modules that import torch (a test holds the two together).
OPTIMIZER_NAMES = ("adamw", "adam", "sgd", "muon")
SCHEDULE_NAMES = ("constant", "linear", "cosine", "cosine_with_restarts", "wsd")
METRIC_NAMES = ("val_loss", "val_perplexity", "val_bits_per_byte")
LOSS_NAMES = ("cross_entropy", "label_smoothing", "focal", "z_loss")
CALLBACK_NAMES = ("curves", "samples", "profiler", "ratios")
TRACKER_NAMES = ("tensorboard", "wandb", "mlflow", "trackio")


def unknown_metric(name: str, known: Collection[str]) -> str:
    """The problem with an `early_stopping_metric` that is none of the known ones."""
    return f"early_stopping_metric is {name!r}; allowed: {', '.join(known)}.{did_you_mean(name, known)}"


@dataclass(frozen=True, repr=False)
class ModelConfig(Section):
    """Shape of the `Transformer`.

    Examples:
        >>> from fundamentallm import ModelConfig
        >>> ModelConfig(d_model=512, num_heads=8).resolved()  # shows what is not the default
        ModelConfig(d_model=512, num_kv_heads=8, d_ff=1368)
    """

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
    norm_epsilon: float = 1e-6
    """Added to the mean square of the features that an RMSNorm divides by the root of."""
    init_from: str | None = None
    """A checkpoint whose weights a new run begins with (nothing else of it); null: random weights."""
    pretrained: str | None = None
    """A folder, or cached name, of transformers' format: what a new run goes on training; the shape is then its own."""
    qk_norm: bool = True
    """RMS-normalise queries and keys for each head (opens in transformers as Qwen3; without, as Llama)."""
    zero_init_residual: bool = False
    """Begin with zeros where blocks write to the residual stream, so that each is the identity at first."""

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
        """The same shape with every derived default filled in; with `pretrained`, they are not known yet."""
        if self.pretrained is not None:
            return self
        return dataclasses.replace(
            self,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            d_ff=self.d_ff or 8 * math.ceil(self.d_model / 3),
        )


@dataclass(frozen=True, repr=False)
class DataConfig(Section):
    """The text, and how it becomes samples.

    Examples:
        >>> from fundamentallm import DataConfig
        >>> DataConfig(source="my_text", tokenizer="bpe:4096", sequence_length=512)
        DataConfig(source='my_text', tokenizer='bpe:4096', sequence_length=512)
    """

    source: str | dict[str, float] = BUILT_IN_CORPUS
    """A file, folder, glob, 'datasets:NAME', 'python-docs' (CPython's own); or several, each with its weight."""
    tokenizer: str = "char"
    """'char' (with model.pretrained: its own), 'byte', 'bpe:<size>' trained on the training text, a tokenizer.json."""
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


@dataclass(frozen=True, repr=False)
class ParameterGroup(Section):
    """What is different for some parameters; an entry of `training.parameter_groups`."""

    pattern: str = ""
    """Which: a glob over the parameters' names, such as '*.embed_tokens.*'."""
    learning_rate_scale: float = 1.0
    """Factor of the learning rate, at every step."""
    weight_decay: float | None = None
    """Decay of all of them, vectors too; null: as without the group."""
    frozen: bool = False
    """Whether they are not trained."""

    def _relations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if not self.pattern:
            yield ("pattern",), "pattern is ''; allowed: a glob over the parameters' names, such as 'model.layers.0.*'."
        if self.frozen and (self.learning_rate_scale != 1 or self.weight_decay is not None):
            yield ("frozen",), "frozen is True; allowed: no learning_rate_scale and no weight_decay beside it."


@dataclass(frozen=True, repr=False)
class TrainingConfig(Section):
    """How the model is trained. Every interval counts optimizer steps, or epochs where it says so.

    Examples:
        >>> from fundamentallm import TrainingConfig
        >>> TrainingConfig(max_steps=100, warmup_steps=200)
        Traceback (most recent call last):
        fundamentallm.errors.ConfigError: warmup_steps is 200 and max_steps is 100; allowed: a warm-up shorter than ...
    """

    batch_size: int | None = None
    """Sequences per optimizer step, over all devices; default: the train loader's, 32 on the command line."""
    batch_size_schedule: list[list[int]] = field(default_factory=list)
    """Later batch sizes: [[1000, 64], [5000, 128]] is 64 sequences after 1000 optimizer steps, and 128 after 5000."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Most sequences a process computes at once; changes no result; auto: what fits, tried out; default: all it has."""
    max_epochs: int | None = None
    """Passes over the training data; default: 1 where max_steps is not set either."""
    max_steps: int | None = None
    """Optimizer steps; with max_epochs too, whichever ends first."""
    optimizer: str = "adamw"
    """adamw, adam, sgd, muon (hidden matrices; AdamW for the rest), or 'module:name' of an Optimizer class."""
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of a 'module:name' optimizer."""
    parameter_groups: list[dict[str, Any]] = field(default_factory=list)
    """Of parameters by name: a list of {pattern, learning_rate_scale, weight_decay, frozen}; the first that matches."""
    learning_rate: float = 3e-4
    """Peak learning rate, per optimizer step."""
    adam_learning_rate: float | None = None
    """Peak learning rate of what muon leaves to AdamW, per optimizer step; null: learning_rate."""
    weight_decay: float = 0.1
    """Decay of matrices (vectors have none), per optimizer step and unit of learning rate."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment, per optimizer step."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment, per optimizer step."""
    adam_epsilon: float = 1e-8
    """Added to the root of Adam's second moment."""
    momentum: float = 0.9
    """Momentum of sgd, per optimizer step."""
    muon_momentum: float = 0.95
    """Momentum of muon, per optimizer step; runs of some hundred steps want less than the published 0.95."""
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
    ema_decay: float | None = None
    """Decay, per step, of a moving average of the weights, validated and exported in their place; null: none."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Arithmetic of the forward and backward pass; default: what the accelerate config says, else no."""
    activation_checkpointing: bool | None = None
    """Recompute each block in the backward pass: memory for time; default: what the accelerate config says, else no."""
    compile: bool | None = None
    """Compile the model first (torch.compile), for faster steps; default: what the accelerate config says, else no."""
    max_bad_steps: int = 10
    """Optimizer steps in a row with a loss or gradient that is not finite before the run ends with an error."""
    skip_spikes_above: float | None = None
    """Robust z-score, against the last 128 steps, of a loss or gradient norm that makes a step left out; null: none."""
    validation_metrics: list[str] = field(default_factory=list)
    """Further metrics: 'module:name' of functions of (logits, targets) to (sum, count); logged as val_<name>."""
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
    peak_tflops: float | None = None
    """10^12 operations a second of one device at its best, for the MFU; default: known NVIDIA GPUs' in 16 bits."""
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
        # Whether there is such a further metric is known to the Trainer, which may be given some.
        if self.early_stopping_metric not in METRIC_NAMES and not self.early_stopping_metric.startswith("val_"):
            yield ("early_stopping_metric",), unknown_metric(self.early_stopping_metric, METRIC_NAMES)
        if self.optimizer_options and self.optimizer in OPTIMIZER_NAMES:
            yield (
                ("optimizer_options",),
                f"optimizer_options is {self.optimizer_options!r} and optimizer is {self.optimizer!r}; "
                "allowed: options for a 'module:name' optimizer only. Set adam_beta1 and the like directly.",
            )
        # An adamw that took no notice of it would be a surprise; what a 'module:name' makes of settings is its own.
        if self.adam_learning_rate is not None and self.optimizer in ("adamw", "adam", "sgd"):
            yield (
                ("adam_learning_rate",),
                f"adam_learning_rate is {self.adam_learning_rate!r} and optimizer is {self.optimizer!r}; "
                "allowed: null, but for muon. Set training.learning_rate instead.",
            )
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            yield (
                ("warmup_steps", "max_steps"),
                f"warmup_steps is {self.warmup_steps} and max_steps is {self.max_steps}; "
                "allowed: a warm-up shorter than the run. Set training.warmup_steps lower.",
            )
        for index, entry in enumerate(self.parameter_groups):
            try:
                from_dict(ParameterGroup, entry)
            except ConfigError as error:
                yield from ((("parameter_groups",), f"parameter_groups[{index}].{text}") for text in error.problems)
        if problem := self._schedule_problem():
            yield ("batch_size_schedule",), problem
        changeable = _names_of_changes()
        for name in self.resume_changes:
            if name not in changeable:
                near = did_you_mean(name, changeable)
                yield ("resume_changes",), f"resume_changes has {name!r}; allowed: settings, such as data.source.{near}"
        # A path may be gone where the run has gone on from it: whether it is needed, the start finds out.
        is_path = os.path.basename(self.resume) != self.resume
        if self.resume not in ("auto", "never") and not is_path and not os.path.isdir(expand_user(self.resume)):
            near = did_you_mean(self.resume, ("auto", "never"))
            yield ("resume",), f"resume is {self.resume!r}; allowed: auto, never, or a checkpoint's folder.{near}"

    def _schedule_problem(self) -> str | None:
        pairs = all(
            len(pair) == 2 and not range_problems(max_steps=pair[0], batch_size=pair[1])
            for pair in self.batch_size_schedule
        )
        if pairs and all(one[0] < other[0] for one, other in itertools.pairwise(self.batch_size_schedule)):
            return None
        return (
            f"batch_size_schedule is {self.batch_size_schedule!r}; allowed: pairs of [optimizer steps done, sequences "
            "per step from there on], each at least 1, the steps increasing. (The first steps' is batch_size.)"
        )

    def smallest_batch_size(self, first: int | None) -> int | None:
        """The smallest batch of the run, the first steps' being `first` (None: not known)."""
        return None if first is None else min([first, *(size for _, size in self.batch_size_schedule)])

    def resolved(self) -> TrainingConfig:
        """The same settings with the length of the run filled in, and the user's home where a `~` stands for it."""
        return dataclasses.replace(
            self,
            max_epochs=1 if self.max_epochs is self.max_steps is None else self.max_epochs,
            checkpoint_dir=None if self.checkpoint_dir is None else expand_user(self.checkpoint_dir),
        )


DATA_FACTS = ("data.num_samples", "data.shuffle", "data.drop_last", "data.content")
"""What else of the data a run depends on, and a checkpoint knows; named like settings in `resume_changes`."""


def _names_of_changes() -> set[str]:
    sections: dict[str, type[Section]] = {"model": ModelConfig, "data": DataConfig, "training": TrainingConfig}
    dotted = {f"{section}.{entry.name}" for section, kind in sections.items() for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return {*sections, *dotted, *DATA_FACTS}


@dataclass(frozen=True, repr=False)
class Config(Section):
    """One run.

    Examples:
        >>> from fundamentallm import Config, ModelConfig, TrainingConfig
        >>> config = Config(output_dir="runs/one", training=TrainingConfig(max_steps=1000))
        >>> config.resolved().training.checkpoint_dir
        'runs/one/checkpoints'
    """

    output_dir: str = "runs/default"
    """Folder of everything the run writes: metrics.jsonl, starts.jsonl, curves.png, checkpoints."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The training."""
    callbacks: list[str] = field(default_factory=list)
    """samples, profiler, ratios, curves (always there), or 'module:name' of Callback classes."""
    callback_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of callbacks by name, such as {samples: {prompts: [Once]}, curves: {theme: dark}}."""
    trackers: list[str] = field(default_factory=list)
    """Trackers that get every log line too: tensorboard, wandb, mlflow, trackio."""
    tracker_options: dict[str, Any] = field(default_factory=dict)
    """Name of the project, and keyword arguments of trackers by name: {project: mine, wandb: {tags: [small]}}."""
    sample_tokens: int = 200
    """Tokens of each text generated: shown after training, and by the callback samples; 0: none after training."""

    def _relations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if not self.output_dir:  # as of a shell's variable that is not set
            yield ("output_dir",), "output_dir is ''; allowed: the path of a folder ('.' is this one)."
        for name in self.callbacks:
            if problem := unknown_name("callbacks", name, CALLBACK_NAMES):
                yield ("callbacks",), problem
        for name in self.trackers:
            if name not in TRACKER_NAMES:
                near = did_you_mean(name, TRACKER_NAMES)
                yield ("trackers",), f"trackers has {name!r}; allowed: {', '.join(TRACKER_NAMES)}.{near}"
        named = {"callback_options": ["curves", *self.callbacks], "tracker_options": ["project", *self.trackers]}
        for setting, names in named.items():
            for name, value in getattr(self, setting).items():
                if name not in names:
                    near = did_you_mean(name, names)
                    yield (setting,), f"{setting} has {name!r}; allowed: {', '.join(names)}.{near}"
                elif not (isinstance(value, str) if name == "project" else isinstance(value, dict)):
                    wanted = "text" if name == "project" else "a mapping of keyword arguments"
                    yield (setting,), f"{setting}.{name} is {value!r}; allowed: {wanted}."

    def folder_of_checkpoints(self) -> str:
        """Where the checkpoints of this run are."""
        return expand_user(self.training.checkpoint_dir or os.path.join(self.output_dir, "checkpoints"))

    def resolved(self) -> Config:
        """The same run with every default that depends on another setting filled in."""
        training = self.training.resolved()
        return dataclasses.replace(
            self,
            output_dir=expand_user(self.output_dir),
            model=self.model.resolved(),
            training=dataclasses.replace(
                training, batch_size=training.batch_size or 32, checkpoint_dir=self.folder_of_checkpoints()
            ),
        )


def flat_settings(config: dict[str, Any]) -> dict[str, Any]:
    """{dotted name: value} of a config as a plain dict; settings without sections are those of the training."""
    sections = ("model", "data", "training")
    nested = config if "training" in config else {"training": config}
    flat = {name: value for name, value in nested.items() if name not in sections}
    for section in sections:
        flat |= {f"{section}.{name}": value for name, value in nested.get(section, {}).items()}
    return flat


FREE_ON_RESUME = {
    *("model.init_from", "model.pretrained", "model.zero_init_residual"),
    *("output_dir", "callbacks", "callback_options", "trackers", "tracker_options", "sample_tokens"),
    *("data.source", "data.num_workers", "data.cache_dir", "training.peak_tflops"),
    *("training.micro_batch_size", "training.activation_checkpointing", "training.compile"),
    *("training.checkpoint_dir", "training.keep_last_n", "training.max_bad_steps"),
    *("training.save_every_n_epochs", "training.save_every_n_steps", "training.log_every_n_steps"),
    *("training.eval_every_n_epochs", "training.eval_every_n_steps", "training.max_minutes"),
    *("training.early_stopping_patience", "training.early_stopping_metric", "training.early_stopping_mode"),
    *(
        "training.validation_metrics",
        "training.early_stopping_min_delta",
        "training.hang_minutes",
        "training.resume",
        "training.resume_changes",
    ),
}
"""Settings that change no weight, and may differ on resume (a text may move: its content counts)."""

AFFECTS_SCHEDULE = {
    *("training.max_steps", "training.max_epochs", "training.learning_rate", "training.lr_scheduler"),
    *("training.lr_scheduler_options", "training.warmup_steps", "training.min_lr_ratio"),
    *("training.batch_size", "training.batch_size_schedule", "data.num_samples"),
}
"""Settings, and facts of the data, that change the learning-rate curve."""
