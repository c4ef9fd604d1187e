"""Creates the Accelerator of a process, and refuses one with which a launch would silently not be one run."""

from __future__ import annotations

import os
from operator import attrgetter

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from fundamentallm.distributed import launch_checks as checks
from fundamentallm.distributed.host_group import join_group
from fundamentallm.distributed.prepare import NARROW
from fundamentallm.errors import ConfigError, FundamentaLLMError, Problem

ENGINES = ("DEEPSPEED", "MEGATRON_LM", "XLA")
REFUSED: dict[str, tuple[object, str]] = {
    "gradient_accumulation_steps": (1, "Set training.micro_batch_size: accumulation follows from it."),
    "device_placement": (True, "The Trainer moves the model and its batches to the device."),
    "step_scheduler_with_optimizer": (True, "The Trainer steps the schedule after every optimizer step."),
    "dataloader_config.data_seed": (None, "The order of samples follows from training.seed."),
}
"""{argument of a caller's Accelerator: (default, advice)}: with another value, the caller would expect another run."""
kept_groups: list[object] = []
"""Keeps process groups alive until `Trainer.leave_group`. Otherwise DDP is their last owner, and torch 2.13 destroys
them while holding the GIL, which can deadlock with a gloo thread that is freeing a tensor (seen at exit in about 1 of
10 runs on a busy machine)."""


def create_accelerator(
    mixed_precision: str | None = None,
    batch_size: int | None = None,
    trackers: list[str] | None = None,
    output_dir: str | None = None,
) -> Accelerator:
    """Creates the Accelerator of this process. Call it before anything else that uses accelerate or asks for the rank.

    Args:
        mixed_precision: `training.mixed_precision`; None: no.
        batch_size: sequences per optimizer step, over all processes; None: not known yet.
        trackers: accelerate's names of the trackers that get the log lines (`log_with`).
        output_dir: folder for the files of trackers.

    Raises:
        ConfigError: listing what the launcher was asked for that contradicts the config or is not supported, and
            trackers that are unknown or not installed.

    Examples:
        >>> from fundamentallm import create_accelerator
        >>> accelerator = create_accelerator(batch_size=32)  # give it to the Trainer
        >>> accelerator.num_processes, accelerator.is_main_process
        (1, True)
    """
    launch = checks.find_launch() if "ACCELERATE_MIXED_PRECISION" in os.environ else None  # set by accelerate launch
    # Without cpu=True on a machine without an accelerator, two launched processes would be two independent runs.
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    cpu, precision = cpu or (launch is not None and launch.use_cpu), mixed_precision or "no"
    problems = checks.launch_problems(os.environ, not cpu, precision, launch)
    problems += checks.tracker_problems(trackers or [])
    # Before accelerate advises to install an engine that is refused afterwards.
    problems += _engine_problems([name for name in ENGINES if parse_flag_from_env(f"ACCELERATE_USE_{name}")])
    # Before an Accelerator is made: its precision is that of the process, also for the next try.
    problems += checks.precision_problems("training.mixed_precision", precision, precision, on_cpu=cpu)
    if is_initialized() and (used := AcceleratorState().mixed_precision) != precision:
        reason = f"but an earlier Trainer or Accelerator of this process uses {used!r}"
        advice = "A process has one precision: start another (in a notebook, restart the kernel), or use the same."
        problems.append(Problem("training.mixed_precision", precision, used, advice, reason))
    if problems:
        raise ConfigError(problems)
    join_group(cpu)
    # Gradients lie in the buffers that are exchanged, instead of beside them.
    data_parallel = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    project = ProjectConfiguration(output_dir, output_dir and os.path.join(output_dir, "tensorboard"))
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=precision,
            kwargs_handlers=[data_parallel],
            log_with=trackers or None,
            project_config=project,
        )
    except (ValueError, ImportError) as error:  # such as parallel sizes that do not multiply to num_processes
        raise ConfigError(f"accelerate refuses this launch: {error}") from error
    check_accelerator(accelerator, mixed_precision, batch_size)
    return accelerator


