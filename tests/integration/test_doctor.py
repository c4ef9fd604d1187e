"""The doctor: passes a sound run, and names a planted fault by the check that diagnoses it best."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fundamentallm import Config, ConfigError, ModelConfig, TrainingConfig
from fundamentallm.commands.doctor import checklist
from fundamentallm.commands.doctor.case import Case, Finding
from fundamentallm.commands.doctor.forecast import forecast
from fundamentallm.commands.doctor.main import main as doctor
from tests.integration.runs import prose

ROOT = Path(__file__).parents[2]
CHECKS = {check.name: check for check in checklist.CHECKS}
HERE = [name for name in CHECKS if name not in ("two processes", "kill and resume")]
"""Checks that start no process."""
YAML = """
output_dir: {folder}/run
model: {{d_model: 16, num_heads: 2, num_layers: 2, dropout: 0.1}}
data: {{source: {folder}/text.txt, sequence_length: 16}}
training: {{batch_size: 7, max_steps: 40, learning_rate: 1e-2, warmup_steps: 20}}
"""


def a_case(folder: Path, fault: str, **training: Any) -> Case:
    settings = {"batch_size": 8, "max_steps": 40, "learning_rate": 3e-2, "warmup_steps": 5, **training}
    config = Config(
        output_dir=str(folder / "run"), model=ModelConfig(dropout=0.1), training=TrainingConfig(**settings)
    ).resolved()
    (folder / "trials").mkdir()
    return Case(config, f"tests.integration.faults:{fault}", folder / "trials")


def examine(case: Case, *names: str) -> dict[str, Finding]:
    findings: dict[str, Finding] = {}
    for name in names:
        findings[name] = checklist.examine(CHECKS[name], case, findings)
    return findings


def status(findings: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.status for name, finding in findings.items()}


def arguments(folder: Path, *more: str) -> list[str]:
    (folder / "text.txt").write_text(prose())
    (folder / "config.yaml").write_text(YAML.format(folder=folder))
    return ["--config", str(folder / "config.yaml"), *more]


@pytest.mark.slow
def test_the_command_passes_a_sound_run_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "WORLD_SIZE"))}
    environment |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "temporary")}
    command = [sys.executable, "-m", "fundamentallm", "doctor", *arguments(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^ (\d)  (\w.*?)  +(\w+) ", done.stdout, re.MULTILINE)
    assert rows == [(str(number), name, "pass") for number, name in enumerate(CHECKS, start=1)]
    assert re.search(r"killed at step 5, resumed from [24]", done.stdout)
    for title in ("parameters", "speed", "whole run", "peak memory", "checkpoint", "disk"):
        assert f"\n    {title}" in done.stdout
    assert not (tmp_path / "run").exists()
    assert list((tmp_path / "temporary").glob("fundamentallm*")) == []


def test_a_run_of_ones_own_passes(tmp_path: Path) -> None:
    findings = examine(a_case(tmp_path, "sound"), *HERE)
    assert status(findings) == dict.fromkeys(HERE, "pass"), findings
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fault", "check", "figure", "advice"),
    [
        ("global_random_data", "data", r"training sample 0 .* global random state", r"\(seed, index\)"),
        ("own_generator_data", "data", "training sample 0 changes with every read", r"\(seed, index\)"),
        ("unseeded_model", "model", "the same weights, batch and seed give the losses", "does not govern"),
        ("unseeded_weights", "model", "other initial weights", "torch.manual_seed"),
        ("dropout_in_evaluation", "model", "in evaluation mode", "training=self.training"),
        ("mean_loss", "loss", "returns a mean", "reduction='sum'"),
        ("batch_statistics", "loss", "in evaluation mode the loss over 8 rows", "Rows must not influence each other"),
        ("loss_over_ignored", "loss", "without targets", "-100"),
        ("unused_parameter", "gradients", "reached spare.weight, spare.bias", "requires_grad_"),
        ("detached", "gradients", "reached embedding.weight", "detach"),
    ],
)
def test_a_fault_is_reported_by_the_check_that_diagnoses_it(
    tmp_path: Path, fault: str, check: str, figure: str, advice: str
) -> None:
    findings = examine(a_case(tmp_path, fault), *HERE[:-1])
    unexplained = {
        name: finding
        for name, finding in findings.items()
        if finding.status == "fail" and not finding.advice.startswith("As check")
    }
    assert list(unexplained) == [check], findings
    assert re.search(figure, unexplained[check].figure)
    assert re.search(advice, unexplained[check].advice)


def test_what_follows_from_an_earlier_fault_says_so(tmp_path: Path) -> None:
    findings = examine(a_case(tmp_path, "mean_loss"), "loss", "micro-batches", "evaluation")
    assert set(status(findings).values()) == {"fail"}
    for name in ("micro-batches", "evaluation"):
        assert findings[name].advice.startswith("As check 3 (loss) explains")


@pytest.mark.parametrize(
    ("check", "figure"),
    [
        ("micro-batches", r"micro-batches of 8 and 2: train_loss of step 1 is \S+ and \S+, apart by "),
        ("evaluation", r"val_loss is \S+ with batch size 1, \S+ with batch size 5, \S+ with batch size 8"),
    ],
)
def test_rows_that_influence_each_other_change_the_curve(tmp_path: Path, check: str, figure: str) -> None:
    finding = examine(a_case(tmp_path, "batch_statistics"), check)[check]
    assert finding.status == "fail"
    assert re.match(figure, finding.figure)


def test_a_trial_writes_into_its_own_folder_only(tmp_path: Path) -> None:
    case = a_case(tmp_path, "sound")
    config = case.make().config
    assert isinstance(config, Config)
    assert config.training.checkpoint_dir is not None
    for folder in (config.output_dir, config.training.checkpoint_dir):
        assert Path(folder).is_relative_to(case.folder)


def test_a_run_that_does_not_learn(tmp_path: Path) -> None:
    finding = examine(a_case(tmp_path, "sound", learning_rate=1e-7), "overfits")["overfits"]
    assert finding.status == "fail"
    assert "in 2,000 steps on 4 sequences" in finding.figure
    assert "training.learning_rate" in finding.advice


def test_an_exception_is_a_failure_told_once(tmp_path: Path) -> None:
    findings = examine(a_case(tmp_path, "broken_model"), *HERE)
    assert findings["data"].status == "pass"
    assert re.fullmatch(r"ZeroDivisionError: planted \(faults.py, line \d+\)", findings["model"].figure)
    assert findings["gradients"].figure == findings["model"].figure
    for name in ("gradients", "overfits"):
        assert findings[name].advice.startswith("As check 2 (model) explains")


def test_without_validation_there_is_none_to_check(tmp_path: Path) -> None:
    findings = examine(a_case(tmp_path, "no_validation"), "data", "evaluation", "gradients")
    assert status(findings) == {"data": "pass", "evaluation": "skipped", "gradients": "pass"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "check", "figure"),
    [
        ("forgetful_model", "kill and resume", r"killed at step 5, resumed from [24]: "),
        ("model_by_rank", "two processes", r"one process and two: train_loss of step 1 is "),
    ],
)
def test_a_fault_that_only_whole_runs_show(tmp_path: Path, fault: str, check: str, figure: str) -> None:
    finding = examine(a_case(tmp_path, fault), check)[check]
    assert finding.status == "fail"
    assert re.match(figure, finding.figure)


def test_the_forecast_counts_steps_validations_and_checkpoints(tmp_path: Path) -> None:
    case = a_case(tmp_path, "sound", eval_every_n_steps=16, keep_last_n=2)
    shown = dict(forecast(case.config, case.rehearsal))
    assert shown["parameters"] == "660"  # 20 x 16, and 16 x 20 + 20
    assert "40 steps of " in shown["whole run"]
    # At 16 and 32, at the ends of 6 epochs of 6 steps, and at 40.
    assert ", 9 validations of " in shown["whole run"]
    # float32 weights and two moments, the short history, and the window of the guard.
    assert 3 * 660 * 4 <= case.rehearsal.checkpoint_bytes < 5 * 660 * 4
    assert " up to 4 checkpoints (last 2, best, the one being written)" in shown["disk"]


def test_a_failed_check_shows_in_the_table_and_in_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checklist, "CHECKS", (CHECKS["data"], CHECKS["evaluation"]))
    options = arguments(
        tmp_path, "--training.batch_size", "8", "--trainer", "tests.integration.faults:own_generator_data"
    )
    assert doctor.main(options, "doctor") == 1
    output = capsys.readouterr().out
    assert " 1  data             fail     training sample 0 changes with every read" in output
    assert " -> Then no restart" in output
    assert " 2  evaluation       pass " in output
    assert "1 passed, 1 failed, in " in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("trainer", "problem"),
    [
        ("make_trainer", "--trainer is 'make_trainer'; allowed: 'module:name'"),
        ("tests.integration.faults:sund", "cannot be imported"),
        ("tests.integration.faults:not_callable", "an? int; allowed: a function from a Config to a Trainer"),
        ("tests.integration.faults:not_a_trainer", "which made a dict; allowed: "),
        ("tests.integration.faults:elsewhere", "has output_dir 'elsewhere' for "),
    ],
)
def test_a_wrong_trainer_is_a_config_error(tmp_path: Path, trainer: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        doctor.main(arguments(tmp_path, "--training.batch_size", "8", "--trainer", trainer), "doctor")


def test_all_mistakes_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError) as caught:
        doctor.main(arguments(tmp_path, "--trainer", "nowhere", "--training.max_stepz", "3"), "doctor")
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    for part in ("--training.max_stepz", "--trainer is 'nowhere'", "launched as 2 processes"):
        assert part in problems


def test_help_names_the_option_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        doctor.main(["--help"], "fundamentallm doctor")
    assert caught.value.code == 0
    assert capsys.readouterr().out.count("--trainer MODULE:NAME") == 2  # in the usage, and explained
