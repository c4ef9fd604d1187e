"""Which optimizer steps must not be taken: those that are not finite, and on request spikes."""

from __future__ import annotations

import torch
from torch import Tensor

from fundamentallm.errors import TrainingError

WINDOW = 128
"""Steps that a spike is measured against."""
FEWEST = 32
"""Steps that have to be known before any is called a spike."""
LEAST_DEVIATION = 1e-3
"""Of the median: where more than half of the window is alike, not everything above it is a spike."""
MAD_TO_STD = 1.4826
"""Standard deviation of normal numbers over their median absolute deviation."""


class Guard:
    """Says of each step, before the optimizer uses it, whether to leave it out; the host never waits for the answer.

    A step whose loss or gradient is not finite is bad. Once `max_bad_steps` came in a row, every later one counts
    as bad too: the run stands still until the host next looks, so that where it ends depends on no interval.

    A step whose loss or gradient norm lies more than `skip_spikes_above` robust standard deviations above the
    median of the last `WINDOW` steps is a spike. (Median and median absolute deviation, since the mean and the
    standard deviation follow the very outliers to be found: Leys et al., J. Exp. Soc. Psychol. 49, 2013.) Spikes
    enter the window, so that a lasting change of level is followed rather than skipped for ever.

    Args:
        device: of the losses.
        max_bad_steps: bad steps in a row after which nothing is trusted any more.
        skip_spikes_above: robust z-score, in standard deviations; None: nothing is a spike.
    """

    def __init__(self, device: torch.device, max_bad_steps: int, skip_spikes_above: float | None = None) -> None:
        self.max_bad_steps, self.skip_spikes_above = max_bad_steps, skip_spikes_above
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # bad in a row until now, bad in all, spikes
        self._in_a_row, self._in_all, self._spikes = self.counts.unbind()  # views of it
        self._recent = torch.full((2, WINDOW), torch.nan, device=device)  # loss and norm; NaN: none yet

    def skips(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether to leave `step` out (a boolean scalar), given its mean loss and gradient norm (scalars)."""
        # In as few operations as will do: on a tiny model each is a thousandth of the step.
        stands_still = self._in_a_row >= self.max_bad_steps
        both = loss + norm
        bad = (both - both != 0) | stands_still  # what is not finite, less itself, is NaN
        self._in_a_row.add_(1).mul_(bad)
        self._in_all.add_(bad > stands_still)
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
        """The counts and the window."""
        return {"counts": self.counts, "recent": self._recent}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from saved counts. Raises ValueError if they are those of another guard."""
        if state["counts"].shape != self.counts.shape or state["recent"].shape != self._recent.shape:
            raise ValueError(f"the shapes are {state['counts'].shape} and {state['recent'].shape}.")
        self.counts.copy_(state["counts"])
        self._recent.copy_(state["recent"])
