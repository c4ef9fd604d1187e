"""Every callback works with a plain object that satisfies `RunView`, without a Trainer. mypy checks that it does."""

import json
from pathlib import Path

import torch

import fundamentallm
from fundamentallm import (
    Callback,
    CallbackList,
    LoggingCallback,
    ProfilerCallback,
    ProgressCallback,
    SampleCallback,
    SaveBestCallback,
    VisualizationCallback,
)
from fundamentallm.training.callbacks.base import RunView
from fundamentallm.training.callbacks.trackers import TrackerCallback
from tests.unit.stub_run import Stub, line, make_stub


def drive(stub: Stub, callbacks: CallbackList) -> None:
    """Call the hooks in the order of a training whose validation loss is best in its second step."""
    run: RunView = stub
    callbacks.on_train_begin(run)
    callbacks.on_epoch_begin(run)
    for step, val_loss in enumerate((3.0, 2.0, 2.5), start=1):
        callbacks.on_step_begin(run)
        stub.model(torch.tensor([1])).square().sum().backward()
        stub.optimizer.step()
        stub.optimizer.zero_grad()
        stub.global_step = step
        stub.metrics.update(line(step))
        callbacks.on_log(run, line(step) | callbacks.measure(run))
        stub.metrics.update({"val_step": step, "val_loss": val_loss})
        callbacks.on_validation_end(run, {"val_loss": val_loss})
    callbacks.on_epoch_end(run)
    callbacks.on_train_end(run)


def test_run_view_stub_drives_every_callback(tmp_path: Path) -> None:
    stub = make_stub(tmp_path)
    callbacks: list[Callback] = [
        *(ProgressCallback(), LoggingCallback(tmp_path / "metrics.jsonl"), SaveBestCallback(), TrackerCallback()),
        *(SampleCallback(["to "]), ProfilerCallback(2, 1), VisualizationCallback(tmp_path / "c.png")),
    ]
    exported = {name for name in fundamentallm.__all__ if name.endswith("Callback")} - {"Callback"}
    assert exported <= {type(callback).__name__ for callback in callbacks}
    drive(stub, CallbackList(callbacks))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 1, 2, 2, 3, 3]
    assert stub.saves == [(1, True), (2, True)]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(step, "to ") for step in (1, 2, 3)]
    assert all(sample["text"] for sample in samples)
    assert (tmp_path / "traces" / "step_00000002-00000002.rank0.json").exists()
    assert (tmp_path / "c.png").exists()
