"""Callbacks in real runs of a tiny model: when hooks are called and with what, the best checkpoint, the console."""

import functools
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from fundamentallm import (
    Callback,
    CallbackList,
    Config,
    ConfigError,
    DataConfig,
    LoggingCallback,
    ProgressCallback,
    SaveBestCallback,
    Trainer,
    TrainingConfig,
    create_dataloaders,
)
from fundamentallm.training.callbacks import console, make_callbacks
from fundamentallm.training.callbacks.base import RunView
from tests.integration.runs import StopAt
from tests.unit.stub_run import make_stub


def make_trainer(callbacks: list[Callback], *, validation: bool = True, **training: Any) -> Trainer:
    """Two epochs of three steps, validated after each epoch, logged at every step."""
    settings = {"batch_size": 4, "max_epochs": 2, "log_every_n_steps": 1, "save_every_n_epochs": None} | training
    config = Config(data=DataConfig(sequence_length=4, train_split=0.8), training=TrainingConfig(**settings))
    train, val = create_dataloaders(np.arange(52) ** 2 % 7, None, config)
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7))
    return Trainer(model, config.training, train, val if validation else None, callbacks)


class Recorder(Callback):
    """Keeps each call of a hook: its name, the step it came after, and what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, Any]] = []
        for hook in ("on_train_begin", "on_epoch_begin", "on_epoch_end", "on_train_end", "on_log", "on_validation_end"):
            setattr(self, hook, functools.partial(self._record, hook))

    def _record(self, hook: str, trainer: RunView, given: Any = None) -> None:
        self.calls.append((hook, trainer.global_step, given))

    def on_step_end(self, trainer: RunView, loss: float) -> None:
        self._record("on_step_end", trainer, loss)

    def given(self, hook: str) -> list[Any]:
        return [given for name, _, given in self.calls if name == hook]


# ---- when, and with what -------------------------------------------------------------------------------------


def test_hooks_are_called_in_order_also_when_resuming_in_an_epoch(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    make_trainer([first, StopAt(2)], checkpoint_dir=str(tmp_path), log_every_n_steps=2).train()
    make_trainer([second], checkpoint_dir=str(tmp_path), log_every_n_steps=2).train()
    begin = [("on_train_begin", 0), ("on_epoch_begin", 0), ("on_step_end", 1), ("on_step_end", 2), ("on_log", 2)]
    assert [(hook, step) for hook, step, _ in first.calls] == [*begin, ("on_train_end", 2)]
    assert [(hook, step) for hook, step, _ in second.calls] == [
        ("on_train_begin", 2),
        ("on_epoch_begin", 2),
        *[("on_step_end", 3), ("on_validation_end", 3), ("on_epoch_end", 3), ("on_epoch_begin", 3)],
        *[("on_step_end", 4), ("on_log", 4), ("on_step_end", 5), ("on_step_end", 6), ("on_log", 6)],
        *[("on_validation_end", 6), ("on_epoch_end", 6), ("on_train_end", 6)],
    ]


def test_hooks_get_the_loss_as_a_float_and_what_validate_returns() -> None:
    recorder = Recorder()
    trainer = make_trainer([recorder])
    history = trainer.train()
    losses = recorder.given("on_step_end")
    assert list(map(type, losses)) == [float] * 6
    assert losses == pytest.approx(history["train_loss"], rel=1e-6)
    first, last = recorder.given("on_validation_end")
    assert last == trainer.validate()
    assert set(last) == {"val_loss", "val_perplexity"}
    validated = {step: loss for step, loss in zip(history["step"], history["val_loss"], strict=True) if loss == loss}
    assert validated == {3: first["val_loss"], 6: last["val_loss"]}
    assert not [name for name in history if name.startswith("val_val_")]


# ---- the list ------------------------------------------------------------------------------------------------


def test_measure_adds_to_the_line_but_not_to_the_history(tmp_path: Path) -> None:
    class Thermometer(Callback):
        def measure(self, trainer: RunView) -> dict[str, float]:
            return {"degrees": 20.0 + trainer.global_step}

    history = make_trainer([LoggingCallback(tmp_path / "log.jsonl"), Thermometer()], validation=False).train()
    written = [json.loads(line)["degrees"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert written == [21.0, 22.0, 23.0, 24.0, 25.0, 26.0]
    assert "degrees" not in history


def test_callbacks_are_called_in_order_and_may_remove_themselves() -> None:
    called: list[Callback] = []

    class Each(Callback):
        def on_epoch_begin(self, trainer: RunView) -> None:
            called.append(self)

    class Once(Each):
        def on_epoch_begin(self, trainer: RunView) -> None:
            called.append(self)
            trainer.callbacks.remove(self)

    first, once, last = Each(), Once(), Each()
    make_trainer([first, once, last]).train()
    assert called == [first, once, last, first, last]


def test_state_dict_numbers_callbacks_of_one_class() -> None:
    saved, again = (CallbackList([Callback(), *(SaveBestCallback() for _ in range(3))]) for _ in range(2))
    for value, callback in enumerate(saved.callbacks[1:]):
        callback.best_value = float(value)
    state = saved.state_dict()
    assert sorted(state) == ["SaveBestCallback", "SaveBestCallback_2", "SaveBestCallback_3"]
    again.load_state_dict(state)
    assert [callback.best_value for callback in again.callbacks[1:]] == [0.0, 1.0, 2.0]


def test_load_state_dict_warns_of_callbacks_on_one_side(caplog: pytest.LogCaptureFixture) -> None:
    class Counter(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"count": 1}

    with caplog.at_level(logging.WARNING):
        CallbackList([SaveBestCallback(), Callback()]).load_state_dict(CallbackList([Counter()]).state_dict())
    ignored, missing = caplog.messages
    assert "Counter" in ignored
    assert "SaveBestCallback" in missing


def test_on_train_abort_that_raises_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Callback):
        def on_train_begin(self, trainer: RunView) -> None:
            raise LookupError("the cause")

        def on_train_abort(self, trainer: RunView) -> None:
            raise ValueError("another one")

    with pytest.raises(LookupError, match="the cause"):
        make_trainer([Broken()]).train()
    assert "another one" in caplog.text


# ---- the best checkpoint -------------------------------------------------------------------------------------


def steps_saved(callback: SaveBestCallback, *scores: float) -> list[int]:
    stub = make_stub(None)
    for stub.global_step, score in enumerate(scores, start=1):
        callback.on_validation_end(stub, {"score": score})
    assert all(is_best for _, is_best in stub.saves)
    return [step for step, _ in stub.saves]


@pytest.mark.parametrize(("mode", "saved"), [("min", [2, 4]), ("max", [2, 3, 5])])
def test_save_best_saves_each_improvement(mode: str, saved: list[int]) -> None:
    assert steps_saved(SaveBestCallback("score", mode), math.nan, 3.0, 4.0, 1.0, 5.0, math.nan) == saved


def test_save_best_resumes_the_best_value_of_its_metric_only(caplog: pytest.LogCaptureFixture) -> None:
    first, second, other = SaveBestCallback("score"), SaveBestCallback("score"), SaveBestCallback("score", "max")
    assert steps_saved(first, 3.0, 2.0, 2.5) == [1, 2]
    second.load_state_dict(first.state_dict())
    assert steps_saved(second, 2.25, 1.5) == [2]
    other.load_state_dict(first.state_dict())
    assert steps_saved(other, 1.0) == [1]
    assert "score (min)" in caplog.text


def test_save_best_by_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        make_trainer([SaveBestCallback("accuracy")]).train()
    (problem,) = error.value.problems
    assert (problem.setting, problem.value, problem.allowed) == ("metric", "accuracy", "val_loss, val_perplexity")


# ---- from a config -------------------------------------------------------------------------------------------


def test_make_callbacks_makes_the_named_ones_and_curves() -> None:
    options = {"profiler": {"num_steps": 7}, "curves": {"theme": "dark"}}
    config = Config(callbacks=["profiler"], callback_options=options)
    curves, profiler = make_callbacks(config)
    assert (type(curves).__name__, curves.theme) == ("VisualizationCallback", "dark")
    assert profiler.num_steps == 7


def test_make_callbacks_lists_every_problem() -> None:
    options = {"profiler": {"num_steps": 0}, "curves": {"color": 1}}
    names = ["profiler", "tests.unit.test_callbacks:make_trainer"]
    with pytest.raises(ConfigError) as error:
        make_callbacks(Config(callbacks=names, callback_options=options))
    assert [(problem.setting, problem.value) for problem in error.value.problems] == [
        ("callback_options.curves", {"color": 1}),
        ("callback_options.profiler.num_steps", 0),
        ("callbacks", "tests.unit.test_callbacks:make_trainer"),
    ]


def test_make_callbacks_without_matplotlib_needs_no_curves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert make_callbacks(Config()) == []
    assert "curves.png" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="matplotlib"):
        make_callbacks(Config(callbacks=["curves"]))


# ---- log lines -----------------------------------------------------------------------------------------------


def test_logging_without_a_path_only_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    history = make_trainer([LoggingCallback()]).train()
    shown = capsys.readouterr().out
    for fact in ("119 parameters", "float32", "1 process on cpu", "AdamW", "3.0e-04", "6 steps of 4 sequences"):
        assert fact in shown
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("step ")] == [
        f"{n}/6" for n in "12334566"
    ]
    assert f"val_loss {history['val_loss'][-1]:.4g}" in shown
    assert f"loss {history['train_loss'][-1]:.3f} | lr " in shown
    assert list(tmp_path.iterdir()) == []


# ---- the bar -------------------------------------------------------------------------------------------------


def test_progress_on_a_terminal_moves_with_every_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Eager(console.tqdm):
        def __init__(self, **options: Any) -> None:
            super().__init__(mininterval=0, **options)

    monkeypatch.setattr(console, "tqdm", Eager)
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: True)
    for stop, steps in ((5, range(6)), (6, (5, 6))):
        callbacks = [ProgressCallback(), LoggingCallback(), StopAt(stop)]
        make_trainer(callbacks, checkpoint_dir=str(tmp_path), log_every_n_steps=3).train()
        captured = capsys.readouterr()
        assert captured.out.count(" | loss ") > 0  # they stay on the screen
        shown = captured.err.replace("\r", "\n")
        assert [step for step in range(7) if f" {step}/6 " in shown] == list(steps)
        assert "training:" not in captured.out
