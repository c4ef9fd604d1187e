"""What an accelerate config asks for and a run here is not is refused, all of it at once, before accelerate sees it."""

from __future__ import annotations

import os

import pytest
from accelerate import Accelerator

from fundamentallm import ConfigError, create_accelerator
from fundamentallm.distributed.accelerator import check_accelerator
from fundamentallm.distributed.launch_checks import launch_problems
from tests.integration.runs import make_config, make_trainer, on_processes, sharded_accelerator

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
PARALLEL = {**FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
SIZE = "PARALLELISM_CONFIG_{}_SIZE"


@pytest.mark.parametrize(
    ("environment", "places"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["distributed_type", "DEEPSPEED", "fsdp2.yaml", "gradient_clip_norm"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["distributed_type", "MEGATRON_LM", "training.micro_batch_size"]),
        ({"ACCELERATE_USE_FSDP": "true"}, ["fsdp_version", "is 1", "allowed: 2"]),
        ({**FSDP, "FSDP_VERSION": "1"}, ["fsdp_version", "is 1", "allowed: 2"]),
        (PARALLEL | {SIZE.format("TP"): "4"}, ["parallelism_config_tp_size", "is 4", "dp_shard_size"]),
        (PARALLEL | {SIZE.format("CP"): "4"}, ["parallelism_config_cp_size", "is 4", "rotary"]),
        (PARALLEL | {SIZE.format("SP"): "4"}, ["parallelism_config_sp_size", "is 4", "DeepSpeed"]),
        (
            PARALLEL | {SIZE.format("DP_REPLICATE"): "2", SIZE.format("DP_SHARD"): "2"},
            ["2 copies", "num_processes is 8"],
        ),
        (PARALLEL | {SIZE.format("DP_REPLICATE"): "8"}, ["8 copies", "the second of them above 1"]),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", SIZE.format("DP_REPLICATE"): "8"},
            ["parallelism_config", "needs distributed_type: FSDP", "hsdp.yaml"],
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, ["mixed_precision", "'fp8'", "training.mixed_precision"]),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ["mixed_precision", "'bf16'", "training.mixed_precision is 'no'"]),
        ({"ACCELERATE_DOWNCAST_BF16": "true"}, ["downcast_bf16", "training.mixed_precision"]),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, ["steps", "is 4", "training.micro_batch_size"]),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, ["gradient_clipping", "is 0.5", "training.gradient_clip_norm"]),
        (
            {"WORLD_SIZE": "16"},
            ["training.batch_size is 8", "num_processes in the accelerate config is 16", "8 of them"],
        ),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
)
def test_a_contradiction_names_both_places(environment: dict[str, str], places: list[str]) -> None:
    # Sizes that do not go with WORLD_SIZE are a problem of their own, listed last.
    problem, *_ = launch_problems({"WORLD_SIZE": "8", **environment}, True, "no", 8)
    assert [place for place in places if place not in problem] == []


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"ACCELERATE_MIXED_PRECISION": "no"},
        {"ACCELERATE_MIXED_PRECISION": "fp16"},
        {"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_USE_FSDP": "False"},
        FSDP,
        PARALLEL | {SIZE.format("DP_REPLICATE"): "2", SIZE.format("DP_SHARD"): "4"},
        PARALLEL | {SIZE.format("DP_SHARD"): "8"},
    ],
)
def test_what_is_supported_is_no_problem(environment: dict[str, str]) -> None:
    assert launch_problems({"WORLD_SIZE": "8", **environment}, True, "fp16", 8) == []


def test_everything_wrong_is_said_at_once_and_before_accelerate_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of DeepSpeed, Accelerator() would say that it is not installed, and of FSDP on a CPU nothing."""
    wrong = {**FSDP, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_CLIPPING": "1.0", "WORLD_SIZE": "3"}
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ConfigError) as caught:
        create_accelerator("no", 2)
    words = ["DEEPSPEED", "on a CPU", "gradient_clipping", "batch_size is 2"]
    assert len(caught.value.problems) == len(words)
    assert all(word in problem for word, problem in zip(words, caught.value.problems, strict=True))


def test_a_users_accelerator_that_left_fsdp_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ConfigError, match="FSDP was asked for and the Accelerator's distributed_type is NO"):
        check_accelerator(Accelerator(cpu=True))


def test_an_accelerator_that_shards_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = sharded_accelerator()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_accelerator(accelerator)


def batch_of_one(processes: int, folder: str) -> None:
    with pytest.raises(ConfigError, match=r"training.batch_size is 1 and num_processes .* is 2"):
        make_trainer(make_config(folder, batch_size=1))
    trainer = make_trainer(make_config(folder, batch_size=2))
    assert trainer.accelerator.num_processes == processes == int(os.environ["WORLD_SIZE"])


def test_a_batch_smaller_than_the_processes_is_refused(tmp_path: object) -> None:
    on_processes(2, batch_of_one, str(tmp_path))
