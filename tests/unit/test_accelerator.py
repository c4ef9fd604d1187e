"""Launches and Accelerators with which a run would silently be another one are refused before the first step."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType, GradientAccumulationPlugin, ParallelismConfig

from fundamentallm import ConfigError, FundamentaLLMError, create_accelerator
from fundamentallm.distributed.accelerator import Launch, check_accelerator, find_launch, launch_problems
from tests.integration.runs import make_config, make_trainer, on_processes

CONFIGS = Path(__file__).parents[2] / "accelerate_configs"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def settings(error: pytest.ExceptionInfo[ConfigError]) -> list[tuple[str, Any]]:
    return [(problem.setting, problem.value) for problem in error.value.problems]  # type: ignore[attr-defined]


# ---- what the launcher asks for --------------------------------------------------------------------------------


def test_launch_problems_of_a_supported_launch_is_empty() -> None:
    environment = {"WORLD_SIZE": "8", "ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_DEEPSPEED": "false"}
    assert launch_problems(environment | FSDP, True, "fp16") == []


def test_create_accelerator_lists_all_problems_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # which accelerate would advise to install
    with pytest.raises(ConfigError) as error:  # accelerate leaves out trackers that are unknown or not installed
        create_accelerator("no", trackers=["tensorboard", "wandbb", "dvclive"])
    expected = [("accelerate_config.mixed_precision", "fp8"), ("accelerate_config.distributed_type", "DEEPSPEED")]
    expected += [("trackers", "wandbb"), ("trackers", "dvclive")]
    assert settings(error) == expected


def test_launch_problems_of_two_precisions_names_both_and_the_file() -> None:
    (problem,) = launch_problems({"ACCELERATE_MIXED_PRECISION": "bf16"}, True, "no", Launch("/etc/default_config.yaml"))
    assert (problem.setting, problem.value, problem.allowed) == ("accelerate_config.mixed_precision", "bf16", "no")
    assert "/etc/default_config.yaml" in problem.reason


def test_launch_problems_refuses_a_gpu_launch_without_a_gpu() -> None:
    (problem,) = launch_problems({"WORLD_SIZE": "8"}, False, launch=Launch())
    assert (problem.setting, problem.value, problem.allowed) == ("accelerate_config.use_cpu", False, "true")


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({"WORLD_SIZE": "2"}, Launch("two.yaml", use_cpu=True)),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}, Launch("gpu.yaml")),
        ({"MASTER_ADDR": "10.0.0.1"}, Launch()),
        ({"WORLD_SIZE": "2"}, None),
    ],
)
def test_launch_problems_without_a_gpu_accepts(environment: dict[str, str], launch: Launch | None) -> None:
    """use_cpu, one process without an accelerate config, and launchers other than accelerate's."""
    assert launch_problems(environment, False, launch=launch) == []


def test_launch_problems_names_processes_that_are_not_started() -> None:
    launch, started = Launch("two.yaml", use_cpu=True, num_processes=2), {"ACCELERATE_USE_CPU": "True"}
    (problem,) = launch_problems(started, False, launch=launch)
    assert (problem.setting, problem.value) == ("accelerate_config.num_processes", 2)
    assert launch_problems({**started, "OMPI_COMM_WORLD_SIZE": "2"}, False, launch=launch) == []


def test_create_accelerator_reports_what_accelerate_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "0")
    with pytest.raises(ConfigError, match="dp_shard_size"):
        create_accelerator()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("python -m accelerate.commands.launch --config_file={} -m fundamentallm.train", (True, True, 2)),
        ("uv run --frozen accelerate launch --config_file {} --num_processes 4 train.py", (True, True, 4)),
        ("/usr/bin/python /opt/bin/accelerate-launch --cpu train.py --config_file {}", (False, True, 1)),
        ("accelerate launch --multi_gpu --num-processes 2 -m train --config x.yaml --cpu", (False, False, 2)),
        ("python train.py --output_dir runs/accelerate", None),
    ],
)
def test_find_launch_reads_the_launchers_own_arguments(
    words: str, expected: tuple[bool, bool, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "none.yaml"))
    shutil.copy(CONFIGS / "cpu_2_processes.yaml", tmp_path / "two.yaml")
    parent = SimpleNamespace(cmdline=words.format("two.yaml").split, cwd=lambda: str(tmp_path))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parents=lambda: [parent]))
    launch = find_launch()
    found = None if launch is None else (launch.config_file is not None, launch.use_cpu, launch.num_processes)
    assert found == expected


