"""How far a run is."""

from __future__ import annotations

from typing import Any

import torch

from fundamentallm.data.sampler import Start, StepSampler
from fundamentallm.training.metrics import RunningMean


class Progress:
    """Where in the run a trainer is. The step says where in the data it is; the counts are kept on the device.

    Attributes:
        step: optimizer steps done.
        tokens: targets trained on, a scalar.
        loss: the mean since the last log line.
        origin: the checkpoint, by path, that `resume` named and this run went on from; None: none.
        validation_due: the last step's validation was broken off, and comes first when the run goes on.
        stretches: each stretch of the run with the data and batches it was trained on, the present one last; what
            names any step's samples afterwards.
    """

    def __init__(self, samples: StepSampler, content: list[str | None], device: torch.device) -> None:
        """Begin a run over `samples`; `content` is what `fingerprint` says of each dataset."""
        self.samples = samples
        self.step = 0
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = RunningMean(device)
        self.validation_due = False
        self.origin: str | None = None
        self.stretches = [{**geometry(samples), "content": content, "start": list(samples.start)}]

    def state_dict(self) -> dict[str, Any]:
        """Everything."""
        return {
            "step": self.step,
            "samples": self.samples.samples_before(self.step),
            "tokens": self.tokens,
            "loss": self.loss.state_dict(),
            "validation_due": self.validation_due,
            "origin": self.origin,
            "stretches": self.stretches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place.

        With another batch size, the batches go on at the next sample; with other data, at the next epoch.

        Raises:
            ValueError: if the state is none of a run's.
        """
        before, now = state["stretches"][-1], self.stretches[-1]
        step = state["step"]
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"the step is {step!r}; allowed: a whole number, at least 0.")
        saved = sampler_of(before)
        if state["tokens"].shape != self.tokens.shape:
            raise ValueError(f"the number of tokens has shape {state['tokens'].shape}.")
        _check_start(saved, step)
        if state["samples"] != saved.samples_before(step):
            raise ValueError(f"step {step} comes after {saved.samples_before(step)} samples, not {state['samples']}.")
        if _batches(before) == _batches(now):
            self.samples.start, self.stretches = saved.start, list(state["stretches"])
        else:
            epoch, place = saved.place(step)
            if place and _order(before) != _order(now):
                epoch, place = epoch + 1, 0
            self.samples.start = Start(step, epoch, place, state["samples"])
            self.stretches = [*state["stretches"], {**now, "start": list(self.samples.start)}]
        self.step, self.validation_due = step, bool(state["validation_due"])
        self.origin = None if state["origin"] is None else str(state["origin"])
        self.tokens.copy_(state["tokens"])
        self.loss.load_state_dict(state["loss"])


def geometry(samples: StepSampler) -> dict[str, Any]:
    """What the order of samples and batches follows from."""
    return {name: getattr(samples, name) for name in ("num_samples", "batch_size", "seed", "drop_last", "schedule")}


def _batches(stretch: dict[str, Any]) -> dict[str, Any]:
    return {"schedule": []} | {name: value for name, value in stretch.items() if name != "start"}


def _order(stretch: dict[str, Any]) -> tuple[Any, ...]:
    """What a place in an epoch has a meaning in: the order of the training samples."""
    return stretch["num_samples"], stretch["seed"], stretch["drop_last"], stretch["content"][0]


def _check_start(samples: StepSampler, step: int) -> None:
    """Refuse a start that no run has: outside an epoch's order, places stand for no sample.

    Raises:
        ValueError: saying which.
    """
    start = samples.start
    if any(type(number) is not int or number < 0 for number in start) or start.step > step:
        raise ValueError(f"step {step} cannot come after a start at {start}.")
    if start.place >= samples.num_samples:
        raise ValueError(f"place {start.place} is outside an order of {samples.num_samples} samples.")


def sampler_of(stretch: dict[str, Any]) -> StepSampler:
    """The batches of a stretch, over all processes."""
    made = StepSampler(
        stretch["num_samples"],
        stretch["batch_size"],
        stretch["seed"],
        drop_last=stretch["drop_last"],
        schedule=stretch.get("schedule", ()),  # which earlier versions did not have
    )
    made.start = Start(*stretch["start"])
    return made
