"""Checks of what a launcher asks for and a run would silently not do.

accelerate's launcher turns its YAML and flags (`accelerate_config` in the problems) into environment variables, which
are checked before `Accelerator()` reads them.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

import psutil
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from fundamentallm.config.registry import not_one_of
from fundamentallm.errors import Problem

PRECISIONS = ("no", "bf16", "fp16")
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables by which launchers, and MPI, give the number of processes."""
LAUNCHER = re.compile(
    r"(?:^|[\0/])(?:accelerate-launch|accelerate\.commands\.launch|accelerate(?:\.commands\.accelerate_cli)?\0launch)\0"
)
"""`accelerate launch` in a command line whose words are separated by null characters."""


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
    environment: Mapping[str, str], has_device: bool, precision: str = "no", launch: Launch | None = None
) -> list[Problem]:
    """Returns what a launch, by its environment variables, asks for that would not happen."""
    problems, file = [], launch and launch.config_file
    launched, where = environment.get("ACCELERATE_MIXED_PRECISION", "no"), f"in {file or 'the launch'}"
    if launched != "no":  # which `accelerate launch` sets by default
        problems += precision_problems("accelerate_config.mixed_precision", launched, precision, where)
    if launch is not None and launch.num_processes > 1 and environment.keys().isdisjoint(WORLD_SIZES):
        advice = "For several on a CPU, use MULTI_GPU with use_cpu: true, as accelerate_configs/cpu_2_processes.yaml."
        reason = "and accelerate launch starts one process for MULTI_CPU, for --cpu and for NO"
        return [*problems, Problem("accelerate_config.num_processes", launch.num_processes, "1", advice, reason)]
    on_cpu = has_device or environment.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if launch is None or launch.use_cpu or on_cpu or not (file or "WORLD_SIZE" in environment):
        return problems  # nothing asks for a GPU, or there is one
    advice = "Set it if the run is meant for the CPU (--cpu for one process); otherwise check the driver and torch."
    reason = f"{where}, and torch finds no GPU on this machine"
    return [*problems, Problem("accelerate_config.use_cpu", False, "true", advice, reason)]


def precision_problems(
    setting: str, value: str, wanted: str | None, reason: str = "", on_cpu: bool = False
) -> list[Problem]:
    """Returns the problem with a mixed precision that is not supported, or is not the config's (`wanted`), if any."""
    if value == "fp16" and on_cpu:
        return [Problem(setting, value, "no, bf16", "On a CPU, accelerate computes fp16 as fp32.")]
    if value in PRECISIONS and wanted in (None, value):
        return []
    advice = "The run's config decides (training.mixed_precision): set it there, and leave the other out."
    return [Problem(setting, value, wanted or ", ".join(PRECISIONS), advice, reason)]


def tracker_problems(names: list[str]) -> list[Problem]:
    """Returns the trackers that accelerate does not know or would leave out, at most with a warning."""
    known, installed = sorted({*map(str, LoggerType)} - {"all"}), set(map(str, get_available_trackers()))
    missing = [name for name in names if name in known and name not in installed]
    return [not_one_of("trackers", name, known) for name in names if name not in known] + [
        Problem("trackers", name, "", f"Run: pip install {name}", "which is not installed") for name in missing
    ]
