"""Which samples, and which text, an optimizer step trained on, told from a checkpoint after the fact."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fundamentallm.checkpoint.manifest import STATE, read_manifest, verify
from fundamentallm.checkpoint.reading import load_parts
from fundamentallm.config.schema import DataConfig
from fundamentallm.config.validation import from_dict
from fundamentallm.data.corpus import Corpus, load_corpus
from fundamentallm.data.datasets import TokenSamples
from fundamentallm.data.loaders import corpus_samples
from fundamentallm.data.sampler import StepSampler
from fundamentallm.data.tokenizers import read_tokenizer
from fundamentallm.errors import CheckpointError, ConfigError
from fundamentallm.run.progress import sampler_of

TOKENIZER = "tokenizer.json"
MOST = 2**48
"""Above any count of samples or steps, and below what overflows."""
MOST_IN_A_BATCH = 2**24
"""A stranger's checkpoint may ask for more than fits in memory."""


class StepSamples(NamedTuple):
    """What one optimizer step trained on."""

    indices: list[int]
    """Of the dataset, in the order of the batch, over all processes."""
    epoch: int
    """The pass over the data, from 0."""
    samples_before: int
    """Consumed by the run before this step."""
    steps_done: int
    """By the run, at the checkpoint; a later step has not been trained there yet."""
    content: str | None
    """Fingerprint of the dataset; None where it has none."""
    config: dict[str, Any]
    """The run's, as the checkpoint holds it."""


def samples_of_step(checkpoint: Path, step: int) -> StepSamples:
    """The samples of a run's `step`-th optimizer step, counted from 1 as in metrics.jsonl.

    Each stretch of a run has batches of its own, and all of them are in every later checkpoint. A step after the
    checkpoint's is what the run comes to if it goes on as it was.

    Raises:
        CheckpointError: if the checkpoint is damaged, or of no run.
        ConfigError: if the run has no such step.
    """
    saved = load_parts(checkpoint, ("progress_state_dict", "config"))
    try:
        progress, config = saved["progress_state_dict"], saved["config"]
        stretches = [(_checked(sampler_of(stretch)), stretch["content"][0]) for stretch in progress["stretches"]]
        done = _count(progress["step"])
        last = max(done, _planned(config, stretches[-1][0]))
        sampler, content = [found for found in stretches if found[0].start.step < max(step, 1)][-1]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{checkpoint} holds no run whose samples are known ({type(error).__name__}: {error})."
        ) from error
    if not 1 <= step <= last:
        raise ConfigError(f"the step is {step}; allowed: 1 to {last}, the last step of this run.")
    epoch, before = sampler.place(step - 1)[0], sampler.samples_before(step - 1)
    content = None if content is None else str(content)
    return StepSamples(sampler.batch(step - 1), epoch, before, done, content, config)


def why_no_text(checkpoint: Path, samples: StepSamples) -> str | None:
    """Why the text of the samples cannot be told, or None where it can."""
    if not isinstance(samples.config.get("data"), dict):
        return "the run was made from Python with a TrainingConfig alone, which names no text"
    if samples.content is None or TOKENIZER not in read_manifest(checkpoint)["files"]:
        return "the run was made from Python with a dataset of its own, or without a tokenizer"
    return None


def text_of_step(checkpoint: Path, samples: StepSamples, source: str | None = None) -> TokenSamples:
    """The dataset that the samples are from, with the tokenizer of the checkpoint.

    Args:
        checkpoint: its directory.
        samples: of one step, for which `why_no_text` is None.
        source: where the text is now, as `data.source`; None: where it was.

    Raises:
        CheckpointError: if the checkpoint is damaged.
        ConfigError: if the text cannot be read, or is another than the step was trained on.
    """
    verify(checkpoint, hashed=[STATE, TOKENIZER])
    try:
        data, corpus = corpus_of_run(checkpoint, samples.config["data"], source)
        dataset, _ = corpus_samples(corpus, data.sequence_length, has_validation=False)
    except ConfigError as error:
        way_out = "If the text has moved, name it with --source; to do without it, --indices_only."
        raise ConfigError([f"{problem} {way_out}" for problem in error.problems]) from error
    if dataset.fingerprint() != samples.content:
        raise ConfigError(
            f"data.source is {data.source!r}, whose text is not what this step was trained on: it has changed since, "
            "or the run went over to it later, or was given another from Python. Name that text with --source, "
            "or do without it by --indices_only."
        )
    return dataset


def corpus_of_run(checkpoint: Path, settings: dict[str, Any], source: str | None = None) -> tuple[DataConfig, Corpus]:
    """The sources that a run was trained on, opened again, with the tokenizer of its checkpoint.

    Args:
        checkpoint: its directory.
        settings: the data's, as the checkpoint holds them.
        source: where the text is now, as `data.source`; None: where it was.

    Raises:
        ConfigError: if the settings are none, or the text cannot be read.
    """
    data = from_dict(DataConfig, settings)
    # The cache is that of whoever asks: the run's is of its own machine, and a stranger's anywhere.
    data = dataclasses.replace(data, source=data.source if source is None else source, cache_dir=None)
    if data.tokenizer.endswith(".json"):  # a file of the user's, which may be gone
        data = dataclasses.replace(data, tokenizer=str(checkpoint / TOKENIZER))
    corpus = load_corpus(data, show_progress=sys.stderr.isatty())
    # Samples are compared by their ids, so it takes the tokenizer that the run had to give them back their text.
    return data, corpus._replace(tokenizer=read_tokenizer(checkpoint / TOKENIZER))


def texts(dataset: TokenSamples, indices: Sequence[int]) -> Iterator[tuple[int, str, str]]:
    """(index, first and last token, text) of each sample's inputs; its targets are one token further."""
    assert dataset.tokenizer is not None
    for index in indices:
        where, inputs = dataset.locate(index)
        yield index, where, dataset.tokenizer.decode(inputs.tolist(), skip_special_tokens=False)


def _checked(sampler: StepSampler) -> StepSampler:
    """A sampler from a stranger's checkpoint, whose numbers are a run's. Raises ValueError if they are not."""
    numbers = [_count(number) for number in (sampler.num_samples, *sampler.sizes, *sampler.start)]
    least = sampler.num_samples // max(sampler.sizes) if sampler.drop_last else sampler.num_samples
    if min(*numbers[: 1 + len(sampler.sizes)], least) < 1 or sampler.start.place > sampler.num_samples:
        raise ValueError("a stretch without batches")
    if min(sampler.num_samples, max(sampler.sizes)) > MOST_IN_A_BATCH:
        raise ValueError(f"a batch of more than {MOST_IN_A_BATCH:,} samples")
    if sampler.seed is not None:
        _count(sampler.seed, 2**63)
    if not isinstance(sampler.drop_last, bool):
        raise ValueError("drop_last is neither true nor false")
    return sampler


def _count(number: Any, limit: int = MOST) -> int:
    if type(number) is not int or not 0 <= number < limit:
        raise ValueError(f"{str(number)[:40]!r} is no count")
    return number


def _planned(config: dict[str, Any], sampler: StepSampler) -> int:
    """The last step that a run plans; 0 where its config does not say."""
    training = config.get("training", config)
    steps, epochs = training.get("max_steps"), training.get("max_epochs")
    by_epochs = None if epochs is None else sampler.steps_before_epoch(_count(epochs))
    return min([_count(end) for end in (steps, by_epochs) if end is not None], default=0)
