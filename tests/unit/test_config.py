"""Settings in Python: every mistake at once, nothing converted, derived defaults, names to objects."""

from __future__ import annotations

import dataclasses
import os
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from fundamentallm.config.command_line import settings
from fundamentallm.config.files import data_problems, file_problems, source_files
from fundamentallm.config.registry import resolve
from fundamentallm.config.schema import (
    LOSS_NAMES,
    OPTIMIZER_NAMES,
    SCHEDULE_NAMES,
    Config,
    DataConfig,
    ModelConfig,
    TrainingConfig,
)
from fundamentallm.config.validation import RANGES, Interval, fits, from_dict, range_problems
from fundamentallm.data.corpus import load_corpus
from fundamentallm.errors import CheckpointError, ConfigError, report

SETTINGS = [name for name, _, _, _ in settings(Config)]
NUMBERS = [name for name, hint, _, _ in settings(Config) if fits(1, hint)]
FRACTIONAL = [name for name, hint, _, _ in settings(Config) if fits(0.5, hint)]
HINTS = {name: hint for name, hint, _, _ in settings(Config)}


def nested(*given: tuple[str, Any]) -> dict[str, Any]:
    """Dotted settings as nested mappings."""
    values: dict[str, Any] = {}
    for name, value in given:
        *sections, key = name.split(".")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
        section[key] = value
    return values


