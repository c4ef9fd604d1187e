"""Metrics: means that lose nothing, and a history that survives its readers and restarts."""

import json
import math
from pathlib import Path

import pytest
import torch

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.run.progress import RunningMean
from fundamentallm.training.metrics import MetricTracker


def tracker(**columns: list[float]) -> MetricTracker:
    made = MetricTracker()
    for name, values in columns.items():
        for value in values:
            made.update({name: value})
    return made


def test_a_metric_that_comes_and_goes_keeps_to_its_steps() -> None:
    made = MetricTracker()
    for step, more in enumerate(({}, {"skipped": 7}, {}, {"skipped": 9}, {})):
        made.update({"step": step, "loss": 1.0, **more})
    assert repr(made.by_step()["skipped"]) == repr([math.nan, 7, math.nan, 9, math.nan])


def test_changing_the_returned_history_changes_nothing_kept() -> None:
    made = tracker(loss=[3.0, 2.0])
    history = made.get_history()
    history["loss"].append(9.0)
    history["other"] = []
    assert made.get_history() == {"loss": [3.0, 2.0]}


@pytest.mark.parametrize(("mode", "best"), [("min", -1.5), ("max", math.inf)])
@pytest.mark.parametrize("nan_at", range(4))
def test_nan_is_never_the_best_wherever_it_stands(mode: str, best: float, nan_at: int) -> None:
    values = [2.0, -1.5, math.inf]
    values.insert(nan_at, math.nan)
    assert tracker(loss=values).get_best("loss", mode) == best


def test_best_and_latest_of_nothing_are_none() -> None:
    made = tracker(only_nan=[math.nan], some=[1.0, 5.0, 3.0])
    assert made.get_latest("some") == 3.0
    assert made.get_latest("unknown") is None
    assert made.get_best("unknown") is made.get_best("only_nan", "max") is None
    made.reset()
    assert made.get_history() == {}


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode is 'MIN'; allowed: 'min', 'max'"):
        tracker(loss=[1.0]).get_best("loss", "MIN")


def test_the_history_survives_a_checkpoint_exactly(tmp_path: Path) -> None:
    columns = {
        "step": [1, 2**53 - 1],
        "loss": [0.1, 1e-310, -0.0, math.inf, -math.inf, math.nan, 1 / 3],
        "grad/norm": [5e-324],
    }
    manager = CheckpointManager(tmp_path)
    again = MetricTracker()
    again.load_state_dict(manager.load(manager.save(tracker(**columns).state_dict())))
    # repr, since NaN is unequal to itself and -0.0 is equal to 0.0.
    as_text = {name: list(map(repr, values)) for name, values in columns.items()}
    assert {name: list(map(repr, values)) for name, values in again.get_history().items()} == as_text
    again.update({"step": 3})
    assert again.get_history()["step"] == [1, 2**53 - 1, 3]


def test_a_running_mean_still_grows_by_ones_when_it_is_large() -> None:
    made = RunningMean(torch.device("cpu"))
    made.add(torch.tensor(2.0**24), torch.tensor(2**24))
    for _ in range(3):
        made.add(torch.tensor(1.0), torch.tensor(1))
    assert made.totals.tolist() == [2**24 + 3, 2**24 + 3]


def test_history_is_read_from_the_log_and_its_state_stays_small(tmp_path: Path) -> None:
    log, made = tmp_path / "metrics.jsonl", MetricTracker(tmp_path / "metrics.jsonl")
    with log.open("w") as file:
        for step in range(1, 10):
            made.update({"step": step, "train_loss": 1 / step, "grad_norm": math.inf})
            file.write(json.dumps({"step": step, "train_loss": 1 / step, "grad_norm": "Infinity", "mfu": 0.1}) + "\n")
            if step % 4 == 0:
                made.update({"val_step": step, "val_loss": 0.1 * step})
                file.write(json.dumps({"step": step, "epoch": 0.5, "val_loss": 0.1 * step}) + "\n")
        file.write('{"step": 10, "train_loss": 7.0}\n{"step": 12, "epoch": 1, "val_loss": 7.0}\n{"step": 13, "tra')
    saved, again = made.state_dict(), MetricTracker(log)
    assert saved == {"latest": {"step": 9, "train_loss": 1 / 9, "grad_norm": math.inf, "val_step": 8, "val_loss": 0.8}}
    again.load_state_dict(saved)
    assert again.get_history() == made.get_history()
    log.unlink()
    again.load_state_dict(saved)
    assert again.get_history() == {name: [value] for name, value in saved["latest"].items()}


def test_history_of_an_earlier_checkpoint_loads_beside_a_log(tmp_path: Path) -> None:
    again, old = MetricTracker(tmp_path / "log.jsonl"), tracker(step=[1, 2], train_loss=[2.0, 1.5])
    again.load_state_dict(old.state_dict())
    assert again.get_history() == old.get_history()
