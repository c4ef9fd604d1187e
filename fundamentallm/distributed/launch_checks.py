"""What a launcher asks for by its environment variables, where a run here would be something else.

accelerate's launcher turns its YAML and its flags into these variables, and `Accelerator()` reads them. They are looked
at before it does, since it would fail over a missing package, or leave out in silence what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

from accelerate.tracking import get_available_trackers

SUPPORTED = (
    "allowed: data-parallel processes (accelerate_configs/multi_gpu.yaml), FSDP2 (fsdp2.yaml), copies of it (hsdp.yaml)"
)
PRECISIONS = ("no", "bf16", "fp16")

DEEPSPEED = (
    "its engine takes the optimizer step within backward, where no clipping, no guard and no schedule of a run reaches "
    "it. What ZeRO shards, accelerate_configs/fsdp2.yaml does, with training.gradient_clip_norm and "
    "training.micro_batch_size for its gradient_clipping and gradient_accumulation_steps."
)
MEGATRON = (
    "it brings a model, an optimizer and a loop of its own; its gradient clipping and its number of micro-batches are "
    "training.gradient_clip_norm and training.micro_batch_size here."
)
XLA = "on it, accelerate exchanges gradients within its own wrapper of the optimizer, which a step here does not use."
PARALLEL = {
    "tp": "tensor parallelism of accelerate wants a model that is made for it, layer by layer, and ours is not",
    "cp": "context parallelism cuts sequences up, and the model computes rotary positions and the loss over whole ones",
    "sp": "sequence parallelism is DeepSpeed's",
}
"""Why not, by accelerate's short names."""
SIZES = ("dp_replicate", "dp_shard", *PARALLEL)


def launch_problems(
    environment: Mapping[str, str], has_device: bool, mixed_precision: str | None = None, batch_size: int | None = None
) -> list[str]:
    """What contradicts our settings, or is not supported; each names both places and what to do.

    Args:
        environment: of the process.
        has_device: whether it will compute on an accelerator.
        mixed_precision: `training.mixed_precision`; None: not set.
        batch_size: sequences per optimizer step, over all processes; None: not known.
    """
    problems = _engine_problems(environment) + _sharding_problems(environment, has_device)
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in PRECISIONS:
        problems.append(
            f"mixed_precision in the accelerate config is {launched!r}; allowed: {', '.join(PRECISIONS)}, there or in "
            "training.mixed_precision."
        )
    # `accelerate launch` says "no" where nobody said anything, so only another precision can contradict ours.
    elif mixed_precision is not None and launched not in ("no", mixed_precision):
        problems.append(
            f"training.mixed_precision is {mixed_precision!r} and mixed_precision in the accelerate config is "
            f"{launched!r}; set one of them, or both alike."
        )
    if _is_set(environment, "ACCELERATE_DOWNCAST_BF16"):
        problems.append(
            "downcast_bf16 is set in the accelerate config, which is for TPUs; leave it out, and set "
            "training.mixed_precision."
        )
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto"):
        problems.append(
            f"gradient_accumulation_steps of accelerate (ACCELERATE_GRADIENT_ACCUMULATION_STEPS) is {steps}; allowed: "
            "1. Set training.micro_batch_size instead: accumulation follows from it and training.batch_size."
        )
    clipping = environment.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping not in ("none", "auto"):
        problems.append(
            f"gradient_clipping in the accelerate config is {clipping}; leave it out, and set "
            "training.gradient_clip_norm, the one that acts."
        )
    return problems + idle_processes(batch_size, int(environment.get("WORLD_SIZE", "1")))


def idle_processes(batch_size: int | None, num_processes: int) -> list[str]:
    """The problem of a batch with fewer sequences than there are processes, if it is one."""
    if batch_size is None or batch_size >= num_processes:
        return []
    return [
        f"training.batch_size is {batch_size} and num_processes in the accelerate config is {num_processes}, so that "
        f"{num_processes - batch_size} of them would have nothing to do in any step; allowed: a batch_size of at least "
        f"{num_processes} (it counts sequences over all processes), or fewer processes."
    ]


def _engine_problems(environment: Mapping[str, str]) -> list[str]:
    problems = []
    for variable, kind, why in (
        ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED", DEEPSPEED),
        ("ACCELERATE_USE_MEGATRON_LM", "MEGATRON_LM", MEGATRON),
    ):
        if _is_set(environment, variable):
            problems.append(f"distributed_type in the accelerate config is {kind}; {SUPPORTED}: {why}")
    return problems


def _sharding_problems(environment: Mapping[str, str], has_device: bool) -> list[str]:
    problems, shards = [], _is_set(environment, "ACCELERATE_USE_FSDP")
    version = environment.get("FSDP_VERSION", "1")
    if shards and version != "2":
        problems.append(f"fsdp_version in the accelerate config is {version}; allowed: 2. Set it in fsdp_config.")
    if shards and not has_device:
        problems.append(
            "distributed_type in the accelerate config is FSDP and this is to run on a CPU, where accelerate leaves it "
            "out in silence; use accelerate_configs/cpu_2_processes.yaml, or a machine with accelerators."
        )
    if not _is_set(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return problems
    sizes = {name: int(environment.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1")) for name in SIZES}
    problems += parallel_problems(sizes)
    copies, parts = sizes["dp_replicate"], sizes["dp_shard"]
    world = int(environment.get("WORLD_SIZE", "1"))
    if copies * parts > 1 and not shards:
        problems.append(
            "parallelism_config in the accelerate config needs distributed_type: FSDP with fsdp_version: 2, as in "
            "accelerate_configs/hsdp.yaml; plain data parallelism (multi_gpu.yaml) needs no parallelism_config."
        )
    elif copies * parts != world or parts == 1:
        problems.append(
            f"parallelism_config in the accelerate config has {copies} copies (dp_replicate_size) of {parts} parts "
            f"(dp_shard_size), and num_processes is {world}; allowed: two sizes that make {world} multiplied, the "
            "second of them above 1."
        )
    return problems


def parallel_problems(sizes: Mapping[str, int]) -> list[str]:
    """One for each dimension in which processes would be used otherwise than data-parallel."""
    return [
        f"parallelism_config_{name}_size in the accelerate config is {sizes[name]}; allowed: 1, since {why}. Use "
        "dp_shard_size (FSDP2) for a model too large for a device."
        for name, why in PARALLEL.items()
        if sizes[name] > 1
    ]


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() not in ("", "0", "n", "no", "f", "false", "off")


def tracker_problems(names: list[str]) -> list[str]:
    """Which of the trackers are not installed. (accelerate would leave them out, with a warning at most.)"""
    missing = [name for name in names if name not in map(str, get_available_trackers())]
    return [f"trackers has {name!r}, which is not installed; run: pip install {name}" for name in missing]
