"""The command line: YAML and options to one config, every mistake at once, nothing left behind."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fundamentallm import __main__ as commands, train
from fundamentallm.config.command_line import parse_config, settings
from fundamentallm.config.schema import Config, DataConfig, TrainingConfig
from fundamentallm.config.yaml_format import from_yaml, to_yaml
from fundamentallm.errors import ConfigError, Problem
from tests.conftest import nested

SETTINGS = [name for name, _, _, _ in settings(Config)]
CHOSEN = {
    "output_dir": "elsewhere",
    "callback_options": {"curves": {"theme": "dark"}},
    "trackers": ["wandb"],
    "tracker_options": {"project": "mine", "wandb": {"tags": ["small"]}},
    "data.source": "rows.jsonl",
    "data.tokenizer": "byte",
    "training.mixed_precision": "no",
    "training.micro_batch_size": "auto",
    "training.warmup_steps": 1,
    "training.learning_rate": 0.5,
    "training.batch_size_schedule": [[5, 4], [9, 8]],
    "training.parameter_groups": [{"pattern": "*.bias", "frozen": True}],
    "model.pretrained": "elsewhere",
    "model.lora": {"r": 4, "alpha": 8.0, "dropout": 0.1, "targets": ["q_proj"]},
    "model.qk_norm": False,
}
"""A setting of each type."""

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file into the working directory, a new folder; returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(content: str | bytes, name: str = "config.yaml") -> str:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return write


def problems(*arguments: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        parse_config(arguments)
    return caught.value.problems


def value_of(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def test_parse_config_takes_settings_from_yaml_and_options(write: Write) -> None:
    write('{"text": "x"}\n', "rows.jsonl")
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in CHOSEN.items()}
    from_file = parse_config(["--config", write(json.dumps(nested(CHOSEN)))])
    assert {name: value_of(from_file, name) for name in CHOSEN} == CHOSEN
    assert parse_config([f"--{name}={text}" for name, text in texts.items()]) == from_file
    assert parse_config([word for name, text in texts.items() for word in (f"--{name}", text)]) == from_file


def test_parse_config_option_overrides_the_file(write: Write) -> None:
    config = write("training: {seed: 5, warmup_steps: 6}\nsample_tokens: 7")
    read = parse_config(["--config", config, "--training.seed", "1", "--training.seed", "2"])
    assert (read.training.seed, read.training.warmup_steps, read.sample_tokens) == (2, 6, 7)
    assert read.training.learning_rate == TrainingConfig.learning_rate


# ---- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, word) for word in ("no", "yes", "on", "off", "y", "N", "12:30", "2024-01-01", "1_000", "1e", "=")),
        *(("true", True), ("False", False), ("null", None), ("~", None), ("", None)),
        *(("1e-4", 1e-4), ("1e4", 1e4), ("-.5", -0.5), ("1.", 1.0), (".inf", float("inf"))),
        *(("010", 10), ("-3", -3), ("'1'", "1")),
        ("a: &here größe✓\nb: *here", {"a": "größe✓", "b": "größe✓"}),
    ],
)
def test_from_yaml_reads_the_scalars_of_yaml_1_2(text: str, value: Any) -> None:
    assert from_yaml(text) == value
    assert type(from_yaml(text)) is type(value)


def test_from_yaml_merges_mappings_below_own_keys() -> None:
    assert from_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}")["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ("model: {d_model: 8}\nseed: 1\nmodel: {d_ff: 8}", "line 3: 'model' is given twice"),
        ("model:\n  d_model: 8: 9", "line 2: mapping values are not allowed here"),
        ("model: {d_model: 8", "line 1: while parsing a flow mapping"),
        ("\n\tmodel: {}", "line 2: while scanning"),
        ("[a]: 2", "line 1: while constructing a mapping, found unhashable key"),
        ("output_dir: !!python/object/apply:os.getcwd []", "line 1: could not determine a constructor"),
        ("output_dir: !!int x", "'x'"),
        ("output_dir: \0", "character #x0000"),
        (b"output_dir: \xe9", "'utf-8' codec"),
        ("7", "mapping"),
    ],
)
def test_parse_config_of_a_bad_file_names_the_line(write: Write, content: str | bytes, fact: str) -> None:
    (found,) = problems("--config", write(content))
    assert (found.setting, found.value) == ("--config", "config.yaml")
    assert fact in found


@pytest.mark.parametrize("content", ["", "\ufeffmodel: {}"])
def test_parse_config_of_an_empty_file_is_the_default(write: Write, content: str) -> None:
    assert parse_config(["--config", write(content)]) == Config().resolved()


TEXTS = [
    *("no", "7", "null", "~", "a: b", "# a", " a ", "größe✓", "a\nb", "a\n\n b\n", 'it\'s "so"', "1e-4", "2024-01-01"),
    *("\t", "", "- a", "{a}", "[a", "*a", "&a", "!a", "%a", "@a", "a\\nb", "\u2028", "\x07", "word " * 60, "010", "<<"),
]


def test_to_yaml_writes_text_and_numbers_that_read_back_equal(write: Write) -> None:
    numbers = [1e-8, 0.1 + 0.2, 5e-324, 1e22, 1.7976931348623157e308, 3, 10**15, -1e-4]
    config = Config(
        callbacks=[f"a:{text}" for text in TEXTS],
        data=DataConfig(end_of_text=" a: #\n"),
        training=TrainingConfig(
            optimizer="a:b", optimizer_options={text: text for text in TEXTS}, loss_options={"x": numbers}
        ),
    ).resolved()
    read = parse_config(["--config", write(to_yaml(config))])
    assert read == config
    assert list(map(type, read.training.loss_options["x"])) == list(map(type, numbers))
    assert list(from_yaml(to_yaml({"b": 1, "a": 2}))) == ["b", "a"]


# ---- options


AS_IT_IS = ("7", "null", "true", "1e3", "[", "a: b", "*a", "2024-99-99", "!!int x", "no", "", "try #2", "'a:b'", " a")


def test_parse_config_keeps_the_text_of_a_text_setting(write: Write) -> None:
    for text in AS_IT_IS:
        for arguments in (["--data.text_field", text], [f"--data.text_field={text}"]):
            assert parse_config(arguments, check_files=False).data.text_field == text
    for name in ("output_dir", "data.source", "data.cache_dir", "model.init_from", "training.loss"):
        assert value_of(parse_config([f"--{name}", "[a: b] #2"], check_files=False), name) == "[a: b] #2"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("training.learning_rate", "1e-4", 1e-4),
        ("training.gradient_clip_norm", "null", None),
        ("data.cache_dir", "7", "7"),
        ("data.cache_dir", "null", None),
        ("training.loss_options", "{gamma: 1e-1}", {"gamma": 0.1}),
        ("data.source", "{a.txt: 1, b.txt: 0.5}", {"a.txt": 1, "b.txt": 0.5}),
        ("data.suffixes", "[.x, no]", [".x", "no"]),
    ],
)
def test_parse_config_reads_an_option_as_yaml(write: Write, name: str, text: str, value: Any) -> None:
    assert value_of(parse_config([f"--{name}={text}"], check_files=False), name) == value


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(("lr", "training.learning_rate"), ("epochs", "training.max_epochs"), ("n_layer", "model.num_layers")),
        *(("per_device_train_batch_size", "training.batch_size"), ("block_size", "data.sequence_length")),
        *(("training.d_model", "model.d_model"), ("learning_rate", "training.learning_rate")),
        ("training.save_steps", "training.save_every_n_steps"),
    ],
)
def test_parse_config_names_the_setting_that_others_call_so(write: Write, name: str, meant: str) -> None:
    section, _, key = name.rpartition(".")
    content = f"{section}: {{{key}: 1}}" if section else f"{key}: 1"
    (of_file,) = problems("--config", write(content))
    for found in (*problems(f"--{name}=1"), *problems(f"--{name.replace('_', '-')}", "1"), of_file):
        assert f"{meant}'" in found.advice


def test_parse_config_of_a_dotted_key_says_to_nest_it(write: Write) -> None:
    (found,) = problems("--config", write("training.log_every_n_steps: 7"))
    assert (found.setting, found.value) == ("training.log_every_n_steps", 7)
    assert "training: {log_every_n_steps: " in found.advice


def test_parse_config_of_a_setting_in_a_wrong_section_names_the_right_one() -> None:
    found = problems("--training.trackers", "wandb", "--data.sample_tokens", "3")
    assert [one.advice for one in found] == ["Did you mean '--trackers'?", "Did you mean '--sample_tokens'?"]


def test_parse_config_of_a_misspelt_option_names_the_right_one(write: Write) -> None:
    found = problems(*[f"--{name}x=1" for name in SETTINGS])
    assert [(one.setting, one.text) for one in found] == [(f"--{name}x", "unknown option") for name in SETTINGS]
    assert [one.advice for one in found] == [f"Did you mean '--{name}'?" for name in SETTINGS]
    assert [one.setting for one in problems("--training.sed", "1")] == ["--training.sed"]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [(["mine.yaml"], "mine.yaml"), (["-x"], "-x"), (["--training.seed", "1", "2"], "2")],
)
def test_parse_config_refuses_what_is_not_an_option(write: Write, arguments: list[str], value: str) -> None:
    (found,) = problems(*arguments)
    assert (found.setting, found.value) == ("", value)
    assert ("--config mine.yaml" in found.advice) == (value == "mine.yaml")


@pytest.mark.parametrize("arguments", [["--training.seed"], ["--config"], ["--training.seed", "--print_config"]])
def test_parse_config_refuses_an_option_without_value(arguments: list[str]) -> None:
    (found,) = problems(*arguments)
    assert arguments[0] in found


EVERYTHING_WRONG = """
modle: {}
model: {d_model: 100, num_head: 4}
training: {learning_rate: -1, optimizer: adamv, max_steps: 1.5}
"""
WRONG_SETTINGS = [
    *("--training.sed", "model.d_model", "model.num_head", "modle", "sample_tokens", "training.learning_rate"),
    *("training.max_steps", "training.optimizer"),
]


def test_parse_config_lists_all_mistakes_at_once(write: Write) -> None:
    found = problems("--config", write(EVERYTHING_WRONG), "--training.sed=1", "--sample_tokens", "many")
    assert sorted(one.setting for one in found) == WRONG_SETTINGS
    found = problems("--sead=1", "--data.source=missing.txt", "--data.tokenizer=missing.json")
    assert [one.setting for one in found] == ["--sead", "data.tokenizer", "data.source"]
    found = problems("--config", "missing.yaml", "--sead", "1")
    assert [one.setting for one in found] == ["--sead", "--config"]


# ---- --print_config and --help


def test_print_config_prints_an_equal_config(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model.d_model=64", "--training.mixed_precision=no", "--training.gradient_clip_norm=null"]
    with pytest.raises(SystemExit) as caught:
        train.main([*arguments, "--print_config"])
    assert caught.value.code == 0
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    assert parse_config(["--config", write(printed)]) == parse_config(arguments)
    assert "mixed_precision: no\n" in printed
    elsewhere = parse_config(["--config", write(printed), "--output_dir=other", "--training.max_steps=5"]).training
    assert (elsewhere.checkpoint_dir, elsewhere.max_epochs) == ("other/checkpoints", None)


def test_help_shows_every_option_with_its_default(
    write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    options = dict(part.split(" ", 1) for part in " ".join(shown.split()).split(" --"))
    for name, _, _, text in settings(Config):
        type_name, _, rest = options[name].partition(f" {text}")
        assert " " not in type_name
        assert rest.startswith(" (default: ") != ("default:" in text)


# ---- exit codes, and what is left behind

TINY = [
    *("--model.d_model=8", "--model.num_heads=1", "--model.num_layers=1", "--sample_tokens=0"),
    *("--data.source=text.txt", "--data.sequence_length=8", "--training.batch_size=8", "--training.max_steps=1"),
]


@pytest.mark.parametrize(
    "argument",
    [
        "--data.tokenizer=text.json",
        "--training.early_stopping_metric=val_accuracy",
        "--callback_options={curves: {colour: red}}",
        "--output_dir=text.txt",
    ],
)
def test_train_with_a_mistake_exits_with_2_and_leaves_nothing(
    write: Write, tmp_path: Path, argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("some words " * 100, "text.txt")
    write("{}", "text.json")
    before = sorted(tmp_path.rglob("*"))
    assert train.main([*TINY, argument]) == 2
    assert sorted(tmp_path.rglob("*")) == before
    assert capsys.readouterr().err.startswith("error: ")


def test_train_without_arguments_shows_the_help(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([]) == 2
    printed = capsys.readouterr()
    assert "--training.learning_rate FLOAT" in printed.out
    assert "--config" in printed.err


def test_train_warns_of_few_steps(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("some words " * 10, "text.txt")
    short = [word for word in TINY if "max_steps" not in word]
    assert train.main([*short, "--output_dir=run", "--training.max_epochs=1"]) == 0
    assert "warning: 2 optimizer steps" in capsys.readouterr().out


def test_main_of_an_unknown_command_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fundamentallm", "trian"])
    assert commands.main() == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


def test_main_ends_quietly_if_its_reader_closes_the_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fundamentallm", "--help"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


def shell(line: str, folder: Path, *command: str) -> str:
    """The exit code of COMMAND within a line of bash."""
    environment = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parents[1]), "PYTHONIOENCODING": "ascii"}
    line = f"exec 3>code; {line.replace('COMMAND', shlex.join([sys.executable, *command]))}"
    done = subprocess.run(["bash", "-c", line], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.stderr == ""
    return (folder / "code").read_text()


PRINT = """
import sys
from fundamentallm.errors import open_output
open_output(drops=True)
for stream in (sys.stdout, sys.stderr):
    print("\u6f22" * 9999, file=stream, flush=True)
    stream.isatty()
"""


@pytest.mark.parametrize("output", ["2>&1 | true", ">/dev/full 2>&1", "2>&1 | cat", ">&- 2>&-"])
def test_open_output_lets_a_run_print_into_anything(tmp_path: Path, output: str) -> None:
    assert shell(f"{{ COMMAND; echo $? >&3; }} {output}", tmp_path, "-c", PRINT) == "0\n"


def test_main_interrupted_has_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("fundamentallm.commands.estimate.main", interrupted)
    monkeypatch.setattr(sys, "argv", ["fundamentallm", "estimate"])
    assert commands.main() == 130
    assert capsys.readouterr().err == "\ninterrupted\n"
