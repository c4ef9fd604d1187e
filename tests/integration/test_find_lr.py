"""find_lr: the curve of real training, its suggestion, and that the run itself is not touched."""

from __future__ import annotations

import itertools
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from fundamentallm.commands.find_lr import Point, has_diverged, main, smooth, suggestion
from fundamentallm.config.yaml_format import to_yaml
from fundamentallm.errors import ConfigError, TrainingError
from fundamentallm.training.loss import CrossEntropy
from tests.conftest import reset_accelerate
from tests.integration.runs import StopAt, assert_same_weights, make_config, make_trainer, on_processes, prose, weights

RUN: dict[str, Any] = {"optimizer": "muon", "ema_decay": 0.9, "eval_every_n_steps": 3, "max_bad_steps": 1}
"""A run with settings that the range test must switch off."""


def curve(*losses: float) -> list[Point]:
    return [Point(10.0**i, loss, loss) for i, loss in enumerate(losses)]


def test_smooth_is_unbiased_at_the_start() -> None:
    assert smooth([3.0] * 9) == pytest.approx([3.0] * 9)
    assert smooth([1.0, 2.0]) == pytest.approx([1.0, (0.9 * 0.1 * 1 + 0.1 * 2) / 0.19])


@pytest.mark.parametrize(
    ("losses", "steepest"),
    [
        ((5, 4.9, 4.5, 2, 1.5, 1.4, 3), 1e3),  # 4.9 to 2 in two decades is less than 4.5 to 1.5
        ((5, 4.9, 4, 1, 0.9, math.inf), 1e2),
        ((5, 4.5, 1, 9, 9, 2), 1e1),  # the fall after the minimum is a recovery from divergence
    ],
)
def test_suggestion_is_where_the_loss_falls_fastest(losses: tuple[float, ...], steepest: float) -> None:
    assert suggestion(curve(*losses)) == steepest


@pytest.mark.parametrize("losses", [(1,), (1, 2, 3), (1, 0.9, 3), (2, math.nan)])
def test_suggestion_without_a_falling_loss_is_none(losses: tuple[float, ...]) -> None:
    assert suggestion(curve(*losses)) is None


def test_has_diverged_if_the_loss_explodes() -> None:
    assert not has_diverged([4.0, 1.0, 3.0])
    assert has_diverged([4.0] * 9 + [math.nan])
    assert has_diverged([1.0] * 9 + [50.0])


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config file in a new working directory."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(prose())
    Path("config.yaml").write_text(to_yaml(make_config("run", **RUN)))
    return Path("config.yaml")


def find(config: Path, *arguments: str) -> int:
    reset_accelerate()
    return main(["--config", str(config), "--data.source=text.txt", "--steps=30", *arguments], "find_lr")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_find_lr_writes_plot_json_and_suggestion(
    config: Path, optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find(config, f"--training.optimizer={optimizer}", "--json=out.json", "--highest=100") == 0
    found = json.loads(Path("out.json").read_text())
    rates = [point["learning_rate"] for point in found["points"]]
    assert rates[0] == pytest.approx(1e-6)
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([1e8 ** (1 / 29)] * (len(rates) - 1))
    assert found["points"][0]["loss"] == pytest.approx(math.log(70), rel=0.1)  # of an untrained model
    assert 1e-4 < found["suggestion"] < 1e2
    assert Path("find_lr.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert f"suggestion: --training.learning_rate {found['suggestion']:.1e}" in shown
    assert "smoothed" not in shown  # without --verbose
    assert sorted(path.name for path in Path().iterdir()) == ["config.yaml", "find_lr.png", "out.json", "text.txt"]


def test_find_lr_leaves_an_interrupted_run_unchanged(config: Path) -> None:
    def run(folder: str, stop_at: int = 99) -> dict[str, Tensor]:
        reset_accelerate()
        trainer = make_trainer(make_config(folder, **RUN), callbacks=[StopAt(stop_at)])
        trainer.train()
        return weights(trainer)

    whole = run("whole")
    run("run", stop_at=5)
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    assert find(config) == 0
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before
    assert_same_weights(run("run"), whole)


def _launched(count: int, config: Path) -> None:
    assert find(config, "--json=several.json") == 0


def test_find_lr_on_two_processes_equals_one(config: Path) -> None:
    on_processes(2, _launched, config)
    several = json.loads(Path("several.json").read_text())
    assert find(config, "--json=one.json") == 0
    one = json.loads(Path("one.json").read_text())
    assert several["suggestion"] == one["suggestion"]
    assert [point["loss"] for point in several["points"][:15]] == pytest.approx(
        [point["loss"] for point in one["points"][:15]], rel=1e-4
    )


def test_find_lr_reports_every_mistake_at_once(config: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find(config, "--steps=3", "--lowest=1", "--highest=0.1", "--trainer=os:sep", "--training.max_steps=0")
    found = {problem.split(" ")[0] for problem in caught.value.problems}
    assert found == {"training.max_steps", "--steps", "--lowest", "--trainer"}


def test_find_lr_without_a_suggestion_exits_with_1(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find(config, "--lowest=100", "--highest=1000", "--json=out.json") == 1
    assert len(json.loads(Path("out.json").read_text())["points"]) < 30  # it stops when the loss diverges
    assert "no suggestion: the loss did not fall" in capsys.readouterr().out


class NotFinite(nn.Module):
    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.sum() * math.nan


class Interrupts(CrossEntropy):
    def objective(self, logits: Tensor, targets: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return super().objective(logits, targets)


def test_find_lr_first_loss_not_finite_is_a_training_error(config: Path) -> None:
    with pytest.raises(TrainingError, match="the loss of the first step"):
        find(config, f"--training.loss={__name__}:NotFinite")


def test_find_lr_interrupted_suggests_nothing(config: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        find(config, f"--training.loss={__name__}:Interrupts")
    assert not Path("find_lr.png").exists()
