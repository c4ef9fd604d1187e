"""The memory that `fundamentallm estimate` tells of is what torch allocates, on one process and on two."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.profiler import ProfilerActivity, profile

from fundamentallm import Config, DataConfig, ModelConfig, TrainingConfig, Transformer
from fundamentallm.commands.estimate.counts import layout_of, micro_batches, sent_bytes
from fundamentallm.commands.estimate.memory import memory
from fundamentallm.config.schema import LOSS_NAMES
from fundamentallm.distributed.accelerator import check_accelerator, create_accelerator
from fundamentallm.distributed.dtensor import local
from fundamentallm.distributed.prepare import place_model, prepare_model
from fundamentallm.models.with_loss import ModelWithLoss
from fundamentallm.training.guard import Guard
from fundamentallm.training.loss import create_loss
from fundamentallm.training.optimizers import make_optimizer
from fundamentallm.training.step import OptimizerStep
from tests.integration.runs import on_processes, sharded_accelerator

DEEP = {"vocab_size": 100, "d_model": 64, "num_heads": 4, "num_layers": 4}
BROAD = {"vocab_size": 6000, "d_model": 64, "num_heads": 4, "num_layers": 2}
HEAVY = {"vocab_size": 100, "d_model": 256, "num_heads": 4, "num_layers": 3}
GROUPED = {"num_kv_heads": 2, "qk_norm": False, "tie_embeddings": True}


def config_of(
    model: dict[str, Any], sequence_length: int = 64, mask_documents: bool = False, **training: Any
) -> Config:
    data = DataConfig(sequence_length=sequence_length, mask_documents=mask_documents, end_of_text="<end>")
    return Config(model=ModelConfig(**model), data=data, training=TrainingConfig(**training)).resolved()


def allocated_peak(action: Callable[[], object], folder: Path) -> int:
    """Most bytes that torch's CPU allocator has given away at once during `action`, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


