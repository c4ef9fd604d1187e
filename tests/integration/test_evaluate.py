"""`fundamentallm evaluate` gives the loss that validation during training would give."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fundamentallm import Config, DataConfig, ModelConfig, TrainingConfig
from fundamentallm.commands import evaluate as command
from fundamentallm.errors import ConfigError
from fundamentallm.train import make_trainer
from tests.conftest import problem_of, reset_accelerate
from tests.integration.runs import lines, prose


def train(folder: Path, **data: Any) -> Path:
    """Returns the folder of a run over 30,000 characters, beside their text."""
    (folder / "text.txt").write_text(prose(30_000))
    config = Config(
        output_dir=str(folder / "run"),
        model=ModelConfig(d_model=16, num_heads=2, num_layers=1),
        data=DataConfig(str(folder / "text.txt"), sequence_length=32, cache_dir=str(folder / "cache"), **data),
        training=TrainingConfig(batch_size=16, max_steps=8, learning_rate=1e-2),
        sample_tokens=0,
    )
    reset_accelerate()
    make_trainer(config.resolved()).train()
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("run"))


def evaluate(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert command.main(["--checkpoint", str(path), *arguments, "--json"], "evaluate") == 0
    return json.loads(capsys.readouterr().out)


def assert_equals_validation(found: dict[str, Any], run: Path) -> None:
    last = lines(run)[-1]
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert found[name] == pytest.approx(last[f"val_{name}"], rel=1e-6)


def test_evaluate_of_a_run_gives_its_validation_loss(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(capsys, run)
    assert found["targets"] == 2999
    assert_equals_validation(found, run)


def test_evaluate_of_a_source_gives_what_validation_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several documents, joined and masked as in training."""
    (tmp_path / "held_out").mkdir()
    for index, size in enumerate((90, 2, 700)):
        (tmp_path / "held_out" / f"{index}.txt").write_text(prose(size))
    source = str(tmp_path / "held_out")
    end = {"tokenizer": "bpe:300", "end_of_text": "<|endoftext|>", "mask_documents": True}
    run = train(tmp_path, validation_source=source, **end)
    found = evaluate(capsys, run, "--source", source)
    assert found["text"] == source
    assert_equals_validation(found, run)
    assert_equals_validation(evaluate(capsys, run), run)


def test_evaluate_of_rows_reads_the_fields_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": prose(90)[i:]}) + "\n" for i in range(9)))
    (tmp_path / "joined.txt").write_text("\n\n".join(prose(90)[i:] for i in range(9)))
    found = [evaluate(capsys, run, "--source", str(tmp_path / name)) for name in ("rows.jsonl", "joined.txt")]
    assert found[0]["targets"] == found[1]["targets"] == found[0]["bytes"]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)


def test_evaluate_context_limits_what_the_model_sees(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {context: evaluate(capsys, run, "--context", str(context)) for context in (1, 32)}
    assert found[1]["targets"] == found[1]["samples"] == found[32]["targets"]
    assert math.isfinite(found[1]["loss"])
    assert found[1]["loss"] != found[32]["loss"]
    (run.parent / "short.txt").write_text("to be")  # shorter than the context
    assert evaluate(capsys, run, "--source", str(run.parent / "short.txt"))["targets"] == 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--context", "33"], {"--context": 33}),
        (["--batch_size", "0", "--context", "0"], {"--batch_size": 0, "--context": 0}),
        (["--source", "nowhere.txt"], {"--source": "nowhere.txt"}),
    ],
)
def test_evaluate_names_a_wrong_argument(run: Path, arguments: list[str], named: dict) -> None:
    with pytest.raises(ConfigError) as error:
        command.main(["--checkpoint", str(run), *arguments], "evaluate")
    assert {problem.setting: problem.value for problem in error.value.problems} == named


def test_evaluate_names_characters_that_the_model_lacks(run: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign.txt").write_text("größe", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--source.*foreign\.txt.*'ß'"):
        command.main(["--checkpoint", str(run), "--source", str(tmp_path / "foreign.txt")], "evaluate")


def test_evaluate_refuses_a_text_of_one_token(run: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a")
    found = problem_of(command.main, ["--checkpoint", str(run), "--source", str(tmp_path / "one.txt")], "evaluate")
    assert found.setting == "--source"


def test_evaluate_refuses_a_changed_validation_text(run: Path) -> None:
    text = run.parent / "text.txt"
    before = text.read_text()
    try:
        text.write_text(before[:-20] + before[:20])
        with pytest.raises(ConfigError) as error:
            command.main(["--checkpoint", str(run)], "evaluate")
        assert error.value.problems[0].setting == "--checkpoint"
        text.unlink()
        with pytest.raises(ConfigError) as error:
            command.main(["--checkpoint", str(run)], "evaluate")
        assert "--source" in error.value.problems[-1].advice
    finally:
        text.write_text(before)
