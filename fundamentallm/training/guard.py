"""Decides on the device which optimizer steps to skip, and undoes what a skipped step did to buffers."""

import logging
from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fundamentallm.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)

WINDOW = 128  # steps that a spike is measured against
FEWEST = 32  # of them, before a step can be a spike
LEAST_DEVIATION = 1e-3  # of the median; otherwise any value above a window of equal ones is a spike
MAD_TO_STD = 1.4826  # of normally distributed numbers
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MAX_NAMES_SHOWN = 5  # in a message


class Guard(nn.Module):
    """Decides whether to skip a step before the optimizer takes it. The host does not wait for the answer.

    A step is bad if its loss or gradient is not finite. After `max_bad_steps` bad steps in a row, every later one
    counts as bad too, so that the final weights do not depend on when the host sees it, at the next log line.

    A step is a spike if its loss or gradient norm is more than `skip_spikes_above` robust standard deviations above the
    median of the last `WINDOW` steps. (Median and median absolute deviation, which outliers do not move: Leys et al.,
    J. Exp. Soc. Psychol. 49, 2013.) Spikes enter the window too, so that a lasting change of level is accepted.
    """

    def __init__(self, device: torch.device, max_bad_steps: int, skip_spikes_above: float | None = None) -> None:
        super().__init__()  # a module, whose buffers are its state
        self.max_bad_steps, self.skip_spikes_above = max_bad_steps, skip_spikes_above
        self.counts = nn.Buffer(torch.zeros(3, dtype=torch.int64, device=device))  # bad in a row, all bad, spikes
        self._in_a_row, self._in_all, self._spikes = self.counts.unbind()  # views
        self.recent = nn.Buffer(torch.full((2, WINDOW), torch.nan, device=device))  # loss and norm; NaN: no step yet

    def skips(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Returns whether to skip `step` (a boolean scalar), given its mean loss and gradient norm (scalars)."""
        has_stopped = self._in_a_row >= self.max_bad_steps
        both = loss + norm
        bad = (both - both != 0) | has_stopped  # as ~isfinite(), which takes three kernels more
        self._in_a_row.add_(1).mul_(bad)
        self._in_all.add_(bad & ~has_stopped)
        if self.skip_spikes_above is None:
            return bad
        spike = self._is_spike(step, torch.stack((loss.float(), norm.float())), self.skip_spikes_above) & ~bad
        self._spikes.add_(spike)
        return bad | spike

    def _is_spike(self, step: int, values: Tensor, threshold: float) -> Tensor:
        median = self.recent.nanmedian(dim=1).values
        spread = (self.recent.T - median).abs().nanmedian(dim=0).values * MAD_TO_STD
        deviation = spread.maximum(LEAST_DEVIATION * median.abs())
        known = (~self.recent.isnan()).sum(dim=1) >= FEWEST
        is_above = values - median > threshold * deviation
        slot = self.recent[:, step % WINDOW]
        slot.copy_(values.where(values.isfinite(), slot))
        return (is_above & known).any()

    def raise_if_stopped(self) -> None:
        """Raises TrainingError if `max_bad_steps` steps in a row were bad. The host waits for the device."""
        if int(self._in_a_row) >= self.max_bad_steps:
            what = f"Loss or gradient was not finite in {self.max_bad_steps} consecutive steps. None changed a weight."
            raise TrainingError(f"{what} Lower training.learning_rate, and check the data.")


def copied_buffers(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Returns module, name, buffer and a copy of it for each buffer but expanded ones, which cannot be written to."""
    return [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module.named_buffers(recurse=False)
        if all(buffer.stride())
    ]


class ModelGuard:
    """Undoes what a skipped step did to buffers, and names in the first step what makes a run depend on its layout.

    `model` is the module with its loss, as `prepare_model` returned it.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        self.accelerator, self.model = accelerator, accelerator.unwrap_model(model)
        # All processes read it, as a sharded model requires. A loss and its buffers are not saved.
        self._saved = {name for name in self.model.state_dict() if name.startswith("model.")}
        self._with_buffers = [module for module in self.model.modules() if list(module.buffers(recurse=False))]
        self._before: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self._is_checked = False
        self._needed: list[str] = []  # parameters whose gradients DistributedDataParallel waits for
        self.reached: set[str] = set()  # those that got one from the present micro-batch
        ddp = accelerator.ddp_handler
        finds_unused = ddp is not None and (ddp.find_unused_parameters or ddp.static_graph)
        if accelerator.num_processes > 1 and not accelerator.is_fsdp2 and not finds_unused:
            self._watch_gradients()

    def _watch_gradients(self) -> None:
        reached = self.reached  # a hook that held a parameter would be a reference cycle
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self._needed.append(name)
                note = lambda _, name=name: reached.add(name)  # noqa: E731
                parameter.register_post_accumulate_grad_hook(note)

    def begin(self) -> None:
        """Copies the buffers, any of which the step may change."""
        self._before = copied_buffers(self._with_buffers)

    def check(self, num_micro_batches: int) -> None:
        """Checks the model after the backward pass of a step. The host waits for the device in the first step only.

        Raises:
            ConfigError: if DistributedDataParallel would wait for the gradient of a parameter that got none from the
                last micro-batch, after which gradients are exchanged.
        """
        if unused := [name for name in self._needed if name not in self.reached]:
            raise ConfigError(
                f"{_listed(unused)}: no gradient from the last micro-batch, after which processes exchange them. "
                "Freeze parameters without a part in the loss (training.parameter_groups), or give the Trainer an "
                "Accelerator with kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]."
            )
        if not self._is_checked and self.accelerator.is_main_process:
            self._warn(num_micro_batches)
        self._is_checked = True

    def _warn(self, num_micro_batches: int) -> None:
        """Warns of buffers that the step has changed, and of layers that normalise over a batch."""
        paths = {module: path for path, module in self.model.named_modules()}
        changed = [(module, name) for module, name, before, now in self._buffers() if not torch.equal(before, now)]
        unsaved = [f"{paths[module]}.{name}" for module, name in changed]
        if unsaved := [name for name in unsaved if name not in self._saved]:
            what = "Training changes buffers that no checkpoint holds: %s. Register them with persistent=True."
            logger.warning(what, _listed(unsaved))
        norms = [module for module in paths if isinstance(module, BATCH_NORMS) and module.training]
        layers = dict.fromkeys([*norms, *(module for module, _ in changed)])
        if num_micro_batches == 1:  # SyncBatchNorm then uses the statistics of all processes
            layers = {module: None for module in layers if not isinstance(module, nn.SyncBatchNorm)}
        if layers and (num_micro_batches > 1 or self.accelerator.num_processes > 1):
            names = _listed([f"{paths[module]} ({type(module).__name__})" for module in layers])
            what = "The loss curve depends on micro_batch_size and on the processes: %s normalise over a micro-batch."
            logger.warning(f"{what} LayerNorm and GroupNorm do not.", names)

    @torch.no_grad()
    def end(self, skip: Tensor) -> None:
        """Sets the buffers back if the step was skipped (`skip`, a boolean scalar)."""
        for _, _, before, buffer in self._buffers():
            buffer.copy_(before.where(skip, buffer))

    def _buffers(self) -> Iterator[tuple[nn.Module, str, Tensor, Tensor]]:
        """Yields each buffer before and after the step, except for those that grew or went away, as a cache does."""
        for module, name, _, before in self._before:
            buffer = getattr(module, name)
            if buffer is not None and buffer.shape == before.shape:
                yield module, name, before, buffer


def _listed(names: list[str]) -> str:
    shown = [name.removeprefix("model.") for name in names[:MAX_NAMES_SHOWN]]  # not of the module with loss
    return ", ".join([*shown, "..."] if len(names) > len(shown) else shown)