def problems(*given: tuple[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_dict(Config, nested(*given))
    return caught.value.problems


MISTAKES = [
    ("output_dir", 7, "text"),
    ("callbacks", ["a:b", 3], "a list of text"),
    ("callbacks", "a:b", "a list of text"),
    ("training.micro_batch_size", "automatic", "an integer or auto or null"),
    ("training.micro_batch_size", 0, "at least 1"),
    ("training.ema_decay", 1, "greater than 0 and less than 1"),
    ("training.batch_size_schedule", [5, 4], "a list of lists"),
    ("training.parameter_groups", ["*"], "a list of mappings"),
    ("sample_tokens", -1, "at least 0"),
    ("model.dropout", 1.0, "at least 0 and less than 1"),
    ("model.num_layers", 0, "at least 1"),
    ("model.tie_embeddings", 1, "true or false"),
    ("model.qk_norm", "yes", "true or false"),
    ("model.vocab_size", "big", "an integer or null"),
    ("model.rope_theta", 0, "greater than 0"),
    ("data.train_split", 0, "greater than 0 and at most 1"),
    ("data.train_split", 1.1, "greater than 0 and at most 1"),
    ("data.source", None, "text or a mapping"),
    ("data.tokenizer", "wordpiece", "'char', 'byte', 'bpe:<vocabulary size>', or the path of a tokenizer.json"),
    ("data.tokenizer", "bpe:256", "'bpe:<vocabulary size>' with a size above 256"),
    ("data.tokenizer", "bpe:", "'bpe:<vocabulary size>' with a size above 256"),
    ("data.tokenizer", "bpe:-300", "'bpe:<vocabulary size>' with a size above 256"),
    ("data.cache_dir", 3, "text or null"),
    ("training.learning_rate", -1e-4, "greater than 0"),
    ("training.learning_rate", "3e-4", "a number"),
    ("training.max_steps", 1.0, "an integer or null"),
    ("training.gradient_clip_norm", 0, "greater than 0"),
    ("training.adam_beta2", 1, "at least 0 and less than 1"),
    ("training.min_lr_ratio", 1.5, "at least 0 and at most 1"),
    ("training.loss_options", [1], "a mapping"),
    ("training.mixed_precision", False, "one of no, bf16, fp16 or null"),
    ("training.mixed_precision", "fp8", "one of no, bf16, fp16 or null"),
    ("training.early_stopping_mode", "maximum", "one of min, max"),
    ("training.optimizer", "rmsprop", "adam, adamw, muon, sgd, or 'module:name'"),
    ("training.lr_scheduler", "step", "constant, cosine, cosine_with_restarts, linear, wsd, or 'module:name'"),
    ("training.loss", "mse", "cross_entropy, focal, label_smoothing, z_loss, or 'module:name'"),
    ("training.resume", "no_such_folder", "auto, never, or a checkpoint's folder"),
    ("model", [1], "a mapping; in Python, a ModelConfig"),
    ("data", None, "a mapping; in Python, a DataConfig"),
]


@pytest.mark.parametrize(("setting", "value", "allowed"), MISTAKES)
def test_a_mistake_is_one_problem_with_its_path_what_was_got_and_what_is_allowed(
    setting: str, value: Any, allowed: str
) -> None:
    (problem,) = problems((setting, value))
    assert problem.startswith(f"{setting} is {value!r}; allowed: {allowed}.")


def test_all_mistakes_are_reported_at_once() -> None:
    one_each = {name: value for name, value, _ in MISTAKES if name not in ("model", "data")}
    mistakes = [*one_each.items(), ("modle", {}), ("model.num_head", 2), ("training.lr", 1)]
    expected = [problem for mistake in mistakes for problem in problems(mistake)]
    assert len(expected) == len(mistakes)
    assert sorted(problems(*mistakes)) == sorted(expected)


@pytest.mark.parametrize("setting", [*SETTINGS, "model", "data", "training"])
def test_a_misspelt_setting_is_refused_with_the_right_one(setting: str) -> None:
    assert problems((setting + "x", 1)) == [f"{setting}x: unknown setting. Did you mean {setting.split('.')[-1]!r}?"]


@pytest.mark.parametrize("key", [5, None, True, 1.5, "", "ключ", "training.seed"])
def test_any_strange_key_is_an_unknown_setting(key: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Config, {key: 1})
    assert [problem.partition(": unknown setting.")[:2] for problem in caught.value.problems] == [
        (str(key), ": unknown setting.")
    ]


CHOICES = [("optimizer", OPTIMIZER_NAMES), ("lr_scheduler", SCHEDULE_NAMES), ("loss", LOSS_NAMES)]


@pytest.mark.parametrize(("setting", "name"), [(setting, name) for setting, names in CHOICES for name in names])
def test_a_misspelt_choice_is_refused_with_the_right_one(setting: str, name: str) -> None:
    (problem,) = problems((f"training.{setting}", name + "x"))
    assert problem.endswith(f" Did you mean {name!r}?")


@pytest.mark.parametrize(
    ("setting", "value", "near"),
    [("training.resume", "atuo", "auto"), ("data.tokenizer", "chr", "char"), ("data.tokenizer", "bytes", "byte")],
)
def test_a_misspelt_word_is_refused_with_the_right_one(setting: str, value: str, near: str) -> None:
    (problem,) = problems((setting, value))
    assert problem.endswith(f" Did you mean {near!r}?")


@pytest.mark.parametrize(
    "chosen", [(setting, name) for setting, names in CHOICES for name in (*names, "my_module:Name")]
)
def test_every_choice_and_a_name_from_outside_is_accepted(chosen: tuple[str, str]) -> None:
    setting, name = chosen
    assert getattr(TrainingConfig(**{setting: name}), setting) == name


@pytest.mark.parametrize("value", [-1, True, float("nan"), float("inf"), float("-inf"), "1"])
@pytest.mark.parametrize("setting", NUMBERS)
def test_no_number_may_be_negative_a_bool_text_or_not_finite(setting: str, value: Any) -> None:
    assert [problem.partition(";")[0] for problem in problems((setting, value))] == [f"{setting} is {value!r}"]


@pytest.mark.parametrize("setting", [name for name in NUMBERS if 0 not in RANGES[name.rpartition(".")[2]]])
def test_zero_is_refused_by_its_range_alone(setting: str) -> None:
    (problem,) = problems((setting, 0))
    assert problem.startswith(f"{setting} is 0; allowed: ")


@pytest.mark.parametrize("setting", FRACTIONAL)
def test_a_number_beyond_all_floats_is_refused(setting: str) -> None:
    assert len(problems((setting, 10**400))) == 1


@pytest.mark.parametrize("setting", NUMBERS)
def test_a_setting_takes_fractions_only_where_it_says_a_number(setting: str) -> None:
    if setting in FRACTIONAL:
        assert range_problems(**{setting.rpartition(".")[2]: 0.5}) == []
    else:
        assert problems((setting, 1.0))[0].startswith(f"{setting} is 1.0; allowed: an integer")


@pytest.mark.parametrize("setting", SETTINGS)
def test_null_is_accepted_exactly_where_the_type_says_so(setting: str) -> None:
    if type(None) in typing.get_args(HINTS[setting]):
        from_dict(Config, nested((setting, None)))
    else:
        assert problems((setting, None))[0].startswith(f"{setting} is None; allowed: ")


@pytest.mark.parametrize("value", [0, 2**63 - 1])
def test_a_seed_fills_63_bits(value: int) -> None:
    assert TrainingConfig(seed=value).seed == value
    assert len(problems(("training.seed", value + 2**63))) == 1


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        (Interval(low=0), [0, 0.0, 5], [-1e-300, float("inf")]),
        (Interval(low=0, open_low=True), [1e-300, 1], [0, 0.0, -1]),
        (Interval(low=0, high=1), [0, 1, 0.5], [1.0000001, -0.1, float("nan")]),
        (Interval(low=0, high=1, open_high=True), [0, 0.999], [1, 2]),
        (Interval(), [-1e300, 0], [float("nan"), float("-inf"), "1", None]),
    ],
)
def test_an_interval_holds_what_lies_within_its_bounds(
    interval: Interval, inside: list[Any], outside: list[Any]
) -> None:
    assert [value for value in inside if value not in interval] == []
    assert [value for value in outside if value in interval] == []


