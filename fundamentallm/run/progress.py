"""How far a run is, which data order each part of it was trained on, and which samples and text a step saw."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fundamentallm.checkpoint.manifest import STATE, verify
from fundamentallm.checkpoint.reading import explained, load_parts
from fundamentallm.config.saved import saved_data_settings
from fundamentallm.config.schema import BUILT_IN_CORPUS, DataConfig
from fundamentallm.config.validation import from_dict
from fundamentallm.data.corpus import Corpus, load_corpus, opened_note
from fundamentallm.data.datasets import TokenDataset
from fundamentallm.data.loaders import corpus_samples
from fundamentallm.data.sampler import Start, StepSampler
from fundamentallm.data.tokenizers import read_tokenizer
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.models.transformers_format import TOKENIZER

ORDER = ("num_samples", "seed", "drop_last", "sampler")
MOST_IN_A_BATCH = 2**24  # larger than any batch: the indices of a step have to fit in memory


class RunningMean:
    """A mean kept as `totals`, (sum, count) on the device, to add up over processes. Adding does not wait for it.

    In float64 if the device has it: a float32 sum stops growing by ones at 2^24.
    """

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(2, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
        self._sum, self._count = self.totals.unbind()  # views

    def add(self, total: Tensor, count: Tensor) -> None:
        """Add a sum, and the number of values in it (scalars)."""
        self._sum += total
        self._count += count


class Progress:
    """The position of a run over `samples`. `content` is the fingerprint of each dataset, training first.

    Attributes:
        step: optimizer steps done.
        tokens: targets trained on, a scalar.
        loss: mean over the targets since the last log line.
        origin: path of the checkpoint that `resume` named when the run began; None if it began without one.
        validation_due: True while a validation is unfinished. It comes first when the run resumes.
        segments: the data order of each part of the run, newest last. A segment begins when the batch size or the
            data changes. Used to look up which samples a step saw.
    """

    def __init__(self, samples: StepSampler, content: list[str | None], device: torch.device) -> None:
        self.samples, self.step = samples, 0
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = RunningMean(device)
        self.validation_due = False
        self.origin: str | None = None
        order = {name: getattr(samples, name) for name in (*ORDER, "batch_size", "schedule", "skip")}
        self.segments = [{**order, "content": content, "start": list(samples.start)}]

    def count(self, loss: Tensor, num_targets: Tensor) -> None:
        """Counts one optimizer step: its loss summed over targets, and its number of targets (scalars)."""
        self.step += 1
        self.tokens += num_targets
        self.loss.add(loss, num_targets)

    def read(self) -> tuple[int, float]:
        """Returns the targets so far, and the mean loss since the last call. The host waits for the device."""
        total, count = self.loss.totals.tolist()
        self.loss.totals.zero_()
        return int(self.tokens), total / count if count else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Returns everything. The key "stretches" is that of checkpoint format 2."""
        stream = self.samples.stream
        return {
            "step": self.step,
            "samples": self.samples.at(self.step).samples,
            "tokens": self.tokens,
            "loss": {"totals": self.loss.totals},
            "validation_due": self.validation_due,
            "origin": self.origin,
            "stretches": self.segments,
        } | ({} if stream is None else {"stream": stream.state_dict(self.samples.at(self.step, True).place)})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes at a saved step: at the next sample if the batch size changed, at the next epoch if the data did."""
        before, now, step = state["stretches"][-1], self.segments[-1], state["step"]
        saved = sampler_of(before)
        if type(step) is not int or step < saved.start.step or state["samples"] != saved.at(step).samples:
            raise ValueError(f"step {step!r} does not come after {state['samples']} samples.")
        if _without_start(before) == _without_start(now):
            self.samples.start, self.segments = saved.start, list(state["stretches"])
        else:
            _check_skipped(now["skip"], saved, step)
            start = saved.at(step, is_before_skip=True)
            if start.place and _sample_order(before) != _sample_order(now):
                start = start._replace(epoch=start.epoch + 1, place=0)
            self.samples.start, self.segments = start, [*state["stretches"], {**now, "start": list(start)}]
        if self.samples.stream is not None and _sample_order(before) == _sample_order(now):
            if state["stream"]["position"] != self.samples.at(step, is_before_skip=True).place:
                raise ValueError(f"step {step} is not at the place {state['stream']['position']} of the stream.")
            self.samples.stream.load_state_dict(state["stream"])
        self.step, self.validation_due = step, bool(state["validation_due"])
        self.origin = None if state["origin"] is None else str(state["origin"])
        self.tokens.copy_(state["tokens"])
        self.loss.totals.copy_(state["loss"]["totals"])


def sampler_of(segment: dict[str, Any]) -> StepSampler:
    """Returns the batches of a segment, over all processes. Raises ValueError if no run can start where it does."""
    # Earlier checkpoints have no schedule and no skip.
    later, drop_last = {name: segment.get(name, ()) for name in ("schedule", "skip")}, segment["drop_last"]
    size, batch_size, seed = segment["num_samples"], segment["batch_size"], segment["seed"]
    sampler = StepSampler(size, batch_size, seed, drop_last=drop_last, **later)
    sampler.start = start = Start(*segment["start"])
    # An index outside the epoch's order names no sample, and the permutation would never end.
    is_valid = all(type(number) is int and number >= 0 for number in start) and start.place < sampler.num_samples
    if not is_valid or min(sampler.sizes) < 1:
        raise ValueError(f"no run of {sampler.num_samples} samples in batches of {sampler.sizes} starts at {start}.")
    return sampler


def _check_skipped(skip: list[list[int]], saved: StepSampler, step: int) -> None:
    """Raises ConfigError if samples are to be left out on which the run was trained before `step`."""
    if late := [pair for pair in skip if pair[0] <= step and pair not in saved.skip]:
        advice = "Resume from an earlier checkpoint (training.resume), or leave them out of data.skip."
        reason = f"and the checkpoint is already at step {step}"
        raise ConfigError(Problem("data.skip", late, f"steps after {step}", advice, reason))


def _without_start(segment: dict[str, Any]) -> dict[str, Any]:
    return {"schedule": [], "skip": [], "sampler": None} | {
        name: value for name, value in segment.items() if name != "start"
    }


def _sample_order(segment: dict[str, Any]) -> list[Any]:
    """Returns what an index within an epoch refers to: the order of the training samples."""
    return [*(segment.get(name) for name in ORDER), segment["content"][0]]


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

    For a step after the checkpoint, it is what the run will train on if its settings stay as they are. Raises
    ConfigError if the step is below 1.
    """
    if step < 1:
        raise ConfigError(Problem("step", step, "at least 1"))
    saved = load_parts(checkpoint, ("progress_state_dict", "config"))
    with explained(checkpoint, "it does not hold a run whose samples are known"):
        progress, config = saved["progress_state_dict"], saved["config"]
        segment = [segment for segment in progress["stretches"] if segment["start"][0] < step][-1]
        sampler, content = sampler_of(segment), segment["content"][0]
        if segment.get("sampler") or min(sampler.num_samples, max(sampler.sizes)) > MOST_IN_A_BATCH:
            raise ValueError("its order is that of a caller's sampler, or a batch is larger than any")
        start = sampler.at(step - 1)
        return StepSamples(sampler.batch(step - 1), start.epoch, start.samples, progress["step"], content, config)


