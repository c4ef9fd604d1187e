"""Making and checking the `Accelerator`: every way in which a launch would silently not be one run is an error."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

from fundamentallm.errors import ConfigError

kept_groups: list[object] = []
"""Process groups, kept until `Trainer.leave_group`, or as long as the interpreter. DistributedDataParallel would else
be the last to hold one, and torch 2.13 then destroys it with the interpreter locked: it waits for gloo's threads, and
one of them, still letting go of a tensor of ours, for the interpreter. (Seen in one of some ten runs on a busy machine,
at their very end.)"""


def create_accelerator(mixed_precision: str | None = None) -> Accelerator:
    """The Accelerator of this process; the first thing a program makes, before anything asks for its rank.

    Raises:
        ConfigError: if the processes that were launched would not form one group, the accelerate config asks
            for another precision, or the device lacks the precision.
    """
    # Without cpu=True on a machine without an accelerator, two launched processes would be two independent runs.
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    # `accelerate launch` says "no" where nobody said anything, so only another precision can contradict ours.
    if mixed_precision is not None and launched not in ("no", mixed_precision):
        raise ConfigError(
            f"training.mixed_precision is {mixed_precision!r} and mixed_precision in the accelerate config is "
            f"{launched!r}; set one of them, or both alike."
        )
    if cpu:
        _join_restarted_group()
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision)
    check_accelerator(accelerator, mixed_precision)
    return accelerator


def check_accelerator(accelerator: Accelerator, mixed_precision: str | None = None) -> None:
    """Refuse an Accelerator with which a run would silently not be what its config says.

    Args:
        accelerator: made already.
        mixed_precision: what the config says; None: nothing.

    Raises:
        ConfigError: saying what to change.
    """
    if dist.is_initialized():
        kept_groups.append(dist.group.WORLD)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched and the Accelerator has {accelerator.num_processes}; make it before "
            "anything else of accelerate, with cpu=True where there is no GPU (create_accelerator does both)."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"the Accelerator's gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}; allowed: 1. "
            "Set training.micro_batch_size instead: accumulation follows from it."
        )
    if mixed_precision not in (None, accelerator.mixed_precision):
        raise ConfigError(
            f"training.mixed_precision is {mixed_precision!r} and the Accelerator's is "
            f"{accelerator.mixed_precision!r}; set one of them, or both alike."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("mixed_precision is 'fp16', which accelerate computes as fp32 on a CPU; use no or bf16.")


def _join_restarted_group() -> None:
    """After a restart by the launcher (`--max_restarts`), form the gloo group under keys of its own.

    The launcher's store outlives the processes, and torch 2.13 would find the addresses of the dead there.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt == 0 or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size=None if of_launcher else world,
        is_master=rank == 0 and not of_launcher,
    )
    own = dist.PrefixStore(f"attempt_{attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=own, rank=rank, world_size=world)


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the CPU's and the device's default generators."""
    torch.default_generator.manual_seed(seed)  # 1.4 us; torch.manual_seed was measured at 916 us
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
