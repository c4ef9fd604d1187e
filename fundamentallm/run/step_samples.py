"""Looks up in a checkpoint which samples, and which text, an optimizer step trained on."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

from fundamentallm.checkpoint.manifest import STATE, read_manifest, verify
from fundamentallm.checkpoint.reading import explained, load_parts
from fundamentallm.config.schema import DataConfig, saved_data_settings
from fundamentallm.config.validation import from_dict
from fundamentallm.data.corpus import Corpus, load_corpus, was_opened
from fundamentallm.data.datasets import TokenSamples
from fundamentallm.data.loaders import corpus_samples
from fundamentallm.data.tokenizers import read_tokenizer
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.models.transformers_format import TOKENIZER
from fundamentallm.run.progress import sampler_of

MOST_IN_A_BATCH = 2**24
"""Larger than any batch; the indices of a step have to fit in memory."""


class StepSamples(NamedTuple):
    """The samples of one optimizer step."""

    indices: list[int]  # into the dataset, in the order of the batch, over all processes
    epoch: int  # from 0
    samples_before: int  # that the run consumed before this step
    steps_done: int  # at the checkpoint; later steps were not trained yet
    content: str | None  # fingerprint of the dataset, if it has one
    config: dict[str, Any]  # of the run, as the checkpoint holds it


def samples_of_step(checkpoint: Path, step: int) -> StepSamples:
    """Returns the samples of a run's `step`-th optimizer step, counted from 1 as in metrics.jsonl.

    Every checkpoint holds all segments of its run, each with batches of its own. For a step after the checkpoint, the
    answer is what the run will train on if its settings stay as they are. Raises ConfigError if the step is below 1.
    """
    if step < 1:
        raise ConfigError(Problem("step", step, "at least 1"))
    saved = load_parts(checkpoint, ("progress_state_dict", "config"))
    with explained(checkpoint, "it does not hold a run whose samples are known"):
        progress, config = saved["progress_state_dict"], saved["config"]
        segment = [segment for segment in progress["stretches"] if segment["start"][0] < step][-1]
        sampler, content = sampler_of(segment), segment["content"][0]
        if segment.get("sampler") or min(sampler.num_samples, max(sampler.sizes)) > MOST_IN_A_BATCH:
            text = (
                f"its order is that of the caller's own sampler, or a batch has more than {MOST_IN_A_BATCH:,} samples"
            )
            raise ValueError(text)
        epoch, before = sampler.place(step - 1)[0], sampler.samples_before(step - 1)
        return StepSamples(sampler.batch(step - 1), epoch, before, progress["step"], content, config)


def text_of_step(checkpoint: Path, samples: StepSamples, source: str | None = None) -> TokenSamples | None:
    """Opens the dataset that the samples are from; `source` is the present location of its text, if it has moved.

    Returns None if the run was started from Python, without a text or a tokenizer. Raises ConfigError if the text
    cannot be read, or is not the one that the step was trained on.
    """
    settings, files = samples.config.get("data"), read_manifest(checkpoint)["files"]
    if not isinstance(settings, dict) or samples.content is None or TOKENIZER not in files:
        return None
    verify(checkpoint, hashed=[STATE, TOKENIZER])
    try:
        data, corpus = corpus_of_run(checkpoint, settings, source)
        dataset, _ = corpus_samples(corpus, data.sequence_length, has_validation=False)
        assert dataset is not None
        if dataset.fingerprint() != samples.content:
            reason = "whose text is not what this step was trained on: it changed, or the run used another one then"
            raise ConfigError(Problem("data.source", data.source, reason=reason))
    except ConfigError as error:
        advice = "If the text has moved, name it with --source. To leave it out: --indices_only."
        raise ConfigError([f"{problem} {advice}" for problem in error.problems]) from error
    return dataset


def corpus_of_run(checkpoint: Path, settings: dict[str, Any], source: str | None = None) -> tuple[DataConfig, Corpus]:
    """Opens the text that a run with these `data` settings was trained on, with the tokenizer of its checkpoint.

    Raises ConfigError if the text cannot be read, or only the checkpoint names it.
    """
    data = from_dict(DataConfig, saved_data_settings(settings))
    if source is None and not was_opened(data):
        reason = "which the checkpoint names, but which you have not opened before"
        advice = "If you trust the checkpoint, allow it by: fundamentallm prepare --data.source TEXT."
        raise ConfigError(Problem("data.source", data.source, "", advice, reason))
    # The run's cache folder may be on another machine, and that of a checkpoint from elsewhere could be anywhere.
    is_file = data.tokenizer.endswith(".json")  # of the user's, which may be gone
    spec = str(checkpoint / TOKENIZER) if is_file else data.tokenizer
    data = dataclasses.replace(data, source=source or data.source, cache_dir=None, tokenizer=spec)
    tokenizer = read_tokenizer(checkpoint / TOKENIZER)
    corpus = load_corpus(data, sys.stderr.isatty(), tokenizer)
    # Samples are compared by their ids, which only the run's own tokenizer decodes to their text.
    return data, corpus._replace(tokenizer=tokenizer)
