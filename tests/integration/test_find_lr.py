"""find_lr: the curve of real training, its suggestion, and that the run itself is not touched."""

import argparse
import itertools
import math
import re
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from fundamentallm.commands.common import DEFAULT_TRAINER
from fundamentallm.commands.find_lr import main, range_test, suggestion
from fundamentallm.config.yaml_format import to_yaml
from fundamentallm.errors import ConfigError, TrainingError
from tests.conftest import reset_accelerate
from tests.integration.runs import StopAt, assert_same_weights, make_config, make_trainer, on_processes, prose, weights

RUN: dict[str, Any] = {"optimizer": "muon", "ema_decay": 0.9, "eval_every_n_steps": 3, "max_bad_steps": 1}
"""A run with settings that the range test must switch off."""


@pytest.mark.parametrize("end", [[], [math.inf] * 3, [50.0] * 3 + [0.1] * 20])
def test_suggestion_is_where_the_loss_falls_fastest(end: list[float]) -> None:
    """Neither an explosion nor the recovery from it counts."""
    losses = [5.0] * 20 + [4.0] * 20 + [1.0] * 20 + [0.9] * 20 + end
    rates = [10.0 ** (i / 20) for i in range(len(losses))]
    found = suggestion(rates, losses)
    assert found is not None
    assert 10**1.9 < found < 10**2.3


@pytest.mark.parametrize("losses", [[1.0, 2.0, 3.0], [2.0, math.nan]])
def test_suggestion_without_a_falling_loss_is_none(losses: list[float]) -> None:
    assert suggestion([10.0**i for i in range(len(losses))], losses) is None


def suggested(capsys: pytest.CaptureFixture[str]) -> float:
    shown = re.search(r"suggestion: --training.learning_rate (\S+),", capsys.readouterr().out)
    assert shown is not None
    return float(shown[1])


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


def test_find_lr_prints_a_suggestion_and_draws_the_curve(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find(config, "--highest=100") == 0
    assert Path("find_lr.png").read_bytes().startswith(b"\x89PNG")
    assert 1e-4 < suggested(capsys) < 1e2
    assert sorted(path.name for path in Path().iterdir()) == ["config.yaml", "find_lr.png", "text.txt"]


def test_range_test_trains_at_a_rate_that_grows_exponentially(tmp_path: Path) -> None:
    options = argparse.Namespace(trainer=DEFAULT_TRAINER, steps=30, lowest=1e-6, highest=100.0)
    (tmp_path / "text.txt").write_text(prose())
    config = make_config(str(tmp_path / "run"), **RUN)
    data = replace(config.data, source=str(tmp_path / "text.txt"))
    rates, losses, _ = range_test(replace(config, data=data), options, tmp_path)
    assert rates[0] == pytest.approx(1e-6)
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([1e8 ** (1 / 29)] * (len(rates) - 1))
    assert losses[0] == pytest.approx(math.log(70), rel=0.1)  # of an untrained model


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
    with redirect_stdout(Path("several.txt").open("a")):
        assert find(config) == 0


def test_find_lr_on_two_processes_equals_one(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on_processes(2, _launched, config)
    assert find(config) == 0
    assert Path("several.txt").read_text() == capsys.readouterr().out


def test_find_lr_reports_every_mistake_at_once(config: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find(config, "--steps=3", "--lowest=1", "--highest=0.1", "--trainer=os:nowhere", "--training.max_steps=0")
    found = {problem.split(" ")[0] for problem in caught.value.problems}
    assert found == {"training.max_steps", "--steps", "--lowest", "--trainer"}


def test_find_lr_without_a_suggestion_exits_with_1(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find(config, "--lowest=100", "--highest=1000") == 1
    assert "no suggestion: the loss did not fall" in capsys.readouterr().out


class NotFinite(nn.Module):
    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.sum() * math.nan


def test_find_lr_first_loss_not_finite_is_a_training_error(config: Path) -> None:
    with pytest.raises(TrainingError, match="the loss of the first step"):
        find(config, f"--training.loss={__name__}:NotFinite")
