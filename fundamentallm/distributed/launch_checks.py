"""Checks of what a launcher, or a caller's Accelerator, asks for and a run would silently not do.

accelerate's launcher turns its YAML and flags (`accelerate_config` in the problems) into environment variables. They
are checked before `Accelerator()` reads them, since it fails over missing packages and ignores FSDP on a CPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from operator import attrgetter
from typing import NamedTuple

import psutil
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from fundamentallm.config.registry import not_one_of
from fundamentallm.errors import Problem

PRECISIONS = ("no", "bf16", "fp16")
ENGINES = {
    "DEEPSPEED": "DeepSpeed steps the optimizer inside backward, out of reach of a run's clipping, guard and schedule.",
    "MEGATRON_LM": "Megatron-LM brings its own model, optimizer and loop.",
    "XLA": "TPUs are not supported, and accelerate takes a machine with torch_xla for one: uninstall it.",
}
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
    "project_configuration.automatic_checkpoint_naming": (False, "Set training.keep_last_n."),
}
"""{argument of a caller's Accelerator: (default, advice)}: with another value, the caller would expect another run. The
order of samples of `split_batches=True` and `even_batches=False` is what a Trainer does anyway."""


class Launch(NamedTuple):
    """What the `accelerate launch` that started this process was asked for."""

    config_file: str | None = None  # the accelerate config that it read, if any
    use_cpu: bool = False
    num_processes: int = 1


def find_launch() -> Launch | None:
    """Returns the `accelerate launch` that started this process, or None if another program did.

    accelerate passes neither the name of its config file on, nor `use_cpu` to the processes of MULTI_GPU and FSDP, nor
    a number of processes that it does not start. So they are taken from the launcher's command line.
    """
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file  # 50 ms
    from accelerate.commands.launch import launch_command_parser

    with suppress(psutil.Error):  # of another user's process
        for process in psutil.Process().parents():
            _, *arguments = LAUNCHER.split("\0".join(process.cmdline()), maxsplit=1)
            if not arguments:
                continue
            asked = launch_command_parser().parse_args(arguments[0].split("\0"))
            file = asked.config_file and os.path.join(process.cwd(), asked.config_file)
            if file is None and os.path.isfile(default_config_file) and not asked.cpu:
                file = default_config_file
            if file is None:
                return Launch(None, asked.cpu, asked.num_processes or 1)
            config = load_config_from_file(file)
            return Launch(file, asked.cpu or config.use_cpu, asked.num_processes or config.num_processes)
    return None


def launch_problems(
    environment: Mapping[str, str], has_device: bool, mixed_precision: str | None = None, launch: Launch | None = None
) -> list[Problem]:
    """Returns what a launch, by its environment variables, asks for that is not supported or would not happen."""
    engines = [name for name in ENGINES if environment.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1")]
    problems = [engine_problem(name) for name in engines]
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no":  # which `accelerate launch` sets by default
        where = f" of {launch.config_file}" if launch is not None and launch.config_file else ""
        problems += precision_problems("accelerate_config.mixed_precision", launched, mixed_precision or "no", where)
    if launch is None:
        return problems
    is_one = not any(name in environment for name in WORLD_SIZES)
    on_cpu = launch.use_cpu or environment.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if is_one and launch.num_processes > 1:
        advice = (
            "For several on a CPU, use MULTI_GPU with use_cpu: true, as accelerate_configs/cpu_2_processes.yaml does. "
            "For one, set num_processes and num_machines to 1."
        )
        reason = "and accelerate launch starts one process for MULTI_CPU, for --cpu and for NO"
        problems.append(Problem("accelerate_config.num_processes", launch.num_processes, "1", advice, reason))
    elif not (has_device or on_cpu) and (launch.config_file or not is_one):  # otherwise nothing asks for a GPU
        advice = "Set it if the run is meant for the CPU (--cpu for one process); otherwise check the driver and torch."
        reason = f"in {launch.config_file or 'the launch'}, and torch finds no GPU on this machine"
        problems.append(Problem("accelerate_config.use_cpu", False, "true", advice, reason))
    return problems


def engine_problem(name: str) -> Problem:
    """Returns the problem with a distributed_type that is not supported."""
    allowed = "MULTI_GPU (accelerate_configs/multi_gpu.yaml), FSDP (fsdp2.yaml or hsdp.yaml)"
    return Problem("accelerate_config.distributed_type", name, allowed, ENGINES[name])


def precision_problems(setting: str, value: str, wanted: str | None, where: str = "") -> list[Problem]:
    """Returns the problem with a mixed precision that is not supported, or is not the config's (`wanted`), if any."""
    if value not in PRECISIONS:
        return [Problem(setting, value, ", ".join(PRECISIONS))]
    if wanted in (None, value):
        return []
    advice = "The run's config decides: set it there, and leave the other out."
    return [Problem("training.mixed_precision", wanted, value, advice, f"but {setting}{where} is {value!r}")]


def device_problems(precision: str | None, device_type: str) -> list[Problem]:
    """Returns the problem of a precision in which a device does not compute, if it is one."""
    if (precision, device_type) != ("fp16", "cpu"):
        return []
    return [Problem("training.mixed_precision", "fp16", "no, bf16", "On a CPU, accelerate computes fp16 as fp32.")]


def tracker_problems(names: list[str]) -> list[Problem]:
    """Returns the trackers that accelerate does not know or would leave out, at most with a warning."""
    known, installed = sorted({*map(str, LoggerType)} - {"all"}), set(map(str, get_available_trackers()))
    missing = [name for name in names if name in known and name not in installed]
    return [not_one_of("trackers", name, known) for name in names if name not in known] + [
        Problem("trackers", name, "", f"Run: pip install {name}", "which is not installed") for name in missing
    ]


def option_problems(accelerator: Accelerator) -> list[Problem]:
    """Returns the options of a caller's Accelerator with which it would expect another run."""
    values = {name: attrgetter(name)(accelerator) for name in REFUSED}
    return [
        Problem(f"Accelerator.{name}", values[name], f"{default}", advice)
        for name, (default, advice) in REFUSED.items()
        if values[name] != default
    ]
