"""How far a run is, and which data order each part of it was trained on."""

import math
from typing import Any

import torch
from torch import Tensor

from fundamentallm.data.sampler import Start, StepSampler

ORDER = ("num_samples", "seed", "drop_last", "sampler")


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
        order = {name: getattr(samples, name) for name in (*ORDER, "batch_size", "schedule")}
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
        } | ({} if stream is None else {"stream": stream.state_dict(self.samples.at(self.step).place)})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes at a saved step: at the next sample if the batch size changed, at the next epoch if the data did."""
        before, now, step = state["stretches"][-1], self.segments[-1], state["step"]
        saved = sampler_of(before)
        if type(step) is not int or step < saved.start.step or state["samples"] != saved.at(step).samples:
            raise ValueError(f"step {step!r} does not come after {state['samples']} samples.")
        if _without_start(before) == _without_start(now):
            self.samples.start, self.segments = saved.start, list(state["stretches"])
        else:
            start = saved.at(step)
            if start.place and _sample_order(before) != _sample_order(now):
                start = start._replace(epoch=start.epoch + 1, place=0)
            self.samples.start, self.segments = start, [*state["stretches"], {**now, "start": list(start)}]
        if self.samples.stream is not None and _sample_order(before) == _sample_order(now):
            if state["stream"]["position"] != self.samples.at(step).place:
                raise ValueError(f"step {step} is not at the place {state['stream']['position']} of the stream.")
            self.samples.stream.load_state_dict(state["stream"])
        self.step, self.validation_due = step, bool(state["validation_due"])
        self.origin = None if state["origin"] is None else str(state["origin"])
        self.tokens.copy_(state["tokens"])
        self.loss.totals.copy_(state["loss"]["totals"])


def sampler_of(segment: dict[str, Any]) -> StepSampler:
    """Returns the batches of a segment, over all processes. Raises ValueError if no run can start where it does."""
    # The earliest checkpoints have no schedule.
    schedule, drop_last = segment.get("schedule", ()), segment["drop_last"]
    size, batch_size, seed = segment["num_samples"], segment["batch_size"], segment["seed"]
    sampler = StepSampler(size, batch_size, seed, drop_last=drop_last, schedule=schedule)
    sampler.start = start = Start(*segment["start"])
    # An index outside the epoch's order names no sample, and the permutation would never end.
    is_valid = all(type(number) is int and number >= 0 for number in start) and start.place < sampler.num_samples
    if not is_valid or min(sampler.sizes) < 1:
        raise ValueError(f"no run of {sampler.num_samples} samples in batches of {sampler.sizes} starts at {start}.")
    return sampler


def _without_start(segment: dict[str, Any]) -> dict[str, Any]:
    return {"schedule": [], "sampler": None} | {name: value for name, value in segment.items() if name != "start"}


def _sample_order(segment: dict[str, Any]) -> list[Any]:
    """Returns what an index within an epoch refers to: the order of the training samples."""
    return [*(segment.get(name) for name in ORDER), segment["content"][0]]