@pytest.mark.parametrize(("first", "second"), [("bf16", None), (None, "bf16")])
def test_create_accelerator_has_one_precision_for_a_process(first: str | None, second: str | None) -> None:
    with pytest.raises(ConfigError):
        create_accelerator("fp16")  # on a CPU, which leaves the process free
    assert create_accelerator(first).mixed_precision == (first or "no")
    with pytest.raises(ConfigError) as error:
        create_accelerator(second)
    assert settings(error) == [("Accelerator.mixed_precision", first or "no")]
    assert create_accelerator(first).mixed_precision == (first or "no")


# ---- what a caller's Accelerator asks for ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "setting", "value"),
    [
        ({"device_placement": False}, "device_placement", False),
        ({"step_scheduler_with_optimizer": False}, "step_scheduler_with_optimizer", False),
        ({"gradient_accumulation_plugin": GradientAccumulationPlugin(3)}, "gradient_accumulation_steps", 3),
        ({"dataloader_config": DataLoaderConfiguration(data_seed=5)}, "dataloader_config.data_seed", 5),
    ],
)
def test_check_accelerator_refuses_options_of_another_run(options: dict[str, Any], setting: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        check_accelerator(Accelerator(cpu=True, **options))
    assert settings(error) == [(f"Accelerator.{setting}", value)]


def test_save_state_and_load_state_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path / "run"))
    with pytest.raises(FundamentaLLMError, match=r"trainer\.save_checkpoint"):
        trainer.accelerator.save_state(str(tmp_path / "state"))
    assert list((tmp_path / "state").iterdir()) == []
    with pytest.raises(FundamentaLLMError, match=r"trainer\.load_checkpoint"):
        trainer.accelerator.load_state(str(tmp_path / "state"))


def test_check_accelerator_refuses_processes_without_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError) as error:
        check_accelerator(accelerator)
    assert settings(error) == [("Accelerator.num_processes", 1)]


@pytest.mark.parametrize(("made", "wanted"), [("bf16", "no"), ("fp16", "fp16")])
def test_check_accelerator_refuses_another_precision_and_fp16_on_a_cpu(made: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_accelerator(Accelerator(cpu=True, mixed_precision=made), wanted)
    assert settings(error) == [("Accelerator.mixed_precision", made)]


@pytest.mark.parametrize("asked", [FSDP, {"distributed_type": DistributedType.XLA}, {"tp_size": 4}])
def test_check_accelerator_refuses_what_is_not_data_parallel(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = Accelerator(cpu=True)
    if "tp_size" in asked:
        accelerator.state.parallelism_config = ParallelismConfig(**asked)
    elif asked is FSDP:  # which accelerate ignores on a CPU
        for name, value in FSDP.items():
            monkeypatch.setenv(name, value)
    else:
        accelerator.state.distributed_type = asked["distributed_type"]
    with pytest.raises(ConfigError) as error:
        check_accelerator(accelerator)
    assert [name for name, _ in settings(error)] == ["accelerate_config.distributed_type"]


def make_two_trainers(processes: int, folder: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_trainer(make_config(folder, batch_size=1))
    assert settings(error) == [("training.batch_size", 1)]
    trainer = make_trainer(make_config(folder, batch_size=2))
    assert trainer.accelerator.num_processes == processes == int(os.environ["WORLD_SIZE"])


def test_check_accelerator_refuses_too_small_a_batch(tmp_path: Path) -> None:
    on_processes(2, make_two_trainers, str(tmp_path))
