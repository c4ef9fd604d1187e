"""Settings in Python: every mistake at once, nothing converted, derived defaults, files, names of objects."""

import os
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from fundamentallm.config.command_line import settings
from fundamentallm.config.files import file_problems
from fundamentallm.config.registry import resolve
from fundamentallm.config.saved import flat_settings
from fundamentallm.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    TrainingConfig,
)
from fundamentallm.config.validation import fits, from_dict
from fundamentallm.errors import CheckpointError, ConfigError, Problem, ProcessLostError, report
from tests.conftest import nested, problem_of

HINTS = {name: hint for name, hint, _, _ in settings(Config)}
NUMBERS = [name for name, hint in HINTS.items() if fits(1, hint)]
FRACTIONAL = [name for name, hint in HINTS.items() if fits(0.5, hint)]


def problems(given: dict[str, Any]) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        from_dict(Config, nested(given))
    return caught.value.problems


def problem(setting: str, value: Any) -> Problem:
    """The only problem of one setting."""
    (found,) = problems({setting: value})
    return found


MISTAKES = [
    ("output_dir", 7, "text"),
    ("output_dir", "", "the path of a folder ('.' is this one)"),
    ("training.micro_batch_size", "automatic", "an integer or auto or null"),
    ("training.ema_decay", 1, "greater than 0 and less than 1"),
    ("training.batch_size_schedule", [5, 4], "a list of lists"),
    ("training.parameter_groups", ["*"], "a list of mappings"),
    ("model.dropout", 1.0, "at least 0 and less than 1"),
    ("data.source", None, "text or a mapping"),
    ("data.source", {}, "at least one source, with weights greater than 0"),
    ("data.tokenizer", "wordpiece", "'char', 'byte', 'bpe:<vocabulary size>', or the path of a tokenizer.json"),
    ("data.tokenizer", "bpe:256", "'bpe:<vocabulary size>' with a size above 256"),
    ("training.max_steps", 1.0, "an integer or null"),
    ("training.mixed_precision", False, "one of no, bf16, fp16 or null"),
    ("training.optimizer", "rmsprop", "adam, adamw, muon, sgd, or 'module:name'"),
    ("training.early_stopping_metric", "accuracy", "val_loss, val_perplexity, val_bits_per_byte"),
    ("training.resume", "no_such_folder", "auto, never, or a checkpoint's folder"),
    ("model", [1], "a mapping; in Python, a ModelConfig"),
]


@pytest.mark.parametrize(("setting", "value", "allowed"), MISTAKES)
def test_from_dict_with_a_mistake_reports_its_facts(setting: str, value: Any, allowed: str) -> None:
    (found, *_) = problems({setting: value})
    assert (found.setting, found.value, found.allowed) == (setting, value, allowed)
    assert found.startswith(f"{setting} is {value!r}")


@pytest.mark.parametrize(("key", "value"), [("r", 0), ("alpha", 0), ("dropout", 1), ("targets", "q_proj"), ("rank", 8)])
def test_lora_setting_that_is_wrong_is_named(key: str, value: Any) -> None:
    (found,) = problems({"model.pretrained": "somewhere", "model.lora": {key: value}})
    assert (found.setting, found.value) == (f"model.lora.{key}", value)


def test_lora_without_a_pretrained_model_is_refused() -> None:
    assert problem("model.lora", {}).value == {}


@pytest.mark.parametrize("value", [-1, True, float("nan"), float("inf"), float("-inf"), "1"])
def test_from_dict_refuses_a_number_not_finite_or_negative(value: Any) -> None:
    found = problems(dict.fromkeys(NUMBERS, value))
    assert sorted(one.setting for one in found) == sorted(NUMBERS)


def test_from_dict_takes_null_if_the_type_has_it() -> None:
    for setting, hint in HINTS.items():
        if type(None) in typing.get_args(hint):
            from_dict(Config, nested({setting: None}))
        else:
            assert problem(setting, None).value is None


CONFLICTS = [
    ({"model.d_model": 100}, "model.d_model", "num_heads is 8"),
    ({"training.max_steps": 10, "training.warmup_steps": 10}, "training.warmup_steps", "max_steps is 10"),
    ({"training.optimizer_options": {"x": 1}}, "training.optimizer_options", "optimizer is 'adamw'"),
    ({"data.prompt_field": "question"}, "data.prompt_field", "end_of_text is None"),
    ({"data.prompt_field": "text", "data.end_of_text": "#"}, "data.prompt_field", "text_field is 'text'"),
]


