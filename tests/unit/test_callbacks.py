"""Callbacks: called when their docstrings say, with what they say, in a real training of a tiny model."""

from __future__ import annotations

import json
import logging
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.image
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
    VisualizationCallback,
    create_dataloaders,
)
from fundamentallm.training.callbacks.curves import THEMES, draw, smoothed
from tests.integration import runs

HOOKS = (
    "on_train_begin",
    "on_epoch_begin",
    "on_step_end",
    "on_log",
    "on_validation_end",
    "on_epoch_end",
    "on_train_end",
)


def make_trainer(
    callbacks: list[Callback], *, validation: bool = True, loss_fn: Any = None, **training: Any
) -> Trainer:
    """Two epochs of three steps, validated after each epoch, logged at every step."""
    settings = {"batch_size": 4, "max_epochs": 2, "log_every_n_steps": 1, "save_every_n_epochs": None} | training
    config = Config(data=DataConfig(sequence_length=4, train_split=0.8), training=TrainingConfig(**settings))
    train, val = create_dataloaders(np.arange(52) ** 2 % 7, None, config)
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7))
    return Trainer(model, config.training, train, val if validation else None, callbacks, loss_fn=loss_fn)


def nan_loss(logits: Any, targets: Any) -> Any:
    return logits.sum() * math.nan


