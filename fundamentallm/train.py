"""Train a language model from a config: `accelerate launch -m fundamentallm.train --config cfg.yaml`.

The composition root: it makes the parts and hands them to the Trainer. Exit codes: 0 done (or stopped by a
callback), 1 failed, 2 the config is wrong, 3 the loss or gradient stopped being finite, 75 stopped by a signal or
by `training.max_minutes` (start it again: the same command goes on), 130 a second Ctrl-C.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fundamentallm.command_line import parse_config
from fundamentallm.config import Config, ModelConfig
from fundamentallm.errors import START_AGAIN, CheckpointError, ConfigError, FundamentaLLMError, exit_code, report
from fundamentallm.files import expand_user
from fundamentallm.registry import resolve

if TYPE_CHECKING:
    from accelerate import Accelerator
    from tokenizers import Tokenizer

    from fundamentallm.training.callbacks import Callback
    from fundamentallm.training.trainer import Trainer

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None, program: str = "python -m fundamentallm.train") -> int:
    """Run the command line; returns the exit code."""
    try:
        trainer = run(parse_config(sys.argv[1:] if arguments is None else arguments, program))
    except FundamentaLLMError as error:
        return report(error)
    except KeyboardInterrupt as interrupt:
        print("\nstopped at once; the same command goes on from the last checkpoint", file=sys.stderr)
        return exit_code(interrupt)
    # A launcher that restarts what fails would begin again at once; to it, the run has ended.
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return START_AGAIN if trainer.was_interrupted and not restarts else 0


def run(config: Config) -> Trainer:
    """Train as `config` says; returns the trainer, its run ended.

    Raises:
        FundamentaLLMError: as the parts do.
    """
    if config.training.resume == "never" and (Path(config.output_dir) / "metrics.jsonl").exists():
        raise ConfigError(
            f"training.resume is 'never' and {config.output_dir} holds a run already; choose another output_dir, "
            "or resume: auto to go on with it."
        )
    trainer = make_trainer(config)
    trainer.train()
    if trainer.is_finished:
        _show_end(trainer, config)
    trainer.leave_group()
    return trainer


def make_trainer(config: Config) -> Trainer:
    """The parts that `config` describes, put together.

    Raises:
        FundamentaLLMError: as the parts do.
    """
    # Imported here, so that --help and config errors need not wait for torch.
    import torch

    from fundamentallm.data.corpus import describe, load_corpus
    from fundamentallm.data.loaders import create_dataloaders
    from fundamentallm.models.transformer import Transformer
    from fundamentallm.training.accelerator import create_accelerator
    from fundamentallm.training.trainer import Trainer

    accelerator = create_accelerator(config.training.mixed_precision, config.resolved().training.batch_size)
    callbacks = _check_parts(config)
    is_main = accelerator.is_main_process
    corpus = _local_main_process_first(accelerator, lambda: load_corpus(config.data, show_progress=is_main))
    config = replace(config, model=_with_vocabulary(config.model, corpus.tokenizer))
    train_loader, val_loader = create_dataloaders(corpus, corpus.tokenizer, config)
    torch.manual_seed(config.training.seed)
    with torch.device("meta") if accelerator.is_fsdp2 else nullcontext():  # it may be larger than a device
        model = Transformer(config.model, corpus.end_of_text if config.data.mask_documents else None)
    trainer = Trainer(model, config, train_loader, val_loader, accelerator=accelerator)
    if config.model.init_from is not None and trainer.team.from_first(lambda: _begins_afresh(config)):
        with trainer.team.together():
            _load_weights(trainer, Path(expand_user(config.model.init_from)), corpus.tokenizer)
    for callback in callbacks:
        trainer.callbacks.add(callback)
    for line in describe(corpus):
        trainer.say(line)
    if cut := sum(getattr(loader.dataset, "num_cut", 0) for loader in (train_loader, val_loader) if loader):
        trainer.say(f"{cut:,} pairs are longer than data.sequence_length; what is beyond it is not trained on")
    return trainer


def _local_main_process_first(accelerator: Accelerator, build: Callable[[], T]) -> T:
    """`build()` on one process of each machine, then on the others, which find the cache filled.

    Unlike `accelerator.local_main_process_first`, the others go on after an error too, and run into the same
    one, rather than wait for a process that is gone.
    """
    if not accelerator.is_local_main_process:
        accelerator.wait_for_everyone()
        return build()
    try:
        return build()
    finally:
        accelerator.wait_for_everyone()


def _check_parts(config: Config) -> list[Callback]:
    """Make every part once over a dummy parameter, so that wrong names and options are found, all of them, before
    anything is read or written. Returns the callbacks.

    Raises:
        ConfigError: listing what is wrong.
    """
    from torch import nn

    from fundamentallm.training.loss import create_loss
    from fundamentallm.training.optimizers import create_optimizer
    from fundamentallm.training.schedulers import create_scheduler

    training, dummy, problems = config.training, nn.Linear(1, 1), []
    steps = training.max_steps or training.warmup_steps + 1

    def schedule(kind: str, options: dict[str, Any]) -> object:
        return create_scheduler(create_optimizer(dummy, "sgd", 1.0), kind, 1, steps, training.warmup_steps, **options)

    parts: list[Callable[[], object]] = [
        lambda: create_optimizer(dummy, training.optimizer, training.learning_rate, **training.optimizer_options),
        lambda: schedule(training.lr_scheduler, training.lr_scheduler_options),
        lambda: create_loss(training.loss, **training.loss_options),
        lambda: callbacks.extend(_callbacks(config)),
    ]
    callbacks: list[Callback] = []
    for make in parts:
        try:
            make()
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return callbacks


def _with_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    size = tokenizer.get_vocab_size()
    if model.vocab_size is not None and model.vocab_size < size:
        raise ConfigError(f"model.vocab_size is {model.vocab_size}; allowed: at least the tokenizer's {size}.")
    return replace(model, vocab_size=model.vocab_size or size)


def _begins_afresh(config: Config) -> bool:
    """Whether no checkpoint of the run will be resumed."""
    from fundamentallm.training.checkpoint import CheckpointManager

    folder = config.resolved().training.checkpoint_dir
    assert folder is not None  # a resolved config has one
    return config.training.resume in ("auto", "never") and CheckpointManager(folder).get_latest() is None


def _load_weights(trainer: Trainer, checkpoint: Path, tokenizer: Tokenizer) -> None:
    """Begin from a checkpoint's weights.

    Raises:
        CheckpointError: if it is damaged, or of a model of another shape.
        ConfigError: if its tokens mean something else.
    """
    from fundamentallm.training.resume import like_of
    from fundamentallm.training.snapshot import MODEL_KEY
    from fundamentallm.training.stored import check_checkpoint, load_parts

    trainer.team.from_first(lambda: check_checkpoint(checkpoint))
    weights = load_parts(checkpoint, [MODEL_KEY], like_of(trainer))[MODEL_KEY]
    theirs = checkpoint / "tokenizer.json"
    if theirs.exists() and json.loads(theirs.read_text(encoding="utf-8")) != json.loads(tokenizer.to_str()):
        raise ConfigError(
            f"model.init_from is {str(checkpoint)!r}, whose tokenizer is another than data.tokenizer makes, so that "
            f"its weights would mean other tokens; set data.tokenizer to {str(theirs)!r}."
        )
    try:
        trainer.model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"model.init_from: the weights of {checkpoint} do not fit the model: {error}") from error


def _callbacks(config: Config) -> list[Callback]:
    """Those beyond the Trainer's own: the curves, and what the config names."""
    from fundamentallm.training.callbacks import Callback
    from fundamentallm.training.visualization import VisualizationCallback

    callbacks: list[Callback] = []
    try:
        callbacks.append(VisualizationCallback(Path(config.output_dir) / "curves.png"))
    except ConfigError as error:
        print(f"no curves.png: {error}", file=sys.stderr)
    for name in config.callbacks:
        kind = resolve("callbacks", name, {})
        if not (isinstance(kind, type) and issubclass(kind, Callback)):
            raise ConfigError(f"callbacks has {name!r}, a {type(kind).__name__}; allowed: subclasses of Callback.")
        callbacks.append(kind())
    return callbacks


def _show_end(trainer: Trainer, config: Config) -> None:
    """Where everything is, the best validation loss, and what the model writes."""
    best = trainer.metrics.get_best("val_loss")
    trainer.say(
        (f"best val_loss {best:.4f}; " if best is not None else "")
        + f"metrics, curves and checkpoints are in {config.output_dir}"
    )
    if config.sample_tokens and (trainer.is_main_process or trainer.is_sharded):  # all have to compute a sharded one
        from fundamentallm.models.generation import generate

        data: Any = trainer.train_loader.dataset
        prompt = data.opening().tolist()
        ids = generate(trainer.model, prompt, config.sample_tokens, config.data.sequence_length, temperature=0.7)
        ids = itertools.takewhile(lambda token: token != data.end_of_text, ids)
        text = data.tokenizer.decode(list(ids))
        trainer.say(f"---- sample: {data.tokenizer.decode(prompt)!r} continued ----\n{text}")


if __name__ == "__main__":
    sys.exit(main())