@pytest.mark.parametrize(("width", "heads"), [(100, 8), (8, 8), (24, 16), (7, 1), (256, 3)])
def test_heads_must_divide_the_width_into_pairs(width: int, heads: int) -> None:
    (problem,) = problems(("model.d_model", width), ("model.num_heads", heads))
    assert problem.startswith(f"model.d_model is {width} and num_heads is {heads}; allowed: ")


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 3), (8, 16), (4, 8)])
def test_kv_heads_must_divide_the_heads(heads: int, kv_heads: int) -> None:
    (problem,) = problems(("model.num_heads", heads), ("model.num_kv_heads", kv_heads))
    assert problem.startswith(f"model.num_kv_heads is {kv_heads} and num_heads is {heads}; allowed: ")


@pytest.mark.parametrize("warmup", [10, 11])
def test_warm_up_must_be_shorter_than_the_run(warmup: int) -> None:
    assert TrainingConfig(max_steps=10, warmup_steps=9).warmup_steps == 9
    (problem,) = problems(("training.max_steps", 10), ("training.warmup_steps", warmup))
    assert problem.startswith(f"training.warmup_steps is {warmup} and max_steps is 10; allowed: ")


@pytest.mark.parametrize("optimizer", OPTIMIZER_NAMES)
def test_optimizer_options_are_for_optimizers_from_outside(optimizer: str) -> None:
    assert TrainingConfig(optimizer="a:b", optimizer_options={"x": 1}).optimizer_options == {"x": 1}
    (problem,) = problems(("training.optimizer", optimizer), ("training.optimizer_options", {"x": 1}))
    assert problem.startswith(f"training.optimizer_options is {{'x': 1}} and optimizer is {optimizer!r}; allowed: ")


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZER_NAMES if name != "muon"])
def test_a_learning_rate_for_adamw_is_for_what_muon_leaves_to_it(optimizer: str) -> None:
    assert TrainingConfig(optimizer="muon", adam_learning_rate=0.1).adam_learning_rate == 0.1
    (problem,) = problems(("training.optimizer", optimizer), ("training.adam_learning_rate", 0.1))
    assert problem.startswith(f"training.adam_learning_rate is 0.1 and optimizer is {optimizer!r}; allowed: null")


