"""How far a run is."""

from __future__ import annotations

from typing import Any

import torch

from fundamentallm.data.loaders import StepSampler
from fundamentallm.errors import ConfigError
from fundamentallm.training.metrics import RunningMean


class Progress:
    """Where in the run a trainer is. The step says where in the data it is; the counts are kept on the device."""

    def __init__(self, samples: StepSampler, device: torch.device) -> None:
        self.samples = samples
        self.step = 0
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)  # targets trained on
        self.bad_steps = torch.zeros(2, dtype=torch.int64, device=device)  # in a row until now, in all
        self.loss = RunningMean(device)  # since the last log line

    def state_dict(self) -> dict[str, Any]:
        """Step, samples and tokens consumed, and what the next log line will sum up."""
        return {
            "step": self.step,
            "samples": self.samples.samples_before(self.step),
            "tokens": self.tokens,
            "bad_steps": self.bad_steps,
            "loss": self.loss.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place.

        Raises:
            ConfigError: if this run's batches are not those of the saved one, so that the place has no meaning.
        """
        if state["samples"] != self.samples.samples_before(state["step"]):
            raise ConfigError(
                f"the checkpoint's step {state['step']} came after {state['samples']} samples, and with this run's "
                f"data and batch_size {self.samples.batch_size} it would come after "
                f"{self.samples.samples_before(state['step'])}; resume with the same data and batch_size."
            )
        self.step = state["step"]
        self.tokens.copy_(state["tokens"])
        self.bad_steps.copy_(state["bad_steps"])
        self.loss.load_state_dict(state["loss"])