@pytest.mark.parametrize(("given", "setting", "reason"), CONFLICTS)
def test_from_dict_of_settings_in_conflict_names_both(given: dict[str, Any], setting: str, reason: str) -> None:
    (found,) = problems(given)
    assert (found.setting, found.value, found.reason) == (setting, given[setting], f"and {reason}")


def test_end_of_text_by_default_is_that_of_bpe() -> None:
    assert [DataConfig(tokenizer=spec).resolved().end_of_text for spec in ("bpe:300", "byte", "a.json")] == [
        "<|endoftext|>",
        None,
        None,
    ]
    assert DataConfig(tokenizer="bpe:300", end_of_text=None).resolved().end_of_text is None
    assert DataConfig(tokenizer="bpe:300", mask_documents=True, prompt_field="q")
    assert DataConfig(tokenizer="bpe:300").resolved(has_end=False).end_of_text is None


@pytest.mark.parametrize("schedule", [[[5, 4, 3]], [[5, 4], [5, 8]], [[5, 0]]])
def test_batch_size_schedule_must_be_pairs_in_order(schedule: list[list[int]]) -> None:
    found = problem("training.batch_size_schedule", schedule)
    assert (found.setting, found.value) == ("training.batch_size_schedule", schedule)


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"pattern": "*", "learning_rate_scale": 0}, "learning_rate_scale"),
        ({"patern": "*", "pattern": "*"}, "patern"),
        ({"frozen": True}, "pattern"),
        ({"pattern": "*", "frozen": True, "weight_decay": 0.1}, "frozen"),
    ],
)
def test_parameter_group_with_a_mistake_has_its_index(entry: dict[str, Any], key: str) -> None:
    found = problem("training.parameter_groups", [{"pattern": "*.bias"}, entry])
    assert found.setting == f"training.parameter_groups[1].{key}"


@pytest.mark.parametrize(
    ("setting", "value", "name", "near"),
    [
        ("training.resume_changes", ["data", "training.max_step"], "training.max_step", "training.max_steps"),
        ("callbacks", ["curve"], "curve", "curves"),
        ("callback_options", {"curve": {}}, "curve", "curves"),
        ("tracker_options", {"projct": "mine"}, "projct", "project"),
        ("tracker_options", {"wandb": {}}, "wandb", None),  # a known one that is not in use
    ],
)
def test_from_dict_with_an_unknown_entry_names_the_nearest(
    setting: str, value: Any, name: str, near: str | None
) -> None:
    found = problem(setting, value)
    assert (found.setting, found.value, found.advice) == (setting, name, f"Did you mean {near!r}?" if near else "")


def test_section_made_in_python_is_checked() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(learning_rate=-1, optimizer="adamm", max_bad_steps=0)
    assert {found.setting for found in caught.value.problems} == {"learning_rate", "max_bad_steps", "optimizer"}
    problem = problem_of(TrainingConfig, max_step=3)
    assert (problem.setting, problem.value, problem.advice) == ("max_step", 3, "Did you mean 'max_steps'?")


@pytest.mark.parametrize(("end", "expected"), [("<end>", "text"), (None, None)])
def test_flat_settings_of_an_earlier_version_name_what_it_did(end: str | None, expected: str | None) -> None:
    """It read special tokens in the text as text if there was an end-of-text token."""
    data = {"tokenizer": "mine.json", "end_of_text": end}
    assert flat_settings({"data": data, "training": {}}).get("data.special_tokens") == expected


# ---- derived defaults


@pytest.mark.parametrize("config", [Config(), Config(output_dir="x", model=ModelConfig(d_model=100, num_heads=5))])
def test_resolved_sets_every_derived_default(config: Config) -> None:
    resolved = config.resolved()
    derived = {name for name, _, _, text in settings(Config) if "default:" in text}
    # Only the corpus, the accelerate config or the device determine these.
    later = {
        *("model.vocab_size", "data.cache_dir", "training.micro_batch_size", "training.mixed_precision"),
        *("training.activation_checkpointing", "training.compile", "training.peak_tflops"),
    }
    for name in derived - later:
        section, _, key = name.rpartition(".")
        assert getattr(getattr(resolved, section), key) is not None, name
    assert resolved.resolved() == resolved
    assert resolved.training.checkpoint_dir == str(Path(config.output_dir, "checkpoints"))
    assert resolved.model.num_kv_heads == config.model.num_heads
    assert resolved.training.max_epochs == 1
    assert TrainingConfig(max_steps=5).resolved().max_epochs is None


def test_resolved_expands_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Config(output_dir="~/run").resolved().training.checkpoint_dir == str(tmp_path / "run" / "checkpoints")
    assert TrainingConfig(checkpoint_dir="~/saved").resolved().checkpoint_dir == str(tmp_path / "saved")
    (tmp_path / "run").touch()
    assert [found.setting for found in file_problems(Config(output_dir="~/run"))] == ["output_dir"]