@pytest.mark.parametrize("section", [Config, ModelConfig, DataConfig, TrainingConfig])
def test_a_section_cannot_be_changed(section: type) -> None:
    made = section()
    for field in dataclasses.fields(section):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, getattr(made, field.name))


def test_a_section_made_in_python_is_checked_too() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(learning_rate=-1, optimizer="adamm", max_bad_steps=0)
    named = sorted(problem.partition(" ")[0] for problem in caught.value.problems)
    assert named == ["learning_rate", "max_bad_steps", "optimizer"]


def test_two_configs_share_no_mapping_or_list() -> None:
    first, second = Config(), Config()
    assert first.callbacks is not second.callbacks
    assert first.training.loss_options is not second.training.loss_options


@pytest.mark.parametrize("config", [Config(), Config(output_dir="x", model=ModelConfig(d_model=100, num_heads=5))])
def test_resolving_leaves_unset_only_what_null_has_a_meaning_for(config: Config) -> None:
    resolved = config.resolved()
    derived = {name for name, _, _, text in settings(Config) if "default:" in text}
    # Only the corpus, the accelerate config or the device can say these.
    later = {
        "model.vocab_size",
        "data.cache_dir",
        "training.micro_batch_size",
        "training.max_steps",
        "training.mixed_precision",
        "training.activation_checkpointing",
        "training.compile",
        "training.peak_tflops",
    }
    for name in derived - later:
        value: Any = resolved
        for part in name.split("."):
            value = getattr(value, part)
        assert value is not None, name
    assert resolved.resolved() == resolved
    assert resolved.training.checkpoint_dir == str(Path(config.output_dir, "checkpoints"))
    assert resolved.model.num_kv_heads == config.model.num_heads
    assert resolved.training.max_epochs == 1


def test_resolving_keeps_what_is_set() -> None:
    given = nested(
        ("model.num_kv_heads", 2),
        ("model.d_ff", 5),
        ("training.batch_size", 3),
        ("training.checkpoint_dir", "elsewhere"),
        ("training.max_epochs", 7),
    )
    config = from_dict(Config, given)
    assert config.resolved() == config


def test_a_tilde_in_the_folders_of_a_run_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Config(output_dir="~/run").resolved().training.checkpoint_dir == str(tmp_path / "run" / "checkpoints")
    training = TrainingConfig(checkpoint_dir="~/saved")
    assert training.resolved().checkpoint_dir == str(tmp_path / "saved")
    (tmp_path / "run").touch()
    assert "which is no folder" in file_problems(Config(output_dir="~/run"))[0]


def test_a_checkpoint_to_begin_from_is_looked_for_unless_the_run_has_its_own(tmp_path: Path) -> None:
    old, own = tmp_path / "old" / "checkpoints" / "step_00000001", tmp_path / "run" / "checkpoints" / "step_00000001"
    for folder in (old, own):
        folder.mkdir(parents=True)
    (old / "manifest.json").touch()

    def problems(path: Path) -> list[str]:
        return file_problems(Config(output_dir=str(tmp_path / "run"), model=ModelConfig(init_from=str(path))))

    assert problems(old) == []
    run_folder = tmp_path / "old"
    assert problems(run_folder) == [
        f"model.init_from is {str(run_folder)!r}, which is no checkpoint; give the folder of one."
    ]
    (own / "manifest.json").touch()
    assert problems(run_folder) == []


def test_an_output_dir_that_is_empty_is_not_the_working_directory() -> None:
    with pytest.raises(ConfigError, match="output_dir is ''; allowed: the path of a folder"):
        Config(output_dir="")


