"""Creates the Accelerator of a process, and refuses a launch or an Accelerator that would silently be another run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from operator import attrgetter
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from fundamentallm.distributed.host_group import join_group
from fundamentallm.distributed.prepare import NARROW
from fundamentallm.errors import ConfigError, FundamentaLLMError, Problem, raise_all

ENGINES = ("DEEPSPEED", "MEGATRON_LM", "XLA")
PRECISIONS = ("no", "bf16", "fp16")
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables by which launchers, and MPI, give the number of processes."""
LAUNCHER = re.compile(
    r"(?:^|[\0/])(?:accelerate-launch|accelerate\.commands\.launch|accelerate(?:\.commands\.accelerate_cli)?\0launch)\0"
)
"""`accelerate launch` in a command line whose words are separated by null characters."""
REFUSED: dict[str, tuple[object, str]] = {
    "gradient_accumulation_steps": (1, "Set training.micro_batch_size: accumulation follows from it."),
    "device_placement": (True, "The Trainer moves the model and its batches to the device."),
    "step_scheduler_with_optimizer": (True, "The Trainer steps the schedule after every optimizer step."),
    "dataloader_config.data_seed": (None, "The order of samples follows from training.seed."),
}
"""{argument of a caller's Accelerator: (default, advice)}: with another value, the caller would expect another run."""
kept_groups: list[object] = []
"""Keeps process groups alive until `leave_group`. Otherwise DDP is their last owner, and torch 2.13 destroys them while
holding the GIL, which can deadlock with a gloo thread that is freeing a tensor (1 of 10 exits on a busy machine)."""


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
    launch = find_launch() if "ACCELERATE_MIXED_PRECISION" in os.environ else None  # set by accelerate launch
    # Without cpu=True on a machine without an accelerator, two launched processes would be two independent runs.
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    cpu, precision = cpu or (launch is not None and launch.use_cpu), mixed_precision or "no"
    problems = launch_problems(os.environ, not cpu, precision, launch)
    # Before accelerate advises to install an engine that is refused afterwards.
    problems += [_engine_problem(name) for name in ENGINES if parse_flag_from_env(f"ACCELERATE_USE_{name}")]
    # Before an Accelerator is made: its precision is that of the process, also for the next try.
    problems += _precision_problems("training.mixed_precision", precision, precision, is_on_cpu=cpu)
    if is_initialized():
        reason, used = "in an earlier Trainer or Accelerator of this process", AcceleratorState().mixed_precision
        problems += _precision_problems("Accelerator.mixed_precision", used, precision, reason)
    installed = sorted(map(str, get_available_trackers()))
    for name in (name for name in trackers or () if name not in installed):  # accelerate would leave it out
        advice = f"If accelerate knows a tracker of this name: pip install {name}."
        problems.append(Problem("trackers", name, ", ".join(installed), advice))
    raise_all(problems)
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


class Launch(NamedTuple):
    """What the `accelerate launch` that started this process was asked for."""

    config_file: str | None = None  # the accelerate config that it read, if any
    use_cpu: bool = False
    num_processes: int = 1


def find_launch() -> Launch | None:
    """Returns the `accelerate launch` that started this process, from its command line; None: another program did.

    accelerate passes neither the name of its config file on, nor `use_cpu` to the processes of MULTI_GPU and FSDP, nor
    a number of processes that it does not start.
    """
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file  # 50 ms
    from accelerate.commands.launch import launch_command_parser

    with suppress(psutil.Error):  # of another user's process
        for process in psutil.Process().parents():
            _, *arguments = LAUNCHER.split("\0".join(process.cmdline()), maxsplit=1)
            if not arguments:
                continue
            asked = launch_command_parser().parse_args(arguments[0].split("\0"))
            file = os.path.join(process.cwd(), asked.config_file or default_config_file)
            if asked.config_file is None and (asked.cpu or not os.path.isfile(file)):
                return Launch(None, asked.cpu, asked.num_processes or 1)
            config = load_config_from_file(file)
            return Launch(file, asked.cpu or config.use_cpu, asked.num_processes or config.num_processes)
    return None