# ---- the files a config names


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with some texts and folders without."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "sub/a.txt", "only_images/image.png", "only_hidden/.git/notes.txt"):
        write(tmp_path / name, "some words")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "fact"),
    [
        ("missing.txt", "no files found"),
        ("*.nothing", "no files found"),
        pytest.param("x" * 5000, "no files found", id="name too long for a file"),
        ("python-doc", "'python-docs'"),
        ("only_images", ".txt or .md"),
        ("only_hidden", ".txt or .md"),
    ],
)
def test_source_without_files_is_one_problem(folder: Path, source: str, fact: str) -> None:
    (found,) = file_problems(Config(data=DataConfig(source=source)))
    assert (found.setting, found.value) == ("data.source", source)
    assert fact in found


def test_source_with_an_unreadable_folder_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    (found,) = file_problems(Config(data=DataConfig(source=str(folder))))
    assert str(folder / "sub") in found.reason


def test_file_problems_lists_all(folder: Path) -> None:
    config = Config(
        output_dir="a.txt",
        model=ModelConfig(init_from="sub"),
        data=DataConfig(source={"missing.txt": 1, "b.txt": 1}, tokenizer="missing.json", cache_dir="a.txt/below"),
        training=TrainingConfig(checkpoint_dir="b.txt", resume="./missing"),
    )
    before = sorted(folder.rglob("*"))
    assert {(found.setting, found.value) for found in file_problems(config)} == {
        *(("output_dir", "a.txt"), ("model.init_from", "sub"), ("data.source", "missing.txt")),
        *(("data.tokenizer", "missing.json"), ("data.cache_dir", "a.txt/below")),
        *(("training.checkpoint_dir", "b.txt"), ("training.resume", "./missing")),
    }
    assert sorted(folder.rglob("*")) == before


def test_file_problems_of_init_from_on_a_new_run_only(tmp_path: Path) -> None:
    write(tmp_path / "old" / "step_00000001" / "manifest.json")

    def found(path: Path) -> list[str]:
        config = Config(output_dir=str(tmp_path / "run"), model=ModelConfig(init_from=str(path)))
        return [one.setting for one in file_problems(config)]

    assert found(tmp_path / "old" / "step_00000001") == []
    assert found(tmp_path / "old") == ["model.init_from"]
    write(tmp_path / "run" / "checkpoints" / "step_00000001" / "manifest.json")
    assert found(tmp_path / "old") == []


# ---- names of objects, and errors as a command line shows them


@pytest.fixture
def own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


def test_resolve_finds_modules_of_the_working_directory(own_path: Path) -> None:
    assert resolve("loss", "b", {"a": 1, "b": 2}) == 2
    write(own_path / "module_of_a_user.py", "answer = 42")
    assert resolve("loss", "module_of_a_user:answer", {}) == 42


@pytest.mark.parametrize("name", ["no_such_module:x", "json:no_such_name", ":x", "json:", "a b:c", ".json:loads"])
def test_resolve_of_an_unknown_module_is_a_config_error(own_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("loss", name, {})
    (found,) = caught.value.problems
    assert (found.setting, found.value) == ("loss", name)


def test_problem_puts_its_facts_into_a_sentence() -> None:
    given = Problem("batch_size", 3, "at least 4", "Set it.", "which is odd")
    assert given == "batch_size is 3, which is odd; allowed: at least 4. Set it."
    assert given.within("training") == "training." + given
    assert given.within("training").setting == "training.batch_size"
    assert Problem("source", "a.txt", text="file not found").within("data") == "data.source: file not found."
    assert Problem("", "x", "a, b", text="unknown command 'x'") == "unknown command 'x'; allowed: a, b."


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (ConfigError("a is 1."), 2, "error: a is 1.\n"),
        (ConfigError(["a is 1.", "b is 2."]), 2, "2 settings are wrong:\n  - a is 1.\n  - b is 2.\n"),
        (CheckpointError("it is damaged."), 1, "error: it is damaged.\n"),
    ],
)
def test_report_prints_on_the_first_process_only(
    error: Any, code: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert report(error) == code
    assert capsys.readouterr() == ("", shown)
    monkeypatch.setenv("RANK", "1")
    assert report(error) == code
    assert capsys.readouterr() == ("", "")


def test_report_of_lost_processes_prints_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        assert report(ProcessLostError("two are lost.", [0, 2])) == 1
        assert bool(capsys.readouterr().err) == (rank == 1)