def test_a_run_limited_by_steps_has_no_limit_of_epochs() -> None:
    assert TrainingConfig(max_steps=5).resolved().max_epochs is None


@pytest.mark.parametrize("d_model", [2, 8, 48, 100, 256, 768, 1000])
def test_the_hidden_width_is_eight_thirds_rounded_up_to_a_multiple_of_eight(d_model: int) -> None:
    d_ff = ModelConfig(d_model=d_model, num_heads=1).resolved().d_ff
    assert d_ff is not None
    assert d_ff % 8 == 0
    assert 0 <= d_ff - 8 * d_model / 3 < 8


@pytest.mark.parametrize("config", [Config(), Config().resolved(), Config(callbacks=["a:b"], sample_tokens=0)])
def test_a_config_as_plain_mappings_reads_back_equal(config: Config) -> None:
    assert from_dict(Config, dataclasses.asdict(config)) == config


# ---- the files a config names


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "empty.txt")
    write(tmp_path / "short.txt", "ab")
    write(tmp_path / "enough.txt", "some words " * 50)
    write(tmp_path / "no_text" / "image.png", "x" * 1000)
    write(tmp_path / "hidden" / ".git" / "notes.txt", "x" * 1000)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing.txt", "where there is no text; allowed: a file, a folder, a glob, datasets:NAME, or 'python-docs'"),
        ("missing/*.txt", "where there is no text; allowed: a file, a folder, a glob, datasets:NAME, or 'python-docs'"),
        ("python-doc", "Did you mean 'python-docs'?"),
        ("no_text", "where there is no text; allowed: a folder with .txt or .md files below it"),
        ("hidden", "where there is no text; allowed: a folder with .txt or .md files below it"),
        ("empty.txt", "which is empty"),
        ("short.txt", "which has 2 bytes; allowed: at least sequence_length + 1 = 9 tokens"),
        ("~no_such_user_at_all/a.txt", "where there is no text"),
        pytest.param("x" * 5000, "where there is no text", id="a name too long for any file"),
    ],
)
def test_a_source_without_enough_text_is_one_problem(
    folder: Path, source: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (problem,) = list(data_problems(DataConfig(source=source, sequence_length=8)))
    assert problem.startswith(f"source is {source!r}, ")
    assert said in problem


@pytest.mark.parametrize("source", ["enough.txt", "*.txt", "**/e*.txt", "python-docs"])
def test_a_source_with_enough_text_has_no_problem(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert list(data_problems(DataConfig(source=source, sequence_length=8))) == []


def test_hidden_folders_are_not_gone_into(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository's or an environment's have more files than the text."""
    write(folder / ".git" / "objects" / "a.txt", "x")
    looked_at, real = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked_at.append(path) or real(path))
    assert source_files(DataConfig(), str(folder))
    assert looked_at
    assert not [path for path in looked_at if ".git" in str(path)]


def test_a_folder_below_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "shut" / "a.txt", "x")
    real = os.scandir

    def scandir(path: str) -> Any:
        if path.endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    (problem,) = data_problems(DataConfig(source=str(folder), sequence_length=8))
    assert problem.endswith(f"in which {folder / 'shut'} cannot be read: Permission denied.")


def test_the_files_of_a_folder_are_its_visible_texts_sorted(folder: Path) -> None:
    write(folder / "sub" / "b.md", "x")
    write(folder / "sub" / "a.txt", "x")
    found = source_files(DataConfig(), str(folder))
    assert [path.relative_to(folder).as_posix() for path in found] == [
        "empty.txt",
        "enough.txt",
        "short.txt",
        "sub/a.txt",
        "sub/b.md",
    ]


def test_a_folder_below_a_hidden_one_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / ".cache" / "texts" / "a.txt", "x")
    assert source_files(DataConfig(), str(path.parent)) == [path]


def test_tokenizer_and_source_problems_come_together(tmp_path: Path) -> None:
    config = DataConfig(source=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "tokenizer.json"))
    assert [problem.partition(" is ")[0] for problem in data_problems(config)] == ["tokenizer", "source"]


@pytest.mark.parametrize(
    ("texts", "train_split", "tokenizer"),
    [
        (["x"] * 20, 1.0, "char"),
        (["\N{GRINNING FACE}" * 100 + "x" * 900], 0.1, "byte"),
    ],
    ids=["separators between many files", "more bytes a character in the training part"],
)
def test_a_text_that_is_long_enough_once_encoded_is_not_refused(
    tmp_path: Path, texts: list[str], train_split: float, tokenizer: str
) -> None:
    for number, text in enumerate(texts):
        write(tmp_path / f"{number}.txt", text)
    config = DataConfig(source=str(tmp_path), train_split=train_split, tokenizer=tokenizer)
    corpus = load_corpus(config, show_progress=False)
    shorter_part = min(len(part) for part in (corpus.train, corpus.validation) if len(part))
    assert data_problems(dataclasses.replace(config, sequence_length=shorter_part - 1)) == []


# ---- names, and errors as a command line shows them


@pytest.fixture
def own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


def test_a_known_name_is_its_entry() -> None:
    assert resolve("loss", "b", {"a": 1, "b": 2}) == 2


def test_a_module_in_the_working_directory_is_found(own_path: Path) -> None:
    write(own_path / "module_of_a_user.py", "answer = 42")
    assert resolve("loss", "module_of_a_user:answer", {}) == 42


@pytest.mark.parametrize("name", ["no_such_module:x", "json:no_such_name", ":x", "json:", "a b:c", ".json:loads"])
def test_a_name_that_cannot_be_imported_is_a_config_error(own_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("loss", name, {})
    assert caught.value.problems[0].startswith(f"loss is {name!r}, which cannot be imported: ")


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (ConfigError("a is 1."), 2, "1 setting is wrong:\n  - a is 1.\n"),
        (ConfigError(["a is 1.", "b is 2."]), 2, "2 settings are wrong:\n  - a is 1.\n  - b is 2.\n"),
        (CheckpointError("it is damaged."), 1, "error: it is damaged.\n"),
    ],
)
def test_an_error_is_shown_once_by_the_first_process(
    error: Any, code: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert report(error) == code
    assert capsys.readouterr() == ("", shown)
    monkeypatch.setenv("RANK", "1")
    assert report(error) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("schedule", [[[5, 4, 3]], [[5, 4], [5, 8]], [[0, 4]], [[5, 0]], [[]]])
def test_a_batch_size_schedule_is_pairs_in_order(schedule: list[list[int]]) -> None:
    (problem,) = problems(("training.batch_size_schedule", schedule))
    assert problem.startswith(f"training.batch_size_schedule is {schedule!r}; allowed: pairs of [optimizer steps done,")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"pattern": "*", "learning_rate_scale": 0}, "learning_rate_scale is 0; allowed: greater than 0."),
        ({"pattern": "*", "weight_decay": -1}, "weight_decay is -1; allowed: at least 0."),
        ({"patern": "*", "pattern": "*"}, "patern: unknown setting. Did you mean 'pattern'?"),
        ({"frozen": True}, "pattern is ''; allowed: a glob over the parameters' names, such as 'model.layers.0.*'."),
        ({"pattern": "*", "frozen": True, "weight_decay": 0.1}, "frozen is True; allowed: no learning_rate_scale and "),
    ],
)
def test_what_is_wrong_within_a_parameter_group_is_named_with_its_place(entry: dict[str, Any], problem: str) -> None:
    (found,) = problems(("training.parameter_groups", [{"pattern": "*.bias"}, entry]))
    assert found.startswith(f"training.parameter_groups[1].{problem}")