def launch_problems(
    environment: Mapping[str, str], has_device: bool, precision: str = "no", launch: Launch | None = None
) -> list[Problem]:
    """Returns what a launch asks for, by variables that accelerate's launcher sets, that would silently not happen."""
    problems, file = [], launch and launch.config_file
    launched, where = environment.get("ACCELERATE_MIXED_PRECISION", "no"), f"in {file or 'the launch'}"
    if launched != "no":  # which `accelerate launch` sets by default
        problems += _precision_problems("accelerate_config.mixed_precision", launched, precision, where)
    if launch is None:
        return problems
    use_cpu = launch.use_cpu or environment.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if launch.num_processes > 1 and environment.keys().isdisjoint(WORLD_SIZES):
        advice = "For several on a CPU, use MULTI_GPU with use_cpu: true, as accelerate_configs/cpu_2_processes.yaml."
        reason = "and accelerate launch starts one process for MULTI_CPU, for --cpu and for NO"
        problems.append(Problem("accelerate_config.num_processes", launch.num_processes, "1", advice, reason))
    elif not (has_device or use_cpu) and (file or "WORLD_SIZE" in environment):
        advice = "Set it if the run is meant for the CPU (--cpu for one process); otherwise check the driver and torch."
        reason = f"{where}, and torch finds no GPU on this machine"
        problems.append(Problem("accelerate_config.use_cpu", False, "true", advice, reason))
    return problems


def _precision_problems(
    setting: str, value: str, wanted: str | None, reason: str = "", is_on_cpu: bool = False
) -> list[Problem]:
    """Returns the problem with a precision that is not supported, or not `wanted`, if any."""
    if value == "fp16" and is_on_cpu:
        return [Problem(setting, value, "no, bf16", "On a CPU, accelerate computes fp16 as fp32.")]
    if value in PRECISIONS and wanted in (None, value):
        return []
    advice = "Set training.mixed_precision only. A process has one precision: another needs a new process or kernel."
    return [Problem(setting, value, wanted or ", ".join(PRECISIONS), advice, reason)]


def _engine_problem(kind: str, reason: str = "") -> Problem:
    allowed = "MULTI_GPU, or FSDP with fsdp_version 2 on GPUs; tp_size, cp_size and sp_size of 1"
    advice = "A run is data-parallel; see accelerate_configs/ (without a GPU: cpu_2_processes.yaml)."
    return Problem("accelerate_config.distributed_type", kind, allowed, advice, reason)


def check_accelerator(
    accelerator: Accelerator, mixed_precision: str | None = None, batch_size: int | None = None
) -> None:
    """Refuses an Accelerator with which a run would silently not be what its config says.

    It also makes `accelerator.save_state` and `load_state` raise. For the other arguments see `create_accelerator`.
    Raises ConfigError, listing what to change.
    """
    if dist.is_initialized():
        kept_groups.append(dist.group.WORLD)
    kind, precision = accelerator.distributed_type.value, accelerator.mixed_precision
    is_on_cpu = accelerator.device.type == "cpu"
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
    # accelerate silently ignores FSDP on a CPU, and in a process that no launcher started.
    is_fsdp1 = parse_flag_from_env("ACCELERATE_USE_FSDP") and not accelerator.is_fsdp2
    parallel = accelerator.parallelism_config
    if kind in ENGINES or is_fsdp1 or (parallel is not None and parallel.non_data_parallel_size > 1):
        problems.append(_engine_problem(kind, f"with {parallel}" if parallel is not None else ""))
    problems += _precision_problems("Accelerator.mixed_precision", precision, mixed_precision, "", is_on_cpu)
    if batch_size is not None and batch_size < count:
        reason = f"so that {count - batch_size} of {count} processes would have no sequence in any step"
        advice = "It counts the sequences of all processes; increase it, or launch fewer processes (num_processes)."
        problems.append(Problem("training.batch_size", batch_size, f"at least {count}", advice, reason))
    raise_all(problems)
    if accelerator.is_fsdp2:
        # accelerate's default policy reduces gradients in the precision of the forward pass.
        policy = MixedPrecisionPolicy(param_dtype=NARROW.get(precision), reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    accelerator.register_save_state_pre_hook(_refuse_states)
    accelerator.register_load_state_pre_hook(_refuse_states)


def _refuse_states(*_: object) -> None:
    advice = "Use trainer.save_checkpoint and trainer.load_checkpoint."
    raise FundamentaLLMError(f"accelerator.save_state and load_state do not know the state of a run. {advice}")


def leave_group(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Leaves the process group for good. Returns the model without the wrapper that exchanged its gradients."""
    # A group that is left to the end of the interpreter aborts it if one of its threads is still at work then.
    model = accelerator.unwrap_model(model)
    accelerator.free_memory()
    kept_groups.clear()
    accelerator.end_training()
    return model
