"""Checks that all processes of a run were given the same: they would train on, each on something else."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fundamentallm.config.schema import flat_settings
from fundamentallm.data.datasets import fingerprint
from fundamentallm.data.listed_order import global_states, unwrapped
from fundamentallm.data.streams import is_stream
from fundamentallm.distributed.batches import digest_of
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import ConfigError, Problem

OF_ONE_MACHINE = {
    *("output_dir", "trackers", "tracker_options", "model.init_from", "model.pretrained"),
    *("data.source", "data.validation_source", "data.tokenizer", "data.cache_dir", "data.num_workers"),
    *("training.checkpoint_dir", "training.resume", "training.peak_tflops"),
}
"""Settings that may differ between processes: folders of a machine, and what its hardware allows."""


def check_alike(
    group: HostGroup, config: dict[str, Any], optimizer: Optimizer | None, **loaders: DataLoader[Any] | None
) -> None:
    """Compares settings, a caller's optimizer, and the size and a few samples of each dataset over all processes.

    Raises:
        ConfigError: on all processes, naming what differs.
    """
    if group.size == 1:
        return
    given = {name: repr(value) for name, value in flat_settings(config).items() if name not in OF_ONE_MACHINE}
    given["optimizer"] = repr(optimizer)
    for name, loader in loaders.items():
        given[name] = "given" if loader is not None else "not given"
        if loader is not None:
            sampler, batch_size, drop_last = unwrapped(loader)
            batches = f"batch_size={batch_size}, drop_last={drop_last}, sampler={type(sampler).__name__}"
            given[f"the batches of {name}"] = batches
        if loader is not None and not is_stream(loader.dataset):  # `make_samplers` compares the beginning of a stream
            given[f"the number of samples of {name}"] = str(len(loader.dataset))  # type: ignore[arg-type]
            given[f"the content of {name}"] = fingerprint(loader.dataset) or _sampled(loader)
    first, *others = group.all_gather(given)
    problems = {
        name: Problem(name, text=f"{other[name]} on process {rank}", allowed=f"{first[name]}, as on process 0")
        for rank, other in reversed(list(enumerate(others, start=1)))
        for name in first.keys() & other.keys()
        if first[name] != other[name] and "" not in (first[name], other[name])
    }
    if problems:
        raise ConfigError([problems[name] for name in first if name in problems])


def _sampled(loader: DataLoader[Any]) -> str:
    """Returns the digest of the first, middle and last sample, or "" if they are others each time."""
    try:
        first, second = _digest(loader), _digest(loader)
    except Exception:  # the first batch will raise it, unless this dataset takes no single index
        return ""
    return first if first == second else ""


def _digest(loader: DataLoader[Any]) -> str:
    dataset: Any = loader.dataset
    places = sorted({0, len(dataset) // 2, len(dataset) - 1})
    with global_states(0):
        get = getattr(dataset, "__getitems__", lambda indices: [dataset[index] for index in indices])
        return digest_of(loader.collate_fn(get(places)))
