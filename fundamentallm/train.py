"""Train a language model from a config: `accelerate launch -m fundamentallm.train --config cfg.yaml`.

The composition root: makes everything that a config describes and hands it to the Trainer. Exit codes: 0 finished (or
stopped by a callback), 1 failed, 2 the config is wrong, 3 the loss or gradient was no longer finite, 75 stopped by a
signal or by `training.max_minutes` (the same command resumes the run), 130 a second Ctrl-C.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm.config.command_line import parse_config, train_parser
from fundamentallm.config.files import validation_sets
from fundamentallm.config.registry import not_one_of
from fundamentallm.config.schema import Config, ModelConfig
from fundamentallm.config.units import duration_text
from fundamentallm.errors import (
    START_AGAIN,
    ConfigError,
    FundamentaLLMError,
    Interrupted,
    Problem,
    collected,
    exit_code,
    open_output,
    print_last,
    raise_all,
    report,
)
from fundamentallm.run.folder import LOG, command, note_interruption
from fundamentallm.signals import ended_by_signals

if TYPE_CHECKING:
    from accelerate import Accelerator
    from tokenizers import Tokenizer

    from fundamentallm.data.corpus import Corpus
    from fundamentallm.models.transformers_format import Pretrained
    from fundamentallm.training.callbacks.base import Callback
    from fundamentallm.training.trainer import Trainer


def main(arguments: Sequence[str] | None = None, program: str = "python -m fundamentallm.train") -> int:
    """Runs the command line and returns the exit code."""
    open_output(drops=True)
    config = None
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments:
            if os.environ.get("RANK", "0") == "0":
                train_parser(program).print_help()
            raise ConfigError("No setting is given. Give --config FILE, or settings such as --data.source my.txt.")
        with ended_by_signals():
            config = parse_config(arguments, program)
            trainer = run(config)
        if not trainer.was_interrupted:
            return 0
        if trainer.is_main_process:
            print_last(trainer.describe_stop())
    except FundamentaLLMError as error:
        return report(error)
    except KeyboardInterrupt as interrupt:
        is_signal = isinstance(interrupt, Interrupted)  # otherwise a second Ctrl-C
        if os.environ.get("RANK", "0") == "0":
            if is_signal and config is not None:
                note_interruption(Path(config.output_dir), str(interrupt))
            end = f"{interrupt} before the first step" if is_signal else "ended without saving"
            end += f"; to resume: {command()}"
            print(f"\n{end}", file=sys.stderr)
            print_last(end)
        if not is_signal:
            return exit_code(interrupt)
    return 0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) else START_AGAIN  # 0: the launcher restarts it


def run(config: Config) -> Trainer:
    """Trains as `config` says and returns the trainer. Raises FundamentaLLMError for any mistake that is known."""
    if config.training.resume == "never" and (Path(config.output_dir) / LOG).exists():
        advice = "Choose another output_dir, or set resume: auto to resume that run."
        reason = f"and {config.output_dir} already holds a run"
        raise ConfigError(Problem("training.resume", "never", advice=advice, reason=reason))
    started = time.monotonic()
    trainer = make_trainer(config)
    trainer.train()
    if trainer.is_finished:
        _report_end(trainer, time.monotonic() - started)
    trainer.leave_group()
    return trainer


def make_trainer(config: Config) -> Trainer:
    """Returns a Trainer with everything that `config` describes. Raises FundamentaLLMError for what is wrong in it."""
    # Imported here, so that --help and config errors do not wait for torch.
    import torch

    from fundamentallm.data.chat import TEMPLATE, applied_template
    from fundamentallm.data.corpus import describe, load_corpus
    from fundamentallm.data.loaders import create_dataloaders, stream_loaders
    from fundamentallm.distributed.accelerator import create_accelerator
    from fundamentallm.distributed.host_group import HostGroup
    from fundamentallm.models.transformer import Transformer
    from fundamentallm.run.resume import fetch_lost, learned_tokenizer, open_pretrained
    from fundamentallm.training.trainer import Trainer

    config = config.resolved()
    training = config.training
    batch_size = training.smallest_batch_size(training.batch_size)
    accelerator = create_accelerator(training.mixed_precision, batch_size, config.trackers, config.output_dir)
    callbacks = _check_names(config)
    HostGroup(hours=24).from_main(lambda: fetch_lost(config))  # which may copy many GB
    config, pretrained, model = open_pretrained(config)
    is_main, corpus = accelerator.is_main_process, None
    with _local_main_process_first(accelerator):
        if config.data.streaming:
            train_loader, val_loader, lines = stream_loaders(config, is_main)
        else:
            corpus = load_corpus(config.data, is_main, learned_tokenizer(config))
            train_loader, val_loader = create_dataloaders(corpus, corpus.tokenizer, config)
            lines = describe(corpus)
    data: Any = train_loader.dataset
    config = replace(config, model=_with_vocabulary(config.model, data.tokenizer, corpus))
    torch.manual_seed(config.training.seed)
    if model is None:
        document_start = data.end_of_text if config.data.mask_documents else None
        # Under FSDP2 a model may be larger than a device, so it gets its memory when it is sharded.
        with torch.device("meta") if accelerator.is_fsdp2 else nullcontext():
            model = Transformer(config.model, document_start)
    trainer = Trainer(model, config, train_loader, val_loader, accelerator=accelerator)
    if pretrained is not None:
        trainer.files = pretrained.files(data)
        trainer.say(f"{config.model.pretrained}: {pretrained}")
    if template := applied_template(config.data):
        trainer.files = template | trainer.files | {name: template[name] for name in (TEMPLATE,) if name in template}
        trainer.say(f"the rows are rendered by the chat template beside {config.data.tokenizer}")
    _load_initial_weights(trainer, pretrained, data.tokenizer)
    for callback in callbacks:
        trainer.callbacks.add(callback)
    trainer.say("\n".join(lines))
    if config.data.streaming and is_main:
        data.say = trainer.say
    _warn(trainer)
    return trainer


def _warn(trainer: Trainer) -> None:
    """Says if the run has few steps, and how many samples were cut or dropped."""
    from fundamentallm.data.datasets import MixedDataset, PackedDataset
    from fundamentallm.data.loaders import named_loaders

    training = trainer.config.training
    if training.max_steps is None and trainer.total_steps < 100:  # a default length rarely means so few
        few = f"warning: {trainer.total_steps} optimizer steps are few, with {training.warmup_steps} of warm-up"
        trainer.say(f"{few}; more come from more training.max_epochs, or a smaller training.batch_size")
    counts = {"num_cut": "were cut to data.sequence_length", "num_lost": "were dropped: their prompts fill it"}
    parts = {"training": {"": trainer.train_loader}, "validation": named_loaders(trainer.val_loader)}
    for name, loaders in parts.items():
        datasets = {key: loader.dataset for key, loader in loaders.items()}
        for key, whole in datasets.items():
            sources = (
                zip(whole.names, whole.datasets, strict=True) if isinstance(whole, MixedDataset) else [(key, whole)]
            )
            for source, dataset in sources:
                if isinstance(dataset, PackedDataset):
                    where = f"{name}, {source}" if source else name
                    trainer.say(f"{where}: {dataset.describe(trainer.batch_size)}")
        for attribute, what in counts.items():
            if count := sum(getattr(dataset, attribute, 0) for dataset in datasets.values()):
                trainer.say(f"{count:,} {name} samples {what}")


def _load_initial_weights(trainer: Trainer, pretrained: Pretrained | None, tokenizer: Tokenizer) -> None:
    """Loads the weights that a new run starts from, if the config names any and no checkpoint will be resumed."""
    from fundamentallm.checkpoint.reading import load_weights
    from fundamentallm.run.resume import begin_from_checkpoint

    init_from, manager = trainer.config.model.init_from, trainer.checkpoint_manager
    assert manager is not None  # the run has a folder
    is_new = trainer.config.training.resume in ("auto", "never")
    if not is_new or not trainer.group.from_main(lambda: manager.get_latest() is None):
        return
    with trainer.group.barrier_with_errors():
        if init_from is not None:
            begin_from_checkpoint(trainer.state, trainer.group, init_from, tokenizer)
        elif pretrained is not None and pretrained.shape is not None:  # otherwise transformers has loaded them
            load_weights(pretrained.folder, pretrained.weights, trainer.model, trainer.state.like())


@contextmanager
def _local_main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """Runs the block on one process of each machine, then on the others, which find the cache filled."""
    if not accelerator.is_local_main_process:
        accelerator.wait_for_everyone()
    try:
        yield
    finally:  # `accelerator.local_main_process_first` would leave the others waiting if this one raises
        if accelerator.is_local_main_process:
            accelerator.wait_for_everyone()


def _check_names(config: Config) -> list[Callback]:
    """Makes what the config names, over a dummy parameter, to raise all mistakes together; returns the callbacks."""
    from torch import nn

    from fundamentallm.training.callbacks import make_callbacks
    from fundamentallm.training.loss import create_loss
    from fundamentallm.training.metrics import further_metrics, loss_names
    from fundamentallm.training.optimizers import create_optimizer
    from fundamentallm.training.schedulers import make_schedule

    training, dummy, problems = config.training, nn.Linear(1, 1), list[Problem]()
    optimizer, steps = create_optimizer(dummy, "sgd", 1.0), training.max_steps or training.warmup_steps + 1
    with collected(problems):
        create_optimizer(dummy, training.optimizer, training.learning_rate, **training.optimizer_options)
    with collected(problems):
        make_schedule(training, optimizer, steps)
    with collected(problems):
        create_loss(training.loss, **training.loss_options)
    with collected(problems):
        callbacks = make_callbacks(config)
    with collected(problems):
        sets = validation_sets(config.data)
        known = (*loss_names(sets), *further_metrics(training.validation_metrics, sets=sets))
        if training.early_stopping_metric not in known:
            problems.append(not_one_of("early_stopping_metric", training.early_stopping_metric, known))
    raise_all(problems)
    return callbacks


def _with_vocabulary(model: ModelConfig, tokenizer: Tokenizer, corpus: Corpus | None) -> ModelConfig:
    """Returns the shape with a row for each token. Tokens that do not occur in a corpus may have none."""
    from fundamentallm.data.tokenizers import num_ids

    size = num_ids(tokenizer)
    if model.vocab_size is not None and model.vocab_size < size:
        sources = () if corpus is None else (*corpus.sources, *corpus.validation)
        parts = [part.ids for source in sources for part in (source.train, source.validation) if len(part.ids)]
        largest = max((int(ids.max()) for ids in parts), default=size - 1)
        if model.vocab_size <= largest:
            reason = f"and the text may have the token {tokenizer.id_to_token(largest)!r} with the id {largest}"
            raise ConfigError(Problem("model.vocab_size", model.vocab_size, f"at least {largest + 1}", "", reason))
    return replace(model, vocab_size=model.vocab_size or size)


def _report_end(trainer: Trainer, seconds: float) -> None:
    """Prints a sample of text, the time that the launch took, the best validation loss, and what to do next."""
    config = trainer.config
    if config.sample_tokens:
        from fundamentallm.training.callbacks.observing import continuation

        with suppress(Interrupted):  # the run is finished
            if written := continuation(trainer, None, config.sample_tokens):
                trainer.say(f"---- sample: {written[0]!r} continued ----\n{written[1]}")
    value, folder = trainer.metrics.get_best("val_loss"), shlex.quote(config.output_dir)
    best = "" if value is None else f", best val_loss {value:.4f}"
    trainer.say(
        f"finished at step {trainer.global_step}/{trainer.total_steps} after {duration_text(seconds)}{best}\n"
        f"metrics and checkpoints are in {config.output_dir}; next:\n"
        f"  fundamentallm generate {folder}\n  fundamentallm report {folder}"
    )


if __name__ == "__main__":
    sys.exit(main())
