"""Decides on the device which optimizer steps to skip: those that are not finite, and optionally spikes."""

from __future__ import annotations

import torch
from torch import Tensor

from fundamentallm.errors import TrainingError

WINDOW = 128
"""Steps that a spike is measured against."""
FEWEST = 32
"""Steps that the window must hold before a step can be a spike."""
LEAST_DEVIATION = 1e-3
"""Smallest deviation, as a fraction of the median. Otherwise any value above a window of equal ones is a spike."""
MAD_TO_STD = 1.4826
"""Ratio of the standard deviation to the median absolute deviation of normally distributed numbers."""


class Guard:
    """Decides whether to skip a step before the optimizer takes it. The host does not wait for the answer.

    A step is bad if its loss or gradient is not finite. After `max_bad_steps` bad steps in a row, every later step
    counts as bad too: weights stop changing until the host sees it at the next log line, so the final weights do not
    depend on the logging interval.

    A step is a spike if its loss or gradient norm is more than `skip_spikes_above` robust standard deviations above the
    median of the last `WINDOW` steps. (Median and median absolute deviation, since outliers move mean and standard
    deviation: Leys et al., J. Exp. Soc. Psychol. 49, 2013.) Spikes enter the window too, so that a lasting change of
    level is accepted after a while.

    Args:
        device: the device of the losses.
        max_bad_steps: bad steps in a row after which every step is skipped.
        skip_spikes_above: robust z-score of a spike; None: nothing is a spike.
    """

    def __init__(self, device: torch.device, max_bad_steps: int, skip_spikes_above: float | None = None) -> None:
        self.max_bad_steps, self.skip_spikes_above = max_bad_steps, skip_spikes_above
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # bad in a row, all bad, spikes
        self._in_a_row, self._in_all, self._spikes = self.counts.unbind()  # views of `counts`
        self._recent = torch.full((2, WINDOW), torch.nan, device=device)  # loss and norm; NaN: no step yet

    def skips(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Returns whether to skip `step` (a boolean scalar), given its mean loss and gradient norm (scalars)."""
        has_stopped = self._in_a_row >= self.max_bad_steps
        bad = ~(loss + norm).isfinite() | has_stopped
        self._in_a_row.add_(1).mul_(bad)
        self._in_all.add_(bad & ~has_stopped)
        if self.skip_spikes_above is None:
            return bad
        spike = self._is_spike(step, torch.stack((loss.float(), norm.float())), self.skip_spikes_above) & ~bad
        self._spikes.add_(spike)
        return bad | spike

    def _is_spike(self, step: int, values: Tensor, threshold: float) -> Tensor:
        median = self._recent.nanmedian(dim=1, keepdim=True).values
        spread = (self._recent - median).abs().nanmedian(dim=1).values * MAD_TO_STD
        deviation = spread.maximum(LEAST_DEVIATION * median.squeeze(1).abs())
        known = (~self._recent.isnan()).sum(dim=1) >= FEWEST
        above = values - median.squeeze(1) > threshold * deviation
        slot = step % WINDOW
        self._recent[:, slot] = values.where(values.isfinite(), self._recent[:, slot])
        return (above & known).any()

    def read(self) -> list[int]:
        """Returns the bad steps in a row, all bad steps, and the skipped spikes. The host waits for the device."""
        return self.counts.tolist()

    def raise_if_stopped(self, bad_in_a_row: int | None = None) -> None:
        """Raises TrainingError if `max_bad_steps` steps in a row were bad. The host waits for the device.

        Args:
            bad_in_a_row: the count, if the caller has read it already.
        """
        if (int(self._in_a_row) if bad_in_a_row is None else bad_in_a_row) >= self.max_bad_steps:
            raise TrainingError(
                f"The loss or the gradient was not finite in {self.max_bad_steps} consecutive optimizer steps; none of "
                "them changed the weights. Lower training.learning_rate, and check the data."
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the counts and the window."""
        return {"counts": self.counts, "recent": self._recent}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore saved counts and window. Raises ValueError if they have another shape."""
        if state["counts"].shape != self.counts.shape or state["recent"].shape != self._recent.shape:
            raise ValueError(f"the shapes are {state['counts'].shape} and {state['recent'].shape}.")
        self.counts.copy_(state["counts"])
        self._recent.copy_(state["recent"])
