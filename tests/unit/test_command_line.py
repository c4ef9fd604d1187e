"""The command line: YAML and options to one config, every mistake at once, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fundamentallm import __main__ as verbs
from fundamentallm import train
from fundamentallm.config.command_line import parse_config, settings, to_yaml
from fundamentallm.config.schema import Config, DataConfig, TrainingConfig
from fundamentallm.errors import ConfigError

SETTINGS = {name: (hint, field) for name, hint, field, _ in settings(Config)}
HELP = {name: text for name, _, _, text in settings(Config)}

CHOSEN = {
    "output_dir": "elsewhere",
    "callback_options": {"curves": {"theme": "dark"}},
    "trackers": ["wandb"],
    "tracker_options": {"project": "mine", "wandb": {"tags": ["small"]}},
    "data.source": "rows.jsonl",
    "data.tokenizer": "byte",
    "data.cache_dir": "elsewhere",
    "training.optimizer": "a:c",
    "training.lr_scheduler": "linear",
    "training.loss": "focal",
    "training.mixed_precision": "no",
    "training.early_stopping_metric": "val_perplexity",
    "training.early_stopping_mode": "max",
    "training.checkpoint_dir": "elsewhere",
    "training.resume": "never",
    "training.resume_changes": ["data", "training.max_steps"],
    "training.warmup_steps": 1,
    "training.batch_size_schedule": [[5, 4], [9, 8]],
    "training.parameter_groups": [{"pattern": "*.bias", "frozen": True}],
}

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


def problems(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(arguments)
    return caught.value.problems


def value_of(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def another_value(name: str) -> Any:
    """A valid value of a setting that is not its default."""
    if name in CHOSEN:
        return CHOSEN[name]
    hint, field = SETTINGS[name]
    if "bool" in str(hint):
        return not field.default
    if "dict" in str(hint):
        return {"x": 1}
    if "list" in str(hint):
        return ["a:b"]
    if hint == str | None:
        return "elsewhere"
    return 0.5 if "float" in str(hint) else 2 * (field.default or 1)


def test_every_setting_can_be_given_in_yaml_and_in_both_forms_of_an_option(write: Write) -> None:
    write('{"elsewhere": "x"}\n' * 999, "rows.jsonl")
    Path("elsewhere").mkdir()  # among others, model.init_from
    write("{}", "elsewhere/manifest.json")
    values = {name: another_value(name) for name in SETTINGS}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    sections: dict[str, Any] = {}
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        (sections.setdefault(section, {}) if section else sections)[key] = value
    from_yaml = parse_config(["--config", write(json.dumps(sections))])
    assert {name: value_of(from_yaml, name) for name in SETTINGS} == values
    assert [name for name in SETTINGS if value_of(Config(), name) == values[name]] == []
    assert parse_config([f"--{name}={text}" for name, text in texts.items()]) == from_yaml
    assert parse_config([word for name, text in texts.items() for word in (f"--{name}", text)]) == from_yaml


def test_options_override_yaml_which_overrides_defaults(write: Write) -> None:
    config = write("training: {seed: 5, warmup_steps: 6}\nsample_tokens: 7")
    read = parse_config(["--config", config, "--training.seed", "1", "--training.seed", "2"])
    assert (read.training.seed, read.training.warmup_steps, read.sample_tokens) == (2, 6, 7)
    assert read.training.learning_rate == TrainingConfig.learning_rate


@pytest.mark.parametrize(
    "text",
    [
        "7",
        "null",
        "true",
        "1e3",
        "[",
        "a: b",
        "&a",
        "*a",
        "- a",
        "2024-01-01",
        "2024-99-99",
        "!!int x",
        "no",
        "# a",
        "",
    ],
)
def test_a_text_setting_takes_any_text_as_it_is(write: Write, text: str) -> None:
    assert parse_config(["--data.text_field", text]).data.text_field == text
    assert parse_config([f"--data.text_field={text}"]).data.text_field == text


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("training.learning_rate", "1e-4", 1e-4),
        ("training.learning_rate", "3", 3),
        ("training.mixed_precision", "no", "no"),
        ("training.mixed_precision", "null", None),
        ("training.gradient_clip_norm", "null", None),
        ("data.cache_dir", "7", "7"),
        ("data.cache_dir", "null", None),
        ("model.qk_norm", "false", False),
        ("callbacks", "[a:b, c:d]", ["a:b", "c:d"]),
        ("training.loss_options", "{gamma: 1e-1}", {"gamma": 0.1}),
    ],
)
def test_a_value_means_the_same_in_yaml_and_as_an_option(write: Write, name: str, text: str, value: Any) -> None:
    assert value_of(parse_config([f"--{name}={text}"]), name) == value
    if name != "data.cache_dir":
        section, _, key = name.rpartition(".")
        config = write(f"{section}: {{{key}: {text}}}" if section else f"{key}: {text}")
        assert value_of(parse_config(["--config", config]), name) == value


@pytest.mark.parametrize("content", ["", "# nothing", "{}", "---\n", "model: {}", "\ufeffmodel: {}"])
def test_a_file_without_settings_means_the_defaults(write: Write, content: str) -> None:
    assert parse_config(["--config", write(content)]) == Config().resolved()


def test_anchors_and_unicode_are_read(write: Write) -> None:
    config = write("output_dir: &here größe✓\ntraining: {checkpoint_dir: *here}")
    assert parse_config(["--config", config]).training.checkpoint_dir == "größe✓"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: {d_model: 8}\nmodel: {d_ff: 8}", 'duplicate key "model"'),
        ("model: {d_model: 8, d_model: 16}", 'duplicate key "d_model"'),
        ("model: {d_model: 8", "cannot be read as YAML"),
        ("\tmodel: {}", "cannot be read as YAML"),
        ("model: *nowhere", "cannot be read as YAML"),
        ("model: {}\n---\nmodel: {}", "cannot be read as YAML"),
        ("output_dir: \0", "cannot be read as YAML"),
        (b"output_dir: \xe9", "cannot be read as YAML: 'utf-8' codec"),
        (b"\xff\xfea", "cannot be read as YAML: 'utf-8' codec"),
        ("{a: 1}: 2", "cannot be read as YAML"),
        ("output_dir: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        ("output_dir: 2024-99-99", "cannot be read as YAML"),
        ("output_dir: !!int x", "cannot be read as YAML"),
        pytest.param("seed: 1" + "0" * 5000, "cannot be read as YAML", id="more digits than Python converts"),
        pytest.param("[" * 500, "cannot be read as YAML", id="nested beyond the stack"),
        ("- model", "which holds list; allowed: a mapping of settings"),
        ("7", "which holds int; allowed: a mapping of settings"),
        ("model", "which holds str; allowed: a mapping of settings"),
    ],
)
def test_a_file_that_is_no_mapping_in_yaml_is_refused(write: Write, content: str | bytes, said: str) -> None:
    (problem,) = problems("--config", write(content))
    assert problem.startswith("--config is 'config.yaml', which ")
    assert said in problem


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("missing.yaml", "which does not exist"),
        ("missing/config.yaml", "which does not exist"),
        ("~no_such_user_at_all/c.yaml", "which "),
        ("", "which cannot be read"),
        (".", "which cannot be read"),
    ],
)
def test_a_config_that_is_no_file_is_refused(write: Write, path: str, said: str) -> None:
    (problem,) = problems("--config", path)
    assert problem.startswith(f"--config is {path!r}, {said}")


@pytest.mark.parametrize("content", ["model:", "model: []", "model: 7", "model: text"])
def test_a_section_that_is_no_mapping_is_refused_also_beside_an_override(write: Write, content: str) -> None:
    found = problems("--config", write(content))
    assert [problem.partition(" is ")[0] for problem in found] == ["model"]
    assert found == problems("--config", "config.yaml", "--model.d_model", "512")


def test_a_yaml_directive_acts_on_its_own_file_only(write: Write) -> None:
    write("%YAML 1.1\n---\nmodel: {}", "old.yaml")
    write("training: {mixed_precision: no}")
    code = (
        "from fundamentallm.config.command_line import parse_config as p; "
        "p(['--config', 'old.yaml']); print(p(['--config', 'config.yaml']).training.mixed_precision)"
    )
    # In a process of its own: should it fail, it would change what the other tests read.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("no\n", 0), done.stderr


EVERYTHING_WRONG = """
modle: {}
model: {d_model: 100, num_head: 4}
data: {source: missing.txt, tokenizer: wordpiece, sequence_length: "8"}
training: {learning_rate: -1, optimizer: adamv, max_steps: 1.5, warmup_step: 3}
"""
EVERYTHING_SAID = [
    "--training.sed: unknown option. Did you mean '--training.seed'?",
    "modle: unknown setting. Did you mean 'model'?",
    "model.num_head: unknown setting. Did you mean 'num_heads'?",
    "model.d_model is 100 and num_heads is 8; allowed: ",
    "data.sequence_length is '8'; allowed: an integer.",
    "data.tokenizer is 'wordpiece'; allowed: ",
    "data.source is 'missing.txt', where there is no text; allowed: ",
    "training.max_steps is 1.5; allowed: an integer or null.",
    "training.learning_rate is -1; allowed: greater than 0.",
    "training.optimizer is 'adamv'; allowed: ",
    "training.warmup_step: unknown setting. Did you mean 'warmup_steps'?",
    "sample_tokens is 'many'; allowed: an integer.",
]


def test_all_mistakes_of_file_options_and_data_come_at_once(write: Write) -> None:
    found = problems("--config", write(EVERYTHING_WRONG), "--training.sed=1", "--sample_tokens", "many")
    assert len(found) == len(EVERYTHING_SAID)
    assert [said for said in EVERYTHING_SAID if not any(problem.startswith(said) for problem in found)] == []


def test_an_unreadable_file_hides_no_unknown_option(write: Write) -> None:
    found = problems("--config", "missing.yaml", "--sead", "1")
    assert [problem.partition(" ")[0] for problem in found] == ["--sead:", "--config"]


@pytest.mark.parametrize("form", [["{}x=1"], ["{}x", "1"]])
def test_a_misspelt_option_is_refused_with_the_right_one(write: Write, form: list[str]) -> None:
    found = problems(*[word.format(f"--{name}") for name in SETTINGS for word in form])
    assert found == [f"--{name}x: unknown option. Did you mean '--{name}'?" for name in SETTINGS]


@pytest.mark.parametrize(
    "option", ["--training.learning", "--training.learning_rat=1", "--print", "--conf=config.yaml"]
)
def test_an_option_cannot_be_shortened(write: Write, option: str) -> None:
    (problem,) = problems(option)
    assert problem.startswith(f"{option.partition('=')[0]}: unknown option.")


@pytest.mark.parametrize("arguments", [["config.yaml"], ["-c", "config.yaml"], ["-x"], ["--training.seed", "1", "2"]])
def test_a_word_that_is_no_option_is_refused(write: Write, arguments: list[str]) -> None:
    write("model: {}")
    assert len(problems(*arguments)) >= 1


@pytest.mark.parametrize("text", ["-1", "-0.5", "-1e-4", "-.inf"])
def test_a_negative_number_reaches_its_setting(write: Write, text: str) -> None:
    expected = problems(f"--training.learning_rate={text}")
    assert expected[0].startswith("training.learning_rate is -")
    assert problems("--training.learning_rate", text) == expected


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--callbacks=[json:dumps]", "callbacks is 'json:dumps', a function; allowed: subclasses of Callback"),
        ("--callbacks=[curve]", "callbacks is 'curve'; allowed: curves, profiler, ratios, samples, or 'module:name'"),
        (
            "--callback_options={curves: {colour: red}}",
            "callback_options.curves is {'colour': 'red'}, which does not fit",
        ),
        ("--training.loss=os:getcwd", "loss is 'os:getcwd', which makes a str"),
        ("--training.resume=.", "training.resume is '.', which is no checkpoint"),
        ("--model.init_from=runs/a", "model.init_from is 'runs/a', which is no checkpoint"),
    ],
)
def test_a_name_of_the_wrong_kind_is_a_config_error(
    option: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main([option]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--training.seed"], ["--config"], ["--training.seed", "--print_config"]])
def test_an_option_without_its_value_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"{arguments[0]}: has no value"):
        parse_config(arguments)


# ---- --print_config and --help

TEXTS = [
    *("no", "7", "null", "~", "a: b", "# a", " a ", "größe✓", "a\nb", "a\n\n b\n", 'it\'s "so"', "1e-4", "2024-01-01"),
    *("\t", "", "- a", "{a}", "[a", "*a", "&a", "!a", "%a", "@a", "a\\nb", "\u2028", "\x07", "word " * 60),
]


@pytest.mark.parametrize("text", TEXTS)
def test_printed_text_reads_back_equal(write: Write, text: str) -> None:
    config = Config(
        callbacks=[f"a:{text}"] * 2,
        data=DataConfig(text_field=text),
        training=TrainingConfig(loss_options={"k" + text: text}),
    )
    assert parse_config(["--config", write(to_yaml(config.resolved()))]) == config.resolved()


@pytest.mark.parametrize("number", [1e-8, 3e-4, 0.1 + 0.2, 5e-324, 1e16, 1e22, 1.7976931348623157e308, 3, 10**15])
def test_printed_numbers_read_back_equal(write: Write, number: float) -> None:
    config = Config(training=TrainingConfig(learning_rate=number, optimizer="a:b", optimizer_options={"x": -number}))
    read = parse_config(["--config", write(to_yaml(config.resolved()))])
    assert read == config.resolved()
    assert type(read.training.learning_rate) is type(number)


def test_print_config_prints_a_config_that_means_the_same_and_makes_nothing(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model.d_model=64", "--training.mixed_precision=no", "--training.gradient_clip_norm=null"]
    arguments.append("--tracker_options={project: 'a\\n\\n  checkpoint_dir: null'}")
    with pytest.raises(SystemExit) as caught:
        train.main([*arguments, "--print_config"])
    assert caught.value.code == 0
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    assert parse_config(["--config", write(printed)]) == parse_config(arguments)
    assert "mixed_precision: no\n" in printed
    assert "  checkpoint_dir: null  # here 'runs/default/checkpoints'\n" in printed
    assert "  max_epochs: null  # here 1\n" in printed
    elsewhere = parse_config(["--config", write(printed), "--output_dir=other", "--training.max_steps=5"]).training
    assert (elsewhere.checkpoint_dir, elsewhere.max_epochs) == ("other/checkpoints", None)


def test_print_config_prints_no_wrong_config(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--print_config", "--training.seed=x"]) == 2
    assert capsys.readouterr().out == ""


def test_help_says_every_option_with_its_text_and_default(
    write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"])
    assert caught.value.code == 0
    options = dict(part.split(" ", 1) for part in " ".join(capsys.readouterr().out.split()).split(" --"))
    for name, text in HELP.items():
        assert text in options[name]
        assert (" [" in options[name].partition(text)[2]) != ("default:" in text)
    assert options["training.learning_rate"].endswith("[0.0003]")
    assert options["model.dropout"].endswith("[0.0]")  # which equals false
    assert options["training.warmup_steps"].endswith("[0]")
    assert options["data.suffixes"].endswith("[[.txt, .md]]")
    assert options["callbacks"].endswith("[none]")


# ---- exit codes, and what is left behind

TINY = [
    *("--model.d_model=8", "--model.num_heads=1", "--model.num_layers=1", "--sample_tokens=0"),
    *("--data.source=text.txt", "--data.sequence_length=8", "--training.batch_size=8", "--training.max_steps=1"),
]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config=missing.yaml"],
        ["--model.num_heads=3"],
        ["--model.num_heads=0"],
        ["--data.source=missing.txt"],
        ["--data.source=empty.txt"],
        ["--data.source=short.txt"],
        ["--data.source=binary.txt"],
        ["--data.tokenizer=missing.json"],
        ["--data.tokenizer=text.json"],
        ["--training.resume=missing"],
        ["--training.mixed_precision=fp16"],
        ["--training.loss_options={gamma: 1}"],
        ["--training.lr_scheduler_options={cycles: 1}"],
        ["--training.early_stopping_metric=accuracy"],
        ["--training.early_stopping_metric=val_accuracy"],
        ["--training.validation_metrics=[no_such_module:x]"],
        ["--training.optimizer=no_such_module:x"],
        ["--callbacks=[curve]"],
        ["--callbacks=[no_such_module:x]"],
        ["--output_dir=text.txt"],
        ["--data.cache_dir=text.txt"],
    ],
    ids=lambda arguments: arguments[0].removeprefix("--"),
)
def test_a_mistake_exits_with_2_and_leaves_nothing(
    write: Write, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write("some words " * 100, "text.txt")
    write("{}", "text.json")
    write("", "empty.txt")
    write("ab", "short.txt")
    write(b"\xff" * 999, "binary.txt")
    before = sorted(tmp_path.rglob("*"))
    assert train.main([*TINY, *arguments]) == 2
    assert sorted(tmp_path.rglob("*")) == before
    assert capsys.readouterr().err.startswith("1 setting is wrong:\n  - ")


def test_a_used_folder_is_refused_by_a_run_that_must_not_resume(write: Write, tmp_path: Path) -> None:
    write("some words " * 100, "text.txt")
    used = tmp_path / "run"
    used.mkdir()
    (used / "metrics.jsonl").write_text("{}\n")
    before = sorted(tmp_path.rglob("*"))
    assert train.main([*TINY, "--output_dir=run", "--training.resume=never"]) == 2
    assert sorted(tmp_path.rglob("*")) == before


def start(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parents[1])}
    return subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)


def test_the_module_reports_all_mistakes_without_a_traceback(write: Write, tmp_path: Path) -> None:
    config = write(EVERYTHING_WRONG)
    done = start("fundamentallm.train", "--config", config, "--training.sed=1", "--sample_tokens", "many")
    title, *lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, title) == (2, "", f"{len(EVERYTHING_SAID)} settings are wrong:")
    assert [line for line in lines if not line.startswith("  - ")] == []
    assert [path.name for path in tmp_path.rglob("*")] == [config]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["trian"], 2, f"verb is 'trian'; allowed: {', '.join(verbs.VERBS)}. Did you mean 'train'?"),
        (["train", "--training.seed=x"], 2, "training.seed is 'x'; allowed: an integer."),
        (["generate", "--checkpoint", "missing"], 1, "error: there is no checkpoint in missing"),
    ],
)
def test_a_verb_reports_its_mistakes(write: Write, arguments: list[str], code: int, said: str) -> None:
    done = start("fundamentallm", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_verbs_are_listed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fundamentallm", *arguments])
    assert verbs.main() == 0
    listed = capsys.readouterr().out
    assert [verb for verb in ("train", "generate") if f"  {verb} " not in listed] == []


@pytest.mark.parametrize("verb", ["train", "generate"])
def test_a_verb_shows_its_own_help(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fundamentallm", verb, "--help"])
    with pytest.raises(SystemExit) as caught:
        verbs.main()
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: fundamentallm {verb} ")


def test_the_default_config_of_the_command_line_is_the_default_of_python(write: Write) -> None:
    assert parse_config([]) == Config().resolved()
    assert parse_config([]).data == DataConfig()


def test_a_verb_whose_reader_has_seen_enough_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fundamentallm", "estimate", "--model.vocab_size", "9"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_an_interrupted_verb_has_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("fundamentallm.commands.estimate.main.main", interrupted)
    monkeypatch.setattr(sys, "argv", ["fundamentallm", "estimate"])
    assert verbs.main() == 130
    assert capsys.readouterr().err == "\nstopped\n"