class Measured:
    """The optimizer step of a config, as the Trainer would take it."""

    def __init__(self, config: Config, accelerator: Accelerator | None = None) -> None:
        training, self.loss = config.training, create_loss(config.training.loss)
        self.model = Transformer(config.model, document_start=0 if config.data.mask_documents else None)
        accelerator = accelerator or create_accelerator(training.mixed_precision)
        check_accelerator(accelerator)
        place_model(accelerator, self.model, 0, training.activation_checkpointing)
        optimizer = make_optimizer(training, self.model)
        self.whole = whole = prepare_model(accelerator, ModelWithLoss(self.model, self.loss), optimizer)
        step = OptimizerStep(accelerator, whole, optimizer, Guard(accelerator.device, 10), max_norm=1.0, seed=0)
        rows, parts, _ = micro_batches(config, accelerator.num_processes)
        size = (rows, config.data.sequence_length)
        self.inputs, targets = (torch.randint(config.model.vocab_size or 0, size) for _ in range(2))
        self.step = lambda number: step(number, self.inputs, targets, parts)
        for number in range(2):  # the first makes the optimizer's state, and then DDP its buckets anew
            self.step(number)
        state = [value for values in optimizer.state.values() for value in values.values()]
        self.weights = sum(local(parameter).nbytes for parameter in self.model.parameters())
        self.optimizer = sum(local(value).nbytes for value in state if isinstance(value, Tensor))
        self.batch = self.inputs.nbytes + targets.nbytes

    def peak(self, folder: Path) -> int:
        """Most bytes there are at once in a step."""
        return self.weights + self.optimizer + self.batch + allocated_peak(lambda: self.step(2), folder)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deep": (DEEP, {"batch_size": 4}),
    "broad": (BROAD, {"batch_size": 8}),
    **{name: (BROAD, {"batch_size": 8, "loss": name}) for name in LOSS_NAMES[1:]},
    "long": (DEEP | {"num_layers": 2}, {"batch_size": 1, "sequence_length": 1024}),
    "micro-batches": (DEEP, {"batch_size": 6, "micro_batch_size": 2}),
    "grouped, tied, micro-batches": (BROAD | GROUPED, {"batch_size": 4, "micro_batch_size": 2}),
    "wide feed-forward": (DEEP | {"num_layers": 1, "d_ff": 1024, "vocab_size": 16}, {"batch_size": 2}),
    "dropout": (DEEP | {"dropout": 0.1, "num_kv_heads": 2}, {"batch_size": 2}),
    "weights": (HEAVY, {"batch_size": 1, "sequence_length": 32}),
    "weights, micro-batches": (HEAVY, {"batch_size": 2, "micro_batch_size": 1, "sequence_length": 32}),
    "a tied table": (BROAD | {"d_model": 256, "tie_embeddings": True}, {"batch_size": 1, "sequence_length": 32}),
    "a table, micro-batches": (
        BROAD | {"d_model": 256},
        {"batch_size": 2, "micro_batch_size": 1, "sequence_length": 32},
    ),
    "sgd": (HEAVY, {"batch_size": 1, "optimizer": "sgd", "sequence_length": 32}),
    "muon": (HEAVY, {"batch_size": 1, "optimizer": "muon", "sequence_length": 32}),
    "chunks, fused": (BROAD, {"batch_size": 32}),
    "chunks": (BROAD, {"batch_size": 32, "loss": "focal"}),
    "chunks, bf16": (BROAD, {"batch_size": 32, "mixed_precision": "bf16"}),
    "chunks, z_loss, micro-batches": (BROAD, {"batch_size": 64, "micro_batch_size": 32, "loss": "z_loss"}),
    "masked documents": (DEEP, {"batch_size": 2, "sequence_length": 256, "mask_documents": True}),
    "masked documents, bf16": (
        DEEP,
        {"batch_size": 2, "sequence_length": 256, "mask_documents": True, "mixed_precision": "bf16"},
    ),
    "bf16": (DEEP, {"batch_size": 4, "mixed_precision": "bf16"}),
    "bf16, broad": (BROAD, {"batch_size": 8, "mixed_precision": "bf16"}),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_torch_allocates(case: str, tmp_path: Path) -> None:
    model, settings = CASES[case]
    config = config_of(model, **settings)
    measured, estimated = Measured(config), memory(config, layout_of("ddp", 1), on_cpu=True)
    assert measured.weights == estimated.weights == estimated.gradients
    assert measured.optimizer == estimated.optimizer
    assert measured.batch == estimated.batch
    assert estimated.peak == pytest.approx(measured.peak(tmp_path), rel=0.02)


@pytest.mark.parametrize("case", ["deep", "broad", "long", "micro-batches", "weights", "bf16"])
def test_memory_where_blocks_are_recomputed(case: str, tmp_path: Path) -> None:
    model, settings = CASES[case]
    config = config_of(model, **settings, activation_checkpointing=True)
    measured, estimated = Measured(config), memory(config, layout_of("ddp", 1), on_cpu=True)
    assert estimated.peak == pytest.approx(measured.peak(tmp_path), rel=0.02)


@pytest.mark.parametrize(
    "case", ["deep", "broad", "grouped, tied, micro-batches", "dropout", "masked documents", "bf16"]
)
def test_activations_are_what_autograd_keeps(case: str) -> None:
    model, settings = CASES[case]
    config = config_of(model, **settings)
    measured = Measured(config)
    _, _, rows = micro_batches(config, 1)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*measured.model.parameters(), measured.inputs)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    precision = config.training.mixed_precision
    autocast = torch.autocast("cpu", torch.bfloat16) if precision else contextlib.nullcontext()
    inputs = measured.inputs[:rows]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        ModelWithLoss(measured.model, measured.loss)(inputs, inputs)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    estimated = memory(config, layout_of("ddp", 1), on_cpu=True)
    log_probabilities = estimated.logits // 3
    assert estimated.activations == pytest.approx(total - log_probabilities, rel=0.001)


