"""Checks that need a GPU. Each makes real runs, fails by an assertion, and returns its result in one line."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fundamentallm.commands.estimate import count, memory
from fundamentallm.config.schema import Config
from fundamentallm.config.units import size_text
from tests.gpu.hooks import STOP_AT
from tests.gpu.runs import ROOT, Runs, Skipped, lines, losses, seen, state

FSDP2 = ROOT / "accelerate_configs/fsdp2.yaml"


def precisions(runs: Runs) -> str:
    """bf16 and fp16 reach the loss of fp32."""
    names = ("no", "bf16", "fp16") if runs.on_gpu else ("no", "bf16")  # a CPU refuses fp16
    last = {}
    for name in names:
        folder = runs.run(runs.config(f"precision-{name}", mixed_precision=name))
        assert seen(folder, "Facts")["mixed_precision"] == name
        assert losses(folder)[-1] < losses(folder)[0] - 0.1, "the loss does not fall"
        last[name] = losses(folder)[-1]
    assert all(abs(loss / last["no"] - 1) < 0.02 for loss in last.values()), last
    return "last losses " + ", ".join(f"{name} {loss:.4f}" for name, loss in last.items())


def overflow(runs: Runs) -> str:
    """A step whose gradient overflows changes no weight and no moment, and halves the loss scale."""
    precision = "fp16" if runs.on_gpu else "no"
    folder = runs.run(runs.config("overflow", mixed_precision=precision, hooks=["Overflow"]))
    assert seen(folder, "Overflow") == {"unchanged": True, "halved": True}, seen(folder, "Overflow")
    assert lines(folder)[-1]["bad_steps"] >= 1
    return f"{precision}: nothing changed; the run continued to {losses(folder)[-1]:.4f}"


def sharded(runs: Runs) -> str:
    """FSDP2 with one process, on NCCL, has the losses of a plain run."""
    if not runs.on_gpu:
        raise Skipped("accelerate ignores FSDP2 on a CPU")
    plain = runs.run(runs.config("precision-no", mixed_precision="no"))
    launch = ["--config_file", str(FSDP2), "--num_processes", "1", "--mixed_precision", "no"]
    folder = runs.run(runs.config("fsdp2", mixed_precision="no"), launch)
    assert seen(folder, "Facts")["sharded"], "the run was not sharded"
    worst = max(abs(a / b - 1) for a, b in zip(losses(folder), losses(plain), strict=True))
    assert worst < 1e-4, f"losses differ by {worst:.1e}"
    return f"losses differ by {worst:.1e} at most"


def compiled(runs: Runs) -> str:
    """A compiled run reaches the same loss, faster."""
    plain = runs.run(runs.config("precision-bf16", mixed_precision="bf16"))
    folder = runs.run(runs.config("compiled", mixed_precision="bf16", compile=True))
    facts = seen(folder, "Facts")
    assert facts["compiled"]
    assert abs(losses(folder)[-1] / losses(plain)[-1] - 1) < 0.02, (losses(folder)[-1], losses(plain)[-1])
    faster = lines(folder)[-1]["tokens_per_second"] / lines(plain)[-1]["tokens_per_second"]
    return (
        f"first step in {facts['first_step_seconds']:.0f} s; loss {losses(folder)[-1]:.4f} "
        f"(plain {losses(plain)[-1]:.4f}), {faster:.2f} times as fast"
    )


def waiting(runs: Runs) -> str:
    """The host waits for the device at log steps only."""
    found = []
    for precision in ("bf16", "fp16") if runs.on_gpu else ("no",):
        settings = {"mixed_precision": precision, "ema_decay": 0.9, "hooks": ["NoWaiting"]}
        folder = runs.run(runs.config(f"waiting-{precision}", **settings))
        found.append(f"{seen(folder, 'NoWaiting')['steps_without_waiting']} of 40 steps in {precision}")
    assert all(text.startswith("36 ") for text in found), found
    return ", ".join(found)


def resuming(runs: Runs) -> str:
    """A run that is stopped by SIGTERM and resumed ends with the same weights and moments, to the bit."""
    deterministic = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    options: dict[str, Any] = {"hooks": ["Deterministic", "Preempted"], "mixed_precision": "bf16"}
    for kind in ("", "-compiled") if runs.on_gpu else ("",):  # tests/integration/test_compile.py checks it on a CPU
        options["compile"] = bool(kind)
        whole = runs.run(runs.config(f"whole{kind}", **options), environment=deterministic)
        broken = runs.config(f"broken{kind}", **options)
        runs.run(broken, environment={**deterministic, STOP_AT: "20"}, code=75)
        folder = runs.run(broken, environment=deterministic)
        one, other = state(whole), state(folder)
        assert one.keys() == other.keys()
        differing = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
        assert not differing, f"{len(differing)} of {len(one)} tensors differ{kind}: {differing[:3]}"
    if not runs.on_gpu:
        return f"{len(one)} tensors equal"
    # Without torch's deterministic algorithms, two equal runs may differ, which is not an error of resuming.
    free = [state(runs.run(runs.config(f"free-{i}", mixed_precision="bf16"))) for i in range(2)]
    same = all(torch.equal(tensor, free[1][name]) for name, tensor in free[0].items())
    return f"{len(one)} tensors equal; two runs without deterministic algorithms are {'equal' if same else 'NOT equal'}"


SHAPES: dict[str, dict[str, Any]] = {
    "deep": {"model": {"d_model": 512, "num_heads": 8, "num_layers": 12}, "sequence_length": 1024, "batch_size": 4},
    "broad": {
        "model": {"vocab_size": 32_000, "d_model": 256, "num_heads": 4, "num_layers": 2},
        **{"sequence_length": 512, "batch_size": 8},
    },
    "heavy": {"model": {"d_model": 1024, "num_heads": 8, "num_layers": 12}, "sequence_length": 128, "batch_size": 2},
    "grouped": {
        "model": {"d_model": 512, "num_heads": 8, "num_kv_heads": 2, "num_layers": 6},
        **{"sequence_length": 2048, "batch_size": 2},
    },
}
SHAPES["micro-batches"] = SHAPES["deep"] | {"micro_batch_size": 1}
SHAPES["recomputed"] = SHAPES["deep"] | {"activation_checkpointing": True}


def memory_estimated(runs: Runs) -> str:
    """Peak memory is within 15 % of what `fundamentallm estimate` predicts."""
    if not runs.on_gpu:
        raise Skipped("torch does not measure the peak memory of a CPU; tests/unit/test_estimated_memory.py checks it")
    found, right = [], True
    for name, options in SHAPES.items():
        for precision in ("no", "bf16"):
            given = {"micro_batch_size": None, **options, "mixed_precision": precision, "max_steps": 10}
            config = runs.config(f"memory-{name}-{precision}", **given)
            measured = seen(runs.run(config), "Facts")["peak_bytes"]
            off = memory(config, count(config)).peak / measured - 1
            right &= abs(off) < 0.15
            found.append(f"{name} {precision} {size_text(measured)} ({off:+.1%})")
    text = "measured (and estimated): " + ", ".join(found)
    assert right, text
    return text


def _large(runs: Runs, name: str, **training: Any) -> Config:
    """Returns a config of GPT-2's size, at least 124 million parameters."""
    if not runs.on_gpu:
        return runs.config(name, **training)
    model = {"vocab_size": 50_304, "d_model": 768, "num_heads": 12, "num_layers": 12}
    return runs.config(name, model, sequence_length=1024, batch_size=64, **{"micro_batch_size": 16} | training)


