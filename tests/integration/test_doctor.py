"""The doctor passes a sound run and finds planted faults."""

import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from fundamentallm import Config, ConfigError, TrainingConfig
from fundamentallm.commands import doctor
from fundamentallm.commands.doctor import CHECKS, Make, main
from fundamentallm.commands.trial import make_trial
from fundamentallm.errors import Interrupted
from fundamentallm.signals import ended_by_signals
from tests.integration.runs import prose

YAML = """
output_dir: {folder}/run
model: {{d_model: 16, num_heads: 2, num_layers: 2, dropout: 0.1}}
data: {{source: {folder}/text.txt, sequence_length: 16}}
training: {{batch_size: 7, max_steps: 40, learning_rate: 1e-2, warmup_steps: 20}}
"""


def a_case(folder: Path, fault: str, **training: Any) -> Make:
    settings = {"batch_size": 8, "max_steps": 40, "learning_rate": 3e-2, "warmup_steps": 5, **training}
    config = Config(output_dir=str(folder / "run"), training=TrainingConfig(**settings)).resolved()
    (folder / "trials").mkdir()
    return functools.partial(make_trial, f"tests.integration.faults:{fault}", config, folder / "trials")


def examine(name: str, case: Make) -> tuple[str, str]:
    return doctor.examine(CHECKS[name][0], case)


def arguments(folder: Path, *more: str) -> list[str]:
    (folder / "text.txt").write_text(prose())
    (folder / "config.yaml").write_text(YAML.format(folder=folder))
    return ["--config", str(folder / "config.yaml"), *more]


def test_doctor_sound_run_passes_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert main(arguments(tmp_path), "doctor") == 0
    output = capsys.readouterr().out
    rows = re.findall(r"^ (\d)  (\w.*?)  +(\w+) ", output, re.MULTILINE)
    assert rows == [(str(number), name, "pass") for number, name in enumerate(CHECKS, start=1)]
    assert re.search(r"crashed at step 5, resumed from [24]", output)
    assert re.search(r"40 steps of .*\n.* tokens per second, .* on cpu, 1 process\n", output)
    assert not (tmp_path / "run").exists()
    assert list((tmp_path / "temporary").glob("fundamentallm*")) == []


def test_doctor_own_trainer_without_faults_passes(tmp_path: Path) -> None:
    case = a_case(tmp_path, "sound")
    assert {examine(name, case)[0] for name in CHECKS} == {"pass"}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fault", "check", "figure"),
    [
        ("own_generator_data", "data", r"training sample \d+ "),
        ("unseeded_weights", "model", r"such as embedding.weight"),
        ("unseeded_model", "model", r"train_loss of step 1|grad_norm of step 1"),
        ("dropout_in_evaluation", "model", r"in evaluation mode"),
        ("broken_model", "model", r"ZeroDivisionError: planted \(faults.py, line \d+\)"),
        ("infinite_loss", "model", r"first batch is -?inf"),
        ("batch_statistics", "micro-batches", r"micro-batches of 8 and 2: "),
        ("batch_statistics", "evaluation", r"val_loss is "),
        ("forgetful_model", "resume", r"crashed at step 5, resumed from [24]: "),
    ],
)
def test_doctor_fault_is_found_by_its_check(tmp_path: Path, fault: str, check: str, figure: str) -> None:
    status, found = examine(check, a_case(tmp_path, fault))
    assert status == "fail"
    assert re.search(figure, found)


def test_doctor_check_that_a_signal_ends_has_no_result(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), ended_by_signals():
        examine("model", a_case(tmp_path, "deaf_model"))


def test_doctor_without_validation_skips_evaluation(tmp_path: Path) -> None:
    case = a_case(tmp_path, "no_validation")
    found = {name: examine(name, case)[0] for name in ("data", "evaluation")}
    assert found == {"data": "pass", "evaluation": "skipped"}


def test_doctor_failure_is_in_the_table_and_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {name: CHECKS[name] for name in ("data", "evaluation")})
    options = arguments(tmp_path, "--training.batch_size", "8", "--trainer", "tests.integration.faults:two_faults")
    assert main(options, "doctor") == 1
    output = capsys.readouterr().out
    assert re.search(r"^ 1  data             fail     training sample \d+ ", output, re.MULTILINE)
    assert re.search(r"^ 2  evaluation  +fail (.*\n)+? +-> Fix the failures above first", output, re.MULTILINE)
    assert "2 of 2 checks failed, in " in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("trainer", ["faults:sund", "faults:not_a_trainer", "faults:elsewhere"])
def test_doctor_wrong_trainer_is_a_config_error(tmp_path: Path, trainer: str) -> None:
    trainer = f"tests.integration.{trainer}"
    with pytest.raises(ConfigError) as caught:
        main(arguments(tmp_path, "--training.batch_size", "8", "--trainer", trainer), "doctor")
    (problem,) = caught.value.problems
    assert (problem.setting, problem.value) == ("--trainer", trainer)


def test_doctor_reports_all_mistakes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError) as caught:
        main(arguments(tmp_path, "--trainer", "nowhere", "--training.max_stepz", "3"), "doctor")
    settings = [problem.setting for problem in caught.value.problems]
    assert settings == ["WORLD_SIZE", "--training.max_stepz", "--trainer"]