def _engine_problems(kinds: list[str]) -> list[Problem]:
    allowed = "MULTI_GPU (accelerate_configs/multi_gpu.yaml), FSDP (fsdp2.yaml or hsdp.yaml)"
    advice = "It would bring a step of its own. (Where torch_xla is installed, accelerate expects a TPU.)"
    setting = "accelerate_config.distributed_type"
    return [Problem(setting, kind, allowed, advice) for kind in kinds if kind in ENGINES]


def check_accelerator(
    accelerator: Accelerator, mixed_precision: str | None = None, batch_size: int | None = None
) -> None:
    """Refuses an Accelerator with which a run would silently not be what its config says.

    It also makes `accelerator.save_state` and `load_state` raise. For the other arguments see `create_accelerator`.

    Raises:
        ConfigError: listing what to change.
    """
    if dist.is_initialized():
        kept_groups.append(dist.group.WORLD)
    kind, precision = accelerator.distributed_type.value, accelerator.mixed_precision
    count, launched = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    given = {name: attrgetter(name)(accelerator) for name in REFUSED}
    problems = [
        Problem(f"Accelerator.{name}", given[name], f"{default}", advice)
        for name, (default, advice) in REFUSED.items()
        if given[name] != default
    ]
    if count != launched:
        advice = "Create it before anything else of accelerate, with cpu=True on a machine without GPUs."
        problems.append(Problem("Accelerator.num_processes", count, f"{launched}, as launched", advice))
    problems += _engine_problems([kind])
    # accelerate silently ignores FSDP on a CPU, and in a process that no launcher started.
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not accelerator.is_fsdp2:
        advice = "Set fsdp_version to 2, and launch it on GPUs (without one: accelerate_configs/cpu_2_processes.yaml)."
        problems.append(Problem("Accelerator.distributed_type", kind, "FSDP (version 2)", advice))
    parallel = accelerator.parallelism_config
    if parallel is not None and parallel.non_data_parallel_size > 1:
        advice = "Use dp_shard_size (FSDP2) for a model that is too large for a device."
        allowed = "tp_size, cp_size and sp_size of 1, since a run is data-parallel"
        problems.append(Problem("accelerate_config.parallelism_config", f"{parallel}", allowed, advice))
    on_cpu = accelerator.device.type == "cpu"
    problems += checks.precision_problems("Accelerator.mixed_precision", precision, mixed_precision, on_cpu=on_cpu)
    if batch_size is not None and batch_size < count:
        reason = f"so that {count - batch_size} of {count} processes would have no sequence in any step"
        advice = "It counts the sequences of all processes; increase it, or launch fewer processes (num_processes)."
        problems.append(Problem("training.batch_size", batch_size, f"at least {count}", advice, reason))
    if problems:
        raise ConfigError(problems)
    if accelerator.is_fsdp2:
        # accelerate's default policy reduces gradients in the precision of the forward pass.
        policy = MixedPrecisionPolicy(param_dtype=NARROW.get(accelerator.mixed_precision), reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    accelerator.register_save_state_pre_hook(_refuse_states)
    accelerator.register_load_state_pre_hook(_refuse_states)


def _refuse_states(*_: object) -> None:
    raise FundamentaLLMError(
        "accelerator.save_state and load_state do not know the state of a run, and use pickle. Use "
        "trainer.save_checkpoint and trainer.load_checkpoint."
    )


def leave_group(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Leaves the process group for good. Returns the model without the wrapper that exchanged its gradients."""
    # DDP must not be the last owner of the group (see `kept_groups`), and a group that is left to the end of the
    # interpreter aborts it if one of its threads is still at work then.
    model = accelerator.unwrap_model(model)
    accelerator.free_memory()
    kept_groups.clear()
    accelerator.end_training()
    return model