def fitting(runs: Runs) -> str:
    """With little memory, micro_batch_size: auto finds a size that fits; the losses are those of that size."""
    precision = "fp16" if runs.on_gpu else "bf16"  # whose loss scale must not change
    settings = {"mixed_precision": precision, "max_steps": 10, "log_every_n_steps": 1, "hooks": ["LittleMemory"]}
    found = runs.run(_large(runs, "fitting", micro_batch_size="auto", **settings))
    size = seen(found, "Facts")["micro_batch_size"]
    assert not runs.on_gpu or 1 <= size < 64, f"{size} of 64 sequences"
    given = runs.run(_large(runs, "fitting-given", micro_batch_size=size, **settings))
    assert losses(found) == losses(given)
    return f"{size} sequences at once, the same losses to the bit"


def saving(runs: Runs) -> str:
    """Measures how long training waits for a checkpoint, and how long a thread then writes it."""
    config = _large(runs, "saving", mixed_precision="bf16", save_every_n_steps=10)
    facts = seen(runs.run(config), "Facts")
    assert len(facts["seconds_waited"]) == 4, facts
    waited = ", ".join(f"{seconds:.2g}" for seconds in facts["seconds_waited"])
    # The second and third may have to wait until the previous one is written.
    return f"waits {waited} s; the last was written in {facts['seconds_written']:.2g} s"


CHECKS: dict[str, Callable[[Runs], str]] = {
    check.__name__: check
    for check in (precisions, overflow, sharded, compiled, waiting, resuming, memory_estimated, fitting, saving)
}


def described(check: Callable[[Runs], str]) -> str:
    """Returns the first line of the docstring of a check."""
    return (check.__doc__ or "").split("\n")[0]


@dataclasses.dataclass(frozen=True)
class Finding:
    """Outcome of a check: passed, FAILED or skipped."""

    name: str
    status: str
    text: str
    seconds: float
