"""Every setting of a run, as frozen dataclasses. Field docstrings are the help texts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from fundamentallm.config.registry import not_one_of, set_name_problems, unknown_name
from fundamentallm.config.validation import LoraSettings, ParameterGroup, Section, entry_problems, expand_user
from fundamentallm.errors import Problem

LARGE_VOCABULARY, CHUNK = 1024, 512
"""Vocabulary size, in tokens, from which logits are computed in chunks, and positions per chunk."""
BUILT_IN_CORPUS = "python-docs"
IGNORE_INDEX = -100
"""Target that the loss ignores: the convention of torch and transformers."""
END_OF_TEXT = "<|endoftext|>"
"""Token that ends a text in vocabularies that have it (GPT-2's)."""

# The modules with the tables behind these names import torch. A test keeps the two in step.
OPTIMIZER_NAMES = ("adamw", "adam", "sgd", "muon")
SCHEDULE_NAMES = ("constant", "linear", "cosine", "cosine_with_restarts", "wsd")
METRIC_NAMES = ("val_loss", "val_perplexity", "val_bits_per_byte")
LOSS_NAMES = ("cross_entropy", "label_smoothing", "focal", "z_loss")
CALLBACK_NAMES = ("curves", "samples", "profiler")

# Metadata of fields: may the setting differ on resume? Unmarked ones only if training.resume_changes names them.
FREE = {"on_resume": "free"}  # changes no weight, so it may
SHAPE = {"on_resume": "never"}  # the weights have this shape


@dataclass(frozen=True)
class ModelConfig(Section):
    """Shape of the `Transformer`.

    Examples:
        >>> from fundamentallm import ModelConfig
        >>> ModelConfig(d_model=512, num_heads=8).resolved().d_ff
        1368
    """

    vocab_size: int | None = field(default=None, metadata=SHAPE)
    """Rows of the embedding table, in tokens; default: the tokenizer's vocabulary."""
    d_model: int = field(default=256, metadata=SHAPE)
    """Width of the residual stream, in features."""
    num_heads: int = field(default=8, metadata=SHAPE)
    """Query heads in each attention layer."""
    num_kv_heads: int | None = field(default=None, metadata=SHAPE)
    """Key and value heads, each shared by num_heads / num_kv_heads query heads; default: num_heads."""
    num_layers: int = field(default=6, metadata=SHAPE)
    """Decoder blocks."""
    d_ff: int | None = field(default=None, metadata=SHAPE)
    """Hidden width of the SwiGLU, in features; default: 8/3 of d_model, rounded up to a multiple of 8."""
    dropout: float = 0.0
    """Dropout probability, for embeddings, attention weights and block outputs."""
    tie_embeddings: bool = field(default=False, metadata=SHAPE)
    """Use the embedding table as the output projection too."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths, in tokens (RoFormer, arXiv:2104.09864)."""
    norm_epsilon: float = 1e-6
    """RMSNorm epsilon."""
    init_from: str | None = field(default=None, metadata=FREE)
    """Checkpoint whose weights initialise a new run; null: random weights."""
    pretrained: str | None = field(default=None, metadata=FREE)
    """Fine-tune this model: a folder or cached name in transformers format; overrides the shape; null: a new model."""
    lora: dict[str, Any] | None = None
    """Train LoRA adapters of model.pretrained and nothing else: {r: 8, alpha: 8, dropout: 0, targets: [q_proj]}."""
    qk_norm: bool = field(default=True, metadata=SHAPE)
    """RMS-normalise queries and keys for each head (true exports to transformers as Qwen3, false as Llama)."""
    zero_init_residual: bool = field(default=False, metadata=FREE)
    """Initialise each block's output projections with zeros, so that every block starts as the identity."""

    def _relations(self) -> Iterator[Problem]:
        if self.d_model % max(2 * self.num_heads, 1):
            allowed = f"a multiple of 2 x num_heads = {2 * self.num_heads}, since rotary embeddings rotate pairs"
            yield self._conflict("d_model", "num_heads", allowed)
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            yield self._conflict("num_kv_heads", "num_heads", "a divisor of num_heads")
        if self.lora is not None:
            yield from entry_problems(LoraSettings, self.lora, "lora")
            if self.pretrained is None:
                yield self._conflict("lora", "pretrained", "with model.pretrained, the model that gets the adapters")

    def resolved(self) -> ModelConfig:
        """Returns the shape with derived defaults filled in; with `pretrained`, they are not known yet."""
        if self.pretrained is not None:
            return replace(self, lora=None if self.lora is None else asdict(LoraSettings(**self.lora)))
        d_ff = self.d_ff or 8 * math.ceil(self.d_model / 3)
        return replace(self, num_kv_heads=self.num_kv_heads or self.num_heads, d_ff=d_ff)


@dataclass(frozen=True)
class DataConfig(Section):
    """The text, and how it becomes samples.

    Examples:
        >>> from fundamentallm import DataConfig
        >>> DataConfig(source={"my_text": 1, "python-docs": 0.5}, tokenizer="bpe:4096").sources()
        {'my_text': 1, 'python-docs': 0.5}
    """

    source: str | dict[str, float] = field(default=BUILT_IN_CORPUS, metadata=FREE)
    """File, folder, glob, 'datasets:NAME' or 'python-docs' (bundled with CPython); or a mapping of these to weights."""
    tokenizer: str = field(default="char", metadata=FREE)
    """'char' (model.pretrained: its own), 'byte', 'bpe:<size>' trained on the training text, or a tokenizer.json."""
    train_split: float = 0.9
    """Leading fraction of the text used for training; the rest is for validation (1: no validation)."""
    validation_source: str | dict[str, str] | None = field(default=None, metadata=FREE)
    """Source for validation; or a mapping of names to sources, each with its val_NAME_loss; null: train_split."""
    streaming: bool = False
    """Tokenize the source as it is read, in its own order, in place of once before; needs training.max_steps."""
    shuffle_buffer: int | None = None
    """Samples of a stream that are held in memory, of which a random one comes next; null: the stream's order."""
    validation_tokens: int | None = None
    """Tokens at the beginning of a stream that are held out for validation; null: none."""
    text_field: str = "text"
    """Field of a row (.jsonl, .parquet, datasets) with the text."""
    prompt_field: str | None = None
    """Field with the prompt; loss is computed on text_field only (SFT), one row per sample; null: no prompts."""
    messages_field: str | None = None
    """Field with a chat, a list of {role, content}; loss is computed on assistant turns only; null: no chats."""
    chat_template: bool | None = field(default=None, metadata=FREE)
    """Render prompts and answers by the tokenizer's chat template, in place of end_of_text; null: if it has one."""
    end_of_text: str | None = "auto"
    """Token after each document; null: an empty line between documents; auto: '<|endoftext|>' for 'bpe', else null."""
    special_tokens: Literal["tokens", "text"] | None = None
    """Read special tokens in the text as 'tokens' or 'text' (untrusted); null: as tokens of a tokenizer.json only."""
    unknown_tokens: bool = field(default=False, metadata=FREE)
    """Encode what the vocabulary lacks as its unknown token, counted; false: an error, or a bad row."""
    mask_documents: bool = False
    """Restrict attention to the token's own document (needs end_of_text)."""
    packing: bool = False
    """Pack pairs or chats into full windows, each attending to itself only; training.batch_size counts windows."""
    suffixes: list[str] = field(default_factory=lambda: [".txt", ".md"])
    """Suffixes of the files to read from a folder."""
    max_bad_rows: int = 0
    """Maximum number of unreadable rows or text files to skip before failing."""
    skip: list[list[int]] = field(default_factory=list, metadata=FREE)
    """Steps, from 1, whose samples are left out when the run resumes from before them: [[12001, 12200]]."""
    sequence_length: int = 256
    """Context length: tokens per sample."""
    num_workers: int = field(default=0, metadata=FREE)
    """Worker processes of the data loader; 0: load in the training process, fastest for memory-mapped text."""
    cache_dir: str | None = field(default=None, metadata=FREE)
    """Folder for tokenized text, keyed by files and tokenizer; default: the user's cache folder."""

    def _relations(self) -> Iterator[Problem]:
        kind, _, size = self.tokenizer.partition(":")
        if kind == "bpe" and not (size.isdecimal() and int(size) > 256):  # 256 bytes and at least one merge
            yield Problem("tokenizer", self.tokenizer, "'bpe:<vocabulary size>' with a size above 256")
        elif kind != "bpe" and kind not in ("char", "byte") and not self.tokenizer.endswith(".json"):
            allowed = "'char', 'byte', 'bpe:<vocabulary size>', or the path of a tokenizer.json"
            yield not_one_of("tokenizer", self.tokenizer, ("char", "byte"), allowed)
        if not self.sources() or not all(0 < weight < math.inf for weight in self.sources().values()):
            yield Problem("source", self.source, "at least one source, with weights greater than 0")
        if isinstance(self.validation_source, dict):
            yield from set_name_problems("validation_source", self.validation_source)
        if not all(len(pair) == 2 and 0 < pair[0] <= pair[1] for pair in self.skip) or self.skip != sorted(self.skip):
            yield Problem("skip", self.skip, "pairs of [first step, last step], from 1, in ascending order")
        has_end = kind == "bpe" if self.end_of_text == "auto" else self.end_of_text is not None
        for name in ("mask_documents", "prompt_field"):
            if getattr(self, name) and not has_end and not self.chat_template:
                allowed = f"with an end_of_text such as {END_OF_TEXT!r}; for a prompt_field, or chat_template: true"
                yield Problem(name, getattr(self, name), allowed, reason="and end_of_text is None")
        if self.prompt_field == self.text_field:
            yield self._conflict("prompt_field", "text_field", "another field")
        if self.packing and self.streaming:
            yield Problem("packing", True, "false", reason="and a stream does not know the lengths of later samples")
        for name in ("chat_template", "packing"):
            if getattr(self, name) and not self.streaming and self.prompt_field is self.messages_field is None:
                yield self._conflict(name, "prompt_field", "false, except with a prompt_field or messages_field")
        if self.chat_template is False and self.messages_field is not None:
            yield self._conflict("chat_template", "messages_field", "null or true")
        if self.streaming and isinstance(self.source, dict):
            yield self._conflict("source", "streaming", "one source")
        if self.validation_tokens is not None and self.validation_tokens <= self.sequence_length:
            yield self._conflict("validation_tokens", "sequence_length", "more than one sample")
        for name, other in self._unused().items():
            if getattr(self, name) != (default := getattr(DataConfig, name)):
                yield self._conflict(name, other, "null" if default is None else str(default))

    def _unused(self) -> dict[str, str]:
        """Returns the settings that another one leaves without effect, and which one."""
        unused = dict.fromkeys(("shuffle_buffer", "validation_tokens"), "streaming")
        if self.streaming:
            unused = dict.fromkeys(("prompt_field", "messages_field", "num_workers", "train_split"), "streaming")
        if self.validation_source is not None:
            unused |= dict.fromkeys(("train_split", "validation_tokens"), "validation_source")
        unused |= {"mask_documents": "packing"} if self.packing else {}  # which masks by itself
        if self.messages_field is not None:
            unused |= dict.fromkeys(("prompt_field", "text_field"), "messages_field")
        return unused

    def resolved(self, has_end: bool = True) -> DataConfig:
        """Returns the settings with what "auto" stands for. `has_end`: false if the tokens are made without an end."""
        if self.end_of_text != "auto":
            return self
        return replace(self, end_of_text=END_OF_TEXT if self.tokenizer.startswith("bpe:") and has_end else None)

    def validation_sources(self) -> dict[str, str]:
        """Returns each source for validation by its name, which is "" if there is one without a name."""
        source = self.validation_source
        return source if isinstance(source, dict) else {} if source is None else {"": source}

    def sources(self) -> dict[str, float]:
        """Returns each source with its weight."""
        return self.source if isinstance(self.source, dict) else {self.source: 1.0}


@dataclass(frozen=True)
class TrainingConfig(Section):
    """How the model is trained. Intervals count optimizer steps, or epochs if their name says so.

    Examples:
        >>> from fundamentallm import TrainingConfig
        >>> TrainingConfig(max_steps=100, warmup_steps=200)
        Traceback (most recent call last):
        fundamentallm.errors.ConfigError: warmup_steps is 200, and max_steps is 100; allowed: a warm-up shorter than ...
    """

    batch_size: int | None = None
    """Global batch size: sequences per optimizer step, over all devices; default: 32, in Python the loader's."""
    batch_size_schedule: list[list[int]] = field(default_factory=list)
    """Later batch sizes: [[1000, 64], [5000, 128]] is 64 sequences after 1000 optimizer steps, and 128 after 5000."""
    micro_batch_size: int | Literal["auto"] | None = field(default=None, metadata=FREE)
    """Per-device micro-batch size, in sequences; affects no result; auto: the largest that fits; default: no limit."""
    max_epochs: int | None = None
    """Passes over the training data; default: 1 without max_steps, otherwise no limit."""
    max_steps: int | None = None
    """Optimizer steps; the run ends at max_steps or max_epochs, whichever comes first; null: no limit."""
    optimizer: str = "adamw"
    """adamw, adam, sgd, muon (hidden matrices; AdamW for the rest), or 'module:name' of an Optimizer class."""
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of a 'module:name' optimizer."""
    parameter_groups: list[dict[str, Any]] = field(default_factory=list)
    """List of {pattern, learning_rate_scale, weight_decay, frozen}; the first pattern that matches a name wins."""
    learning_rate: float = 3e-4
    """Peak learning rate, per optimizer step."""
    adam_learning_rate: float | None = None
    """Peak learning rate of the AdamW parameters if the optimizer is muon; null: learning_rate."""
    weight_decay: float = 0.1
    """Weight decay of matrices, per optimizer step and unit of learning rate; biases and norms have no decay."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment, per optimizer step."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment, per optimizer step."""
    adam_epsilon: float = 1e-8
    """Adam epsilon, added to the root of the second moment."""
    momentum: float = 0.9
    """Momentum of sgd, per optimizer step."""
    muon_momentum: float = 0.95
    """Momentum of muon, per optimizer step; lower it for runs of a few hundred steps."""
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
    objective: str | None = None
    """'module:name' of what is minimised in place of the loss: maps (model, batch) to the sum over targets."""
    gradient_clip_norm: float | None = 1.0
    """Maximum global gradient norm; null: no clipping."""
    ema_decay: float | None = None
    """Decay, per step, of an average of the weights that is validated and exported in their place; null: no average."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Precision of the forward and backward pass; default: no (float32), whatever the accelerate config says."""
    activation_checkpointing: bool | None = field(default=None, metadata=FREE)
    """Recompute blocks in the backward pass to save memory; default: the accelerate config's, otherwise false."""
    compile: bool | None = field(default=None, metadata=FREE)
    """Compile the model with torch.compile; default: the accelerate config's, otherwise false."""
    max_bad_steps: int = field(default=10, metadata=FREE)
    """Consecutive steps with a non-finite loss or gradient before the run aborts; each is skipped."""
    skip_spikes_above: float | None = None
    """Skip a step whose loss or gradient norm exceeds this robust z-score (over the last 128 steps); null: never."""
    validation_metrics: list[str] = field(default_factory=list, metadata=FREE)
    """Further metrics, logged as val_<name>: 'module:name' of functions of (logits, targets) to (sum, count)."""
    early_stopping_patience: int | None = field(default=None, metadata=FREE)
    """Validations without improvement before training stops; null: never."""
    early_stopping_metric: str = field(default="val_loss", metadata=FREE)
    """Validation metric for early stopping and for the best checkpoint."""
    early_stopping_mode: Literal["min", "max"] = field(default="min", metadata=FREE)
    """Direction of improvement of early_stopping_metric."""
    early_stopping_min_delta: float = field(default=0.0, metadata=FREE)
    """Smallest change of the metric that counts as an improvement, in the metric's unit."""
    eval_every_n_epochs: int | None = field(default=1, metadata=FREE)
    """Epochs between validations; null: none by epoch. The last step is always validated."""
    eval_every_n_steps: int | None = field(default=None, metadata=FREE)
    """Optimizer steps between validations; null: none by step."""
    eval_at_start: bool = field(default=False, metadata=FREE)
    """Validate before the first step of a new run too, logged as step 0."""
    eval_max_samples: int | None = field(default=None, metadata=FREE)
    """Samples of each validation set that are validated on, the same random ones each time; null: all."""
    checkpoint_dir: str | None = field(default=None, metadata=FREE)
    """Folder of checkpoints; default: <output_dir>/checkpoints on the command line, none in Python."""
    mirror: str | None = field(default=None, metadata=FREE)
    """Folder or fsspec URL, such as s3://bucket/run, to copy each checkpoint to and to resume from; null: none."""
    save_every_n_epochs: int | None = field(default=1, metadata=FREE)
    """Epochs between checkpoints; null: none by epoch. The end of the run is always saved."""
    save_every_n_steps: int | None = field(default=None, metadata=FREE)
    """Optimizer steps between checkpoints; null: none by step."""
    keep_last_n: int = field(default=3, metadata=FREE)
    """Newest checkpoints to keep, besides the best."""
    log_every_n_steps: int = field(default=10, metadata=FREE)
    """Optimizer steps between log lines (the only steps that sync with the GPU)."""
    peak_tflops: float | None = field(default=None, metadata=FREE)
    """Peak throughput of one device in TFLOP/s, for the MFU; default: the 16-bit peak of known NVIDIA GPUs."""
    resume: str = field(default="auto", metadata=FREE)
    """auto: from the newest valid checkpoint, if any; never: from scratch, in an unused folder; or a checkpoint."""
    resume_changes: list[str] = field(default_factory=list, metadata=FREE)
    """Settings, or whole sections, allowed to differ from the checkpoint's on resume."""
    max_minutes: float | None = field(default=None, metadata=FREE)
    """Save and exit (code 75) after this many minutes; null: no limit."""
    hang_minutes: float | None = field(default=5.0, metadata=FREE)
    """Minutes before a stuck process is reported, with a stack trace; null: never."""
    seed: int = 0
    """Seed of initial weights, data order and dropout."""

    def _relations(self) -> Iterator[Problem]:
        tables = {"optimizer": OPTIMIZER_NAMES, "lr_scheduler": SCHEDULE_NAMES, "loss": LOSS_NAMES}
        for name, known in tables.items():
            yield from unknown_name(name, getattr(self, name), known)
        # Only the Trainer knows whether a further validation metric of this name exists.
        if self.early_stopping_metric not in METRIC_NAMES and not self.early_stopping_metric.startswith("val_"):
            yield not_one_of("early_stopping_metric", self.early_stopping_metric, METRIC_NAMES)
        if self.optimizer_options and self.optimizer in OPTIMIZER_NAMES:
            yield self._conflict("optimizer_options", "optimizer", "for 'module:name' only; set adam_beta1 directly")
        if self.adam_learning_rate is not None and self.optimizer in ("adamw", "adam", "sgd"):
            yield self._conflict("adam_learning_rate", "optimizer", "null, except for muon; set learning_rate instead")
        if self.max_steps is not None and 0 < self.max_steps <= self.warmup_steps:
            yield self._conflict("warmup_steps", "max_steps", "a warm-up shorter than the run")
        for index, entry in enumerate(self.parameter_groups):
            yield from entry_problems(ParameterGroup, entry, f"parameter_groups[{index}]")
        steps = [pair[0] for pair in self.batch_size_schedule if len(pair) == 2 and min(pair) > 0]
        if len(steps) < len(self.batch_size_schedule) or steps != sorted({*steps}):
            allowed = "pairs of [optimizer steps done, batch size from there on], at least 1, with increasing steps"
            yield Problem("batch_size_schedule", self.batch_size_schedule, allowed)
        known_changes = [*ON_RESUME, *DATA_FACTS]
        for name in self.resume_changes:
            if name not in known_changes:
                yield not_one_of("resume_changes", name, known_changes, "settings, such as data.source")
        # A path may be gone by now if the run has checkpoints of its own, so only the start can check it.
        is_path = os.path.basename(self.resume) != self.resume or os.path.isdir(expand_user(self.resume))
        if self.resume not in ("auto", "never") and not is_path:
            yield not_one_of("resume", self.resume, ("auto", "never"), "auto, never, or a checkpoint's folder")

    def smallest_batch_size(self, first: int | None) -> int | None:
        """Returns the smallest batch size of the run, which starts with `first` (None: not known)."""
        return None if first is None else min([first, *(size for _, size in self.batch_size_schedule)])

    def resolved(self) -> TrainingConfig:
        """Returns the settings with the length of the run filled in, and `~` expanded."""
        max_epochs = 1 if self.max_epochs is self.max_steps is None else self.max_epochs
        folder = None if self.checkpoint_dir is None else expand_user(self.checkpoint_dir)
        return replace(self, max_epochs=max_epochs, checkpoint_dir=folder)


@dataclass(frozen=True)
class Config(Section):
    """One run.

    Examples:
        >>> from fundamentallm import Config, ModelConfig, TrainingConfig
        >>> config = Config(output_dir="runs/one", training=TrainingConfig(max_steps=1000))
        >>> config.resolved().training.checkpoint_dir
        'runs/one/checkpoints'
    """

    output_dir: str = field(default="runs/default", metadata=FREE)
    """Folder for everything the run writes: metrics.jsonl, starts.jsonl, curves.png, checkpoints."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    callbacks: list[str] = field(default_factory=list, metadata=FREE)
    """samples, profiler, curves (always on), or 'module:name' of Callback classes."""
    callback_options: dict[str, dict[str, Any]] = field(default_factory=dict, metadata=FREE)
    """Keyword arguments of callbacks by name, such as {samples: {prompts: [Once]}, curves: {theme: dark}}."""
    trackers: list[str] = field(default_factory=list, metadata=FREE)
    """Experiment trackers, by accelerate's names: tensorboard, wandb, mlflow, trackio and others."""
    tracker_options: dict[str, str | dict[str, Any]] = field(default_factory=dict, metadata=FREE)
    """Project name, and keyword arguments of trackers by name: {project: mine, wandb: {tags: [small]}}."""
    sample_tokens: int = field(default=200, metadata=FREE)
    """Tokens of each generated sample, after training and by the callback samples; 0: no sample after training."""

    def _relations(self) -> Iterator[Problem]:
        tokenizer = self.data.tokenizer
        is_theirs = tokenizer == DataConfig.tokenizer and self.model.pretrained is not None
        if self.data.streaming and not (is_theirs or tokenizer == "byte" or tokenizer.endswith(".json")):
            advice = "`fundamentallm prepare` on a part of the text writes a tokenizer.json."
            allowed = "'byte' or a tokenizer.json: the others are made from the whole text"
            yield Problem("data.tokenizer", tokenizer, allowed, advice, "and data.streaming is true")
        if not self.output_dir:  # a shell variable that is not set
            yield Problem("output_dir", "", "the path of a folder ('.' is this one)")
        for name in self.callbacks:
            yield from unknown_name("callbacks", name, CALLBACK_NAMES)
        named = {"callback_options": ["curves", *self.callbacks], "tracker_options": ["project", *self.trackers]}
        for setting, names in named.items():
            for name in getattr(self, setting):
                if name not in names:
                    yield not_one_of(setting, name, names, text=f"{name!r} is not in use")

    def folder_of_checkpoints(self) -> str:
        """Returns the folder of this run's checkpoints."""
        return expand_user(self.training.checkpoint_dir or os.path.join(self.output_dir, "checkpoints"))

    def resolved(self) -> Config:
        """Returns the run with every default that depends on another setting filled in."""
        training = replace(self.training.resolved(), checkpoint_dir=self.folder_of_checkpoints())
        training = replace(training, batch_size=training.batch_size or 32)
        return replace(self, output_dir=expand_user(self.output_dir), model=self.model.resolved(), training=training)


DATA_FACTS = ("data.num_samples", "data.shuffle", "data.drop_last", "data.content", "data.sampler", "log")
"""Facts of the data and the log that checkpoints record; `resume_changes` may name them like settings."""

ON_RESUME = {
    f"{section}{entry.name}": entry.metadata.get("on_resume")
    for section, kind in (("", Config), ("model.", ModelConfig), ("data.", DataConfig), ("training.", TrainingConfig))
    for entry in fields(kind)
}
FREE_ON_RESUME = frozenset(name for name, kind in ON_RESUME.items() if kind == "free")
"""Settings that change no weight, and may differ on resume. (Text and tokenizer may move: their content counts.)"""
NEVER_ON_RESUME = frozenset(name for name, kind in ON_RESUME.items() if kind == "never")
"""Settings that decide the shape of the weights."""
