"""Making and checking the `Accelerator`: every way in which a launch would silently not be one run is an error."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    is_torch_xla_available,
    parse_flag_from_env,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from fundamentallm.distributed.compilation import compile_problems
from fundamentallm.distributed.launch_checks import (
    DEEPSPEED,
    MEGATRON,
    PARALLEL,
    SUPPORTED,
    XLA,
    idle_processes,
    launch_problems,
    parallel_problems,
    tracker_problems,
)
from fundamentallm.distributed.rendezvous import join_group
from fundamentallm.errors import ConfigError

kept_groups: list[object] = []
"""Process groups, kept until `Trainer.leave_group`, or as long as the interpreter. DistributedDataParallel would else
be the last to hold one, and torch 2.13 then destroys it with the interpreter locked: it waits for gloo's threads, and
one of them, still letting go of a tensor of ours, for the interpreter. (Seen in one of some ten runs on a busy machine,
at their very end.)"""


def create_accelerator(
    mixed_precision: str | None = None,
    batch_size: int | None = None,
    compiles: bool | None = None,
    trackers: list[str] | None = None,
    output_dir: str | None = None,
) -> Accelerator:
    """The Accelerator of this process; the first thing a program makes, before anything asks for its rank.

    Args:
        mixed_precision: what the config says; None: nothing.
        batch_size: sequences per optimizer step, over all processes; None: not known yet.
        compiles: `training.compile`; None: not set.
        trackers: that get the log lines too, by accelerate's names (`log_with`).
        output_dir: whose folder tensorboard writes to.

    Raises:
        ConfigError: listing trackers that are not installed, and whatever the launcher was asked for that contradicts
            our settings, is not supported, or would not be had (see `launch_problems` and `check_accelerator`).

    Examples:
        >>> from fundamentallm import create_accelerator
        >>> accelerator = create_accelerator(batch_size=32)  # give it to the Trainer
        >>> accelerator.num_processes, accelerator.is_main_process
        (1, True)
    """
    # Without cpu=True on a machine without an accelerator, two launched processes would be two independent runs.
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    problems = launch_problems(os.environ, not cpu, mixed_precision, batch_size)
    if is_torch_xla_available():
        problems.append(f"torch_xla is installed, which accelerate takes for a TPU; uninstall it: {XLA}")
    problems += tracker_problems(trackers or [])
    if problems:
        raise ConfigError(problems)
    join_group(cpu)
    # Gradients lie in the buffers that are exchanged, rather than once more beside them.
    data_parallel = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed_precision,
        kwargs_handlers=[data_parallel],
        log_with=trackers or None,
        project_config=ProjectConfiguration(output_dir, output_dir and os.path.join(output_dir, "tensorboard")),
    )
    check_accelerator(accelerator, mixed_precision, batch_size, compiles)
    return accelerator


def check_accelerator(
    accelerator: Accelerator,
    mixed_precision: str | None = None,
    batch_size: int | None = None,
    compiles: bool | None = None,
) -> None:
    """Refuse an Accelerator with which a run would silently not be what its config says.

    Args:
        accelerator: made already.
        mixed_precision: what the config says; None: nothing.
        batch_size: sequences per optimizer step, over all processes; None: not known yet.
        compiles: `training.compile`; None: not set.

    Raises:
        ConfigError: listing what to change.
    """
    if dist.is_initialized():
        kept_groups.append(dist.group.WORLD)
    launched, problems = int(os.environ.get("WORLD_SIZE", "1")), []
    if accelerator.num_processes != launched:
        problems.append(
            f"{launched} processes were launched and the Accelerator has {accelerator.num_processes}; make it before "
            "anything else of accelerate, with cpu=True where there is no GPU (create_accelerator does both)."
        )
    problems += _kind_problems(accelerator)
    if accelerator.gradient_accumulation_steps != 1:
        problems.append(
            f"the Accelerator's gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}; allowed: 1. "
            "Set training.micro_batch_size instead: accumulation follows from it."
        )
    if mixed_precision not in (None, accelerator.mixed_precision):
        problems.append(
            f"training.mixed_precision is {mixed_precision!r} and the Accelerator's is "
            f"{accelerator.mixed_precision!r}; set one of them, or both alike."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        problems.append("mixed_precision is 'fp16', which accelerate computes as fp32 on a CPU; use no or bf16.")
    problems += compile_problems(accelerator, compiles)
    problems += idle_processes(batch_size, accelerator.num_processes)
    if problems:
        raise ConfigError(problems)
    if accelerator.is_fsdp2:
        # accelerate's default policy reduces gradients in the precision of the forward pass.
        computed_in = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        policy = MixedPrecisionPolicy(param_dtype=computed_in, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def _kind_problems(accelerator: Accelerator) -> list[str]:
    """What is wrong with how an Accelerator would use its processes."""
    kind, parallel = accelerator.distributed_type, accelerator.parallelism_config
    why = {DistributedType.DEEPSPEED: DEEPSPEED, DistributedType.MEGATRON_LM: MEGATRON, DistributedType.XLA: XLA}
    problems = [f"the Accelerator's distributed_type is {kind.value}; {SUPPORTED}: {why[kind]}"] if kind in why else []
    # accelerate itself forgets it on a CPU, and on a process that no launcher started.
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not accelerator.is_fsdp2:
        problems.append(
            f"FSDP was asked for and the Accelerator's distributed_type is {kind.value}; set fsdp_version to 2, and "
            "start the run by accelerate launch or torchrun, on a machine with accelerators."
        )
    if parallel is not None:
        problems += parallel_problems({name: getattr(parallel, f"{name}_size") for name in PARALLEL})
    return problems