@pytest.mark.parametrize(
    ("layout", "precision", "size"), [("ddp", "bf16", 4), ("fsdp2", "bf16", 2), ("fsdp2", "no", 4)]
)
def test_a_recomputed_block_keeps_its_input(layout: str, precision: str, size: int) -> None:
    """Autocast leaves the residual stream in float32, FSDP2's policy does not."""

    def kept(num_layers: int) -> int:
        training = {"batch_size": 8, "mixed_precision": precision, "activation_checkpointing": True}
        return memory(config_of(DEEP | {"num_layers": num_layers}, **training), layout_of(layout, 2)).activations

    assert kept(5) - kept(4) == 4 * 64 * DEEP["d_model"] * size


def test_a_gpu_keeps_less() -> None:
    config = config_of(DEEP | {"dropout": 0.1}, batch_size=4)
    on_gpu, on_cpu = (memory(config, layout_of("ddp", 1), on_cpu) for on_cpu in (False, True))
    assert on_gpu.activations < on_cpu.activations
    assert on_gpu.peak < on_cpu.peak


# ---- several devices -----------------------------------------------------------------------------------------


def _measure_ddp(_: int, precision: str, folder: Path) -> None:
    config = config_of(DEEP, batch_size=4, mixed_precision=precision)
    measured, buckets = Measured(config), []

    def reduce(group, bucket):  # type: ignore[no-untyped-def]  # torch would compare annotations, which are text here
        buckets.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    measured.whole.register_comm_hook(None, reduce)
    peak = measured.peak(folder / str(dist.get_rank()))
    estimated = memory(config, layout_of("ddp", 2), on_cpu=True)
    assert estimated.gradients == sent_bytes(config, layout_of("ddp", 2)) == sum(buckets)
    assert estimated.peak == pytest.approx(peak + sum(buckets), rel=0.02)


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that this process sends, by rings of two, in what FSDP2 gathers and scatters."""
    sent: list[int] = []

    def counting(communicate: Callable[..., Any]) -> Callable[..., Any]:
        def count(*tensors: Any, **options: Any) -> Any:
            given = (*tensors, *options.values())
            sent.append(max(value.nbytes for value in given if isinstance(value, Tensor)) // 2)
            return communicate(*tensors, **options)

        return count

    since_2_13 = hasattr(dist, "all_gather_single")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "reduce_scatter"):
            name += "_single" if since_2_13 else "_into_tensor" if name == "all_gather" else "_tensor"
            patch.setattr(dist, name, counting(getattr(dist, name)))
        yield sent


def _measure_fsdp2(_: int, precision: str, folder: Path) -> None:
    # Few tokens: what is gathered is a third of all.
    config = config_of(DEEP | {"d_model": 128}, batch_size=4, micro_batch_size=1, mixed_precision=precision)
    Accelerator(cpu=True, mixed_precision=precision)  # whose precision the next one shares
    measured = Measured(config, sharded_accelerator())
    folder /= str(dist.get_rank())
    with counted() as sent:
        peak = measured.peak(folder)
    # On a busy machine gloo's threads let go of a tensor late: the least of some steps.
    peak = min(peak, *(measured.peak(folder) for _ in range(2)))
    estimated = memory(config, layout_of("fsdp2", 2), on_cpu=True)
    assert estimated.weights == measured.weights
    assert estimated.optimizer == pytest.approx(measured.optimizer, rel=0.001)  # each process counts all steps
    assert estimated.peak == pytest.approx(peak, rel=0.15)
    assert sent_bytes(config, layout_of("fsdp2", 2)) == sum(sent)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("measure", [_measure_ddp, _measure_fsdp2])
def test_two_processes_take_what_is_estimated(
    measure: Callable[[int, str, Path], None], precision: str, tmp_path: Path
) -> None:
    for process in range(2):
        (tmp_path / str(process)).mkdir()
    on_processes(2, measure, precision, tmp_path)