class Recorder(Callback):
    """Keeps each call of a hook: its name, the step it came after, and what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, Any]] = []

    def _record(self, hook: str, trainer: Trainer, given: Any = None) -> None:
        self.calls.append((hook, trainer.global_step, given))

    def on_train_begin(self, trainer: Trainer) -> None:
        self._record("on_train_begin", trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        self._record("on_train_end", trainer)

    def on_epoch_begin(self, trainer: Trainer) -> None:
        self._record("on_epoch_begin", trainer)

    def on_epoch_end(self, trainer: Trainer) -> None:
        self._record("on_epoch_end", trainer)

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        self._record("on_step_end", trainer, loss)

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self._record("on_log", trainer, dict(metrics))

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self._record("on_validation_end", trainer, dict(metrics))

    def given(self, hook: str) -> list[Any]:
        return [given for name, _, given in self.calls if name == hook]


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if trainer.global_step == self.step:
            trainer.request_stop("asked to")


class Scores(Callback):
    """Adds a validation metric of known values."""

    def __init__(self, *scores: float) -> None:
        self.scores = scores

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        metrics["score"] = self.scores[trainer.global_step - 1]


# ---- when, and with what -------------------------------------------------------------------------------------


def test_every_hook_is_called_at_its_moment() -> None:
    recorder = Recorder()
    make_trainer([recorder], log_every_n_steps=2).train()
    assert [(hook, step) for hook, step, _ in recorder.calls] == [
        ("on_train_begin", 0),
        ("on_epoch_begin", 0),
        ("on_step_end", 1),
        ("on_step_end", 2),
        ("on_log", 2),
        ("on_step_end", 3),
        ("on_validation_end", 3),
        ("on_epoch_end", 3),
        ("on_epoch_begin", 3),
        ("on_step_end", 4),
        ("on_log", 4),
        ("on_step_end", 5),
        ("on_step_end", 6),
        ("on_log", 6),
        ("on_validation_end", 6),
        ("on_epoch_end", 6),
        ("on_train_end", 6),
    ]


def test_a_resumed_run_begins_within_its_epoch(tmp_path: Path) -> None:
    make_trainer([StopAt(2)], checkpoint_dir=str(tmp_path)).train()
    recorder = Recorder()
    make_trainer([recorder], checkpoint_dir=str(tmp_path)).train()
    hooks = [(hook, step) for hook, step, _ in recorder.calls if hook != "on_log"]
    assert hooks[:5] == [
        ("on_train_begin", 2),
        ("on_epoch_begin", 2),
        ("on_step_end", 3),
        ("on_validation_end", 3),
        ("on_epoch_end", 3),
    ]


def test_a_step_gives_its_mean_loss_as_a_float() -> None:
    recorder = Recorder()
    history = make_trainer([recorder]).train()
    losses = recorder.given("on_step_end")
    assert list(map(type, losses)) == [float] * 6
    assert losses == pytest.approx(history["train_loss"], rel=1e-6)


def test_a_log_gives_the_line_that_enters_the_history() -> None:
    recorder = Recorder()
    history = make_trainer([recorder], validation=False).train()
    lines = recorder.given("on_log")
    assert {key: [line[key] for line in lines] for key in lines[0] if key != "memory_gb"} == history
    assert history["step"] == [1, 2, 3, 4, 5, 6]


def test_a_validation_gives_what_validate_returns_under_the_same_names() -> None:
    recorder = Recorder()
    trainer = make_trainer([recorder])
    history = trainer.train()
    first, last = recorder.given("on_validation_end")
    assert last == trainer.validate()
    assert set(last) == {"val_loss", "val_perplexity"}
    validated = {step: loss for step, loss in zip(history["step"], history["val_loss"], strict=True) if loss == loss}
    assert validated == {3: first["val_loss"], 6: last["val_loss"]}
    assert not [name for name in history if name.startswith("val_val_")]


# ---- the list ------------------------------------------------------------------------------------------------


def test_callbacks_are_called_in_the_order_they_were_added() -> None:
    seen: list[tuple[str, Callback]] = []

    class InTurn(Recorder):
        def _record(self, hook: str, trainer: Trainer, given: Any = None) -> None:
            seen.append((hook, self))

    first, second, third = InTurn(), InTurn(), InTurn()
    trainer = make_trainer([first])
    trainer.callbacks.add(second)
    trainer.callbacks.add(third)
    trainer.callbacks.remove(second)
    trainer.train()
    assert {hook for hook, _ in seen} == set(HOOKS)
    assert [me for _, me in seen] == [first, third] * (len(seen) // 2)
    assert [hook for hook, _ in seen[::2]] == [hook for hook, _ in seen[1::2]]


def test_the_list_given_is_not_changed() -> None:
    given: list[Callback] = []
    CallbackList(given).add(Callback())
    assert given == []


def test_what_callbacks_measure_is_in_the_line_and_not_in_the_history(tmp_path: Path) -> None:
    class Thermometer(Callback):
        def measure(self, trainer: Trainer) -> dict[str, float]:
            return {"degrees": 20.0 + trainer.global_step}

    history = make_trainer([LoggingCallback(tmp_path / "log.jsonl"), Thermometer()], validation=False).train()
    written = [json.loads(line)["degrees"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert written == [21.0, 22.0, 23.0, 24.0, 25.0, 26.0]
    assert "degrees" not in history


def test_removing_what_is_not_there_is_an_error() -> None:
    callbacks = CallbackList([Callback()])
    with pytest.raises(ValueError, match="not in list"):
        callbacks.remove(Callback())


def test_a_callback_that_removes_itself_takes_no_call_from_the_next() -> None:
    class Once(Callback):
        def on_epoch_begin(self, trainer: Trainer) -> None:
            trainer.callbacks.remove(self)

    recorder = Recorder()
    make_trainer([Once(), recorder]).train()
    assert [step for hook, step, _ in recorder.calls if hook == "on_epoch_begin"] == [0, 3]


@pytest.mark.parametrize("hook", HOOKS)
def test_an_exception_in_any_hook_reaches_the_caller(hook: str) -> None:
    class Broken(Callback):
        pass

    def fail(*_: Any) -> None:
        raise LookupError(hook)

    setattr(Broken, hook, fail)
    later = Recorder()
    with pytest.raises(LookupError, match=hook):
        make_trainer([Broken(), later]).train()
    assert hook not in {name for name, _, _ in later.calls}


def test_the_step_loss_is_wanted_only_where_the_hook_is_overridden() -> None:
    callbacks = CallbackList([Callback(), LoggingCallback(), ProgressCallback(), SaveBestCallback()])
    assert not callbacks.wants_step_loss
    callbacks.add(Recorder())
    assert callbacks.wants_step_loss


def test_a_callback_without_hooks_is_no_hindrance() -> None:
    assert make_trainer([Callback()]).train()["step"] == [1, 2, 3, 4, 5, 6]


def test_each_callback_gets_its_own_state_back_also_among_others_of_its_class() -> None:
    saved, again = (CallbackList([Callback(), *(SaveBestCallback() for _ in range(3))]) for _ in range(2))
    for value, callback in enumerate(saved.callbacks[1:]):
        callback.best_value = float(value)
    state = saved.state_dict()
    assert len(state) == 3
    again.load_state_dict(state)
    assert [callback.best_value for callback in again.callbacks[1:]] == [0.0, 1.0, 2.0]


def test_a_callback_on_one_side_only_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Counter(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"count": 1}

    with caplog.at_level(logging.WARNING):
        CallbackList([SaveBestCallback(), Callback()]).load_state_dict(CallbackList([Counter()]).state_dict())
    assert len(caplog.messages) == 2
    assert "SaveBestCallback starts afresh" in caplog.text
    assert "Counter is in the checkpoint and not in this run" in caplog.text


# ---- the best checkpoint -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "best", "marked"), [("min", 4, [2, 4]), ("max", 5, [2, 3, 5])])
def test_each_improvement_is_saved_as_the_best(tmp_path: Path, mode: str, best: int, marked: list[int]) -> None:
    scores = Scores(math.nan, 3.0, 4.0, 1.0, 5.0, math.nan)
    trainer = make_trainer(
        [scores, SaveBestCallback("score", mode)], checkpoint_dir=str(tmp_path), eval_every_n_steps=1, keep_last_n=9
    )
    trainer.train()
    assert trainer.checkpoint_manager.get_best() == tmp_path / f"step_{best:08d}"
    assert trainer.checkpoint_manager.load(tmp_path / f"step_{best:08d}")["progress_state_dict"]["step"] == best
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [f"step_{step:08d}" for step in (*marked, 6)]


def test_the_best_so_far_survives_a_restart(tmp_path: Path) -> None:
    def run(*scores: float, stop: int) -> Trainer:
        callbacks = [Scores(*scores), SaveBestCallback("score"), StopAt(stop)]
        trainer = make_trainer(callbacks, checkpoint_dir=str(tmp_path), eval_every_n_steps=1, keep_last_n=1)
        trainer.train()
        return trainer

    run(3.0, 2.0, 2.5, stop=3)
    trainer = run(0.0, 0.0, 0.0, 2.25, 2.5, 2.0, stop=6)
    assert trainer.checkpoint_manager.get_best() == tmp_path / "step_00000002"


def test_a_metric_that_validation_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(ConfigError, match="the metric is 'accuracy'; allowed: val_loss, val_perplexity"):
        make_trainer([SaveBestCallback("accuracy")]).train()


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="mode is 'least'; allowed: min, max"):
        SaveBestCallback(mode="least")


# ---- log lines -----------------------------------------------------------------------------------------------


def strict_lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def columns(lines: list[dict[str, Any]], of: str) -> dict[str, list[float]]:
    chosen = [line for line in lines if of in line]
    return {key: [line[key] for line in chosen] for key in chosen[0]}


def test_lines_hold_the_history_in_full_precision(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    trainer = make_trainer([LoggingCallback(path)])
    trainer.train()
    history = trainer.metrics.get_history()
    training, validation = (columns(strict_lines(path), of) for of in ("train_loss", "val_loss"))
    training.pop("memory_gb")  # which the machine says
    assert training == {name: values for name, values in history.items() if not name.startswith("val_")}
    assert validation.pop("step") == history["val_step"]
    assert validation.pop("epoch") == [1.0, 2.0]
    assert validation == {name: history[name] for name in ("val_loss", "val_perplexity")}


def test_a_resumed_run_goes_on_where_its_checkpoint_is(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def run(stop: int) -> dict[str, list[float]]:
        return make_trainer([LoggingCallback(path), StopAt(stop)], checkpoint_dir=str(tmp_path / "c")).train()

    run(stop=4)
    before = path.read_text()
    # What a run leaves that was killed after its last checkpoint, in the middle of a line.
    path.write_text(before + '{"step": 5, "train_loss": 9.0}\n{"step": 6, "val_loss": 9.0}\n{"step": 4, "train_lo')
    history = run(stop=6)
    assert path.read_text().startswith(before)
    training, validation = (columns(strict_lines(path), of) for of in ("train_loss", "val_loss"))
    training.pop("memory_gb")  # which the machine says
    assert training == {name: values for name, values in history.items() if not name.startswith("val_")}
    assert training["step"] == [1, 2, 3, 4, 5, 6]
    assert validation["step"] == [3, 6]
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["metrics.jsonl"]


def test_a_torn_line_at_the_place_of_resuming_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 0, "tokens": 12}')
    make_trainer([LoggingCallback(path)], max_epochs=None, max_steps=1, validation=False).train()
    assert [line["step"] for line in strict_lines(path)] == [0, 1]


def test_numbers_that_json_lacks_are_written_as_text(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    make_trainer([LoggingCallback(path)], loss_fn=nan_loss).train()
    lines = strict_lines(path)
    assert columns(lines, "train_loss")["train_loss"] == ["NaN"] * 6
    assert columns(lines, "val_loss")["val_loss"] == ["NaN"] * 2
    assert columns(lines, "val_loss")["val_perplexity"] == ["Infinity"] * 2
    log = LoggingCallback(tmp_path / "other.jsonl")
    log.on_log(make_trainer([]), {"step": 1, "down": -math.inf, "up": math.inf})
    assert strict_lines(tmp_path / "other.jsonl") == [{"step": 1, "down": "-Infinity", "up": "Infinity"}]


def test_without_a_path_lines_go_to_the_console_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    history = make_trainer([LoggingCallback()]).train()
    shown = capsys.readouterr().out
    assert "119 parameters, 1 process on cpu, 6 steps of 4 sequences" in shown
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("step ")] == list("12334566")
    assert f"val_loss {history['val_loss'][-1]:.4g}" in shown
    assert list(tmp_path.iterdir()) == []


# ---- the bar -------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    """What is captured, taken for a terminal."""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: True)
    return capsys


def test_into_a_file_go_lines_and_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer([ProgressCallback(), LoggingCallback()]).train()
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("train_loss") == 6


def test_on_a_terminal_the_bar_stands_for_the_training_lines(terminal: pytest.CaptureFixture[str]) -> None:
    history = make_trainer([ProgressCallback(), LoggingCallback()]).train()
    captured = terminal.readouterr()
    assert "train_loss" not in captured.out
    last = captured.err.replace("\r", "\n").rstrip().splitlines()[-1]
    assert last.startswith("training: 100%")
    assert "6/6" in last
    assert f"loss {history['train_loss'][-1]:.4f}, lr {history['learning_rate'][-1]:.2e}, " in last
    assert "tok/s" in last
    assert "training:" not in captured.out


def test_the_bar_of_a_resumed_run_begins_where_the_run_does(
    tmp_path: Path, terminal: pytest.CaptureFixture[str]
) -> None:
    make_trainer([StopAt(4)], checkpoint_dir=str(tmp_path)).train()
    terminal.readouterr()
    make_trainer([ProgressCallback()], checkpoint_dir=str(tmp_path), log_every_n_steps=5).train()
    bars = [line for line in terminal.readouterr().err.replace("\r", "\n").splitlines() if line.strip()]
    assert "4/6" in bars[0]
    assert "6/6" in bars[-1]


def test_the_bar_ends_where_the_run_stopped(terminal: pytest.CaptureFixture[str]) -> None:
    class StopBetweenLogs(Callback):
        def on_step_end(self, trainer: Trainer, loss: float) -> None:
            if trainer.global_step == 5:
                trainer.request_stop("asked to")

    make_trainer([ProgressCallback(), StopBetweenLogs()], log_every_n_steps=4).train()
    bars = [line for line in terminal.readouterr().err.replace("\r", "\n").splitlines() if line.strip()]
    assert "5/6" in bars[-1]


# ---- the picture ---------------------------------------------------------------------------------------------

INK, ACCENT = (0x33, 0x65, 0x8A), (0xD1, 0x49, 0x5B)


def pixels(path: Path, colour: tuple[int, int, int]) -> int:
    picture = matplotlib.image.imread(path)[..., :3]
    return int((abs(picture - np.array(colour) / 255).max(axis=-1) < 0.01).sum())


@pytest.mark.parametrize("validation", [True, False])
def test_the_picture_shows_the_curves_there_are(tmp_path: Path, validation: bool) -> None:
    path = tmp_path / "new" / "curves.png"
    make_trainer([VisualizationCallback(path)], validation=validation).train()
    height, width, _ = matplotlib.image.imread(path).shape
    assert (width, height) == (1300, 910)
    assert pixels(path, INK) > 500
    assert (pixels(path, ACCENT) > 100) is validation
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]


@pytest.mark.filterwarnings("error")
def test_a_run_without_finite_losses_is_drawn_too(tmp_path: Path) -> None:
    make_trainer([VisualizationCallback(tmp_path / "curves.png")], loss_fn=nan_loss).train()
    assert matplotlib.image.imread(tmp_path / "curves.png").std() > 0.01


@pytest.mark.parametrize(("refresh", "drawn_from"), [(0.0, "on_log"), (1e9, "on_validation_end")])
def test_the_picture_is_refreshed_as_it_trains(tmp_path: Path, refresh: float, drawn_from: str) -> None:
    path, seen = tmp_path / "curves.png", []

    class Look(Recorder):
        def _record(self, hook: str, trainer: Trainer, given: Any = None) -> None:
            seen.append((hook, path.exists()))

    make_trainer([VisualizationCallback(path, refresh), Look()], max_epochs=1).train()
    assert [exists for _, exists in seen] == sorted(exists for _, exists in seen)
    assert next(hook for hook, exists in seen if exists) == drawn_from


def test_each_drawing_has_what_came_since_the_last(tmp_path: Path) -> None:
    pictures = []

    class Keep(Callback):
        def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            pictures.append((tmp_path / "curves.png").read_bytes())

    make_trainer([VisualizationCallback(tmp_path / "curves.png", 0.0), Keep()], validation=False, max_epochs=1).train()
    assert len(pictures) == 3
    assert all(earlier != later for earlier, later in pairwise(pictures))


def test_restarts_and_steps_that_were_left_out_are_marked() -> None:
    history = {
        "step": [10, 20, 30, 40],
        "bad_steps": [0, 2, 2, 3],
        **{name: [4.0, 3.0, 2.0, 1.0] for name in ("train_loss", "learning_rate", "grad_norm", "tokens_per_second")},
    }
    axis = draw(history, [15, 25], 100, THEMES["light"], "run").axes[0]
    drawn = {line.get_label(): list(line.get_xdata()) for line in axis.lines}
    assert drawn["not finite (3)"] == [20, 40]
    assert [list(line.get_xdata()) for line in axis.lines[:2]] == [[15, 15], [25, 25]]
    assert drawn["started again (2)"] == [15, 15]
    assert axis.get_xlim() == (0, 100)


def test_the_picture_of_a_run_says_where_it_was_started_again(tmp_path: Path) -> None:
    def trainer(*callbacks: Callback) -> Trainer:
        return runs.make_trainer(runs.make_config(tmp_path, checkpoint_dir=str(tmp_path / "c")), callbacks=[*callbacks])

    trainer(StopAt(5)).train()
    picture = VisualizationCallback(tmp_path / "curves.png", theme="dark")
    trainer(picture).train()
    assert picture._restarts == [5]
    corner = matplotlib.image.imread(picture.path)[0, 0, :3]
    assert corner == pytest.approx(np.array((0x14, 0x18, 0x1D)) / 255, abs=0.01)
    with pytest.raises(ConfigError, match="theme is 'sepia'; allowed: light, dark"):
        VisualizationCallback(theme="sepia")


def test_a_smoothed_curve_keeps_its_ends_and_passes_over_gaps() -> None:
    values = [float(n) for n in range(200)]
    assert smoothed(values) == pytest.approx(values)
    values[100] = math.nan
    assert smoothed(values)[99:102] == pytest.approx([98.5, 100, 101.5], abs=1.5)
    assert math.isnan(smoothed([math.nan])[0])


def test_a_missing_matplotlib_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'fundamentallm\[plots\]'"):
        VisualizationCallback()