def text_of_step(checkpoint: Path, samples: StepSamples, source: str | None = None) -> TokenDataset | None:
    """Opens the dataset that the samples are from; `source` is the present location of its text, if it has moved.

    Returns None if the run was started from Python, without a text or a tokenizer. Raises ConfigError if the text
    cannot be read, or is not the one that the step was trained on.
    """
    settings, files = samples.config.get("data"), verify(checkpoint, hashed=[STATE, TOKENIZER])["files"]
    if not isinstance(settings, dict) or samples.content is None or TOKENIZER not in files:
        return None
    try:
        data, corpus = corpus_of_run(checkpoint, settings, source)
        dataset, _ = corpus_samples(corpus, data.sequence_length, has_validation=False)
        assert dataset is not None
        if dataset.fingerprint() != samples.content:
            reason = "whose text is not what this step was trained on"
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
    names = {*data.sources(), *data.validation_sources().values()} - {BUILT_IN_CORPUS}
    if source is None and not all(opened_note(name).exists() for name in names):
        reason = "which the checkpoint names, but which you have not opened before"
        advice = "If you trust the checkpoint, allow it by: fundamentallm prepare --data.source TEXT."
        raise ConfigError(Problem("data.source", data.source, "", advice, reason))
    # The run's cache folder may be on another machine, and that of a checkpoint from elsewhere could be anywhere. The
    # user's tokenizer file may be gone.
    spec = str(checkpoint / TOKENIZER) if data.tokenizer.endswith(".json") else data.tokenizer
    data = dataclasses.replace(data, source=source or data.source, cache_dir=None, tokenizer=spec)
    tokenizer = read_tokenizer(checkpoint / TOKENIZER)
    corpus = load_corpus(data, sys.stderr.isatty(), tokenizer)
    # Samples are compared by their ids, which only the run's own tokenizer decodes to their text.
    return data, corpus._replace(tokenizer=tokenizer)
