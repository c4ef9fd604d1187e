"""`fundamentallm evaluate`: its loss is that of validation, and each token counts once."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from fundamentallm import Config, DataConfig, ModelConfig, TrainingConfig
from fundamentallm.commands import evaluate as command
from fundamentallm.config.schema import CHUNK, IGNORE_INDEX
from fundamentallm.errors import ConfigError
from fundamentallm.inference.loading import load_model
from fundamentallm.inference.scoring import score, windows
from fundamentallm.models.transformer import Transformer
from fundamentallm.train import make_trainer
from tests.conftest import reset_accelerate
from tests.integration.runs import lines, prose


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over 30,000 characters, beside their text."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(prose(30_000))
    config = Config(
        output_dir=str(folder / "run"),
        model=ModelConfig(d_model=16, num_heads=2, num_layers=1),
        data=DataConfig(str(folder / "text.txt"), sequence_length=32, cache_dir=str(folder / "cache")),
        training=TrainingConfig(batch_size=16, max_steps=8, learning_rate=1e-2),
        sample_tokens=0,
    )
    reset_accelerate()
    make_trainer(config.resolved()).train()
    return folder / "run"


def evaluate(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert command.main(["--checkpoint", str(path), *arguments, "--json"], "evaluate") == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_of_a_run_gives_its_validation_loss(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = lines(run)[-1]
    found = evaluate(capsys, run)
    assert found["targets"] == 2999
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert found[name] == pytest.approx(last[f"val_{name}"], rel=1e-6)
    assert evaluate(capsys, run, "--stride", "32")["loss"] == pytest.approx(found["loss"], rel=1e-6)


def token_losses(run: Path, text: str, context: int, stride: int) -> list[float]:
    """Returns the losses of all tokens but the first, each computed by itself."""
    opened = load_model(run)
    ids, losses = opened.tokenizer.encode(text).ids, []
    for index in range(1, len(ids)):
        block = max(-(-(index - context) // stride), 0)
        first = max(min(block * stride, len(ids) - 1 - context), 0)
        with torch.no_grad():
            logits = opened.model(torch.tensor([ids[first:index]]))[0, -1]
        losses.append(F.cross_entropy(logits, torch.tensor(ids[index])).item())
    return losses


@pytest.mark.parametrize("stride", [None, 5])
def test_evaluate_of_files_counts_each_token_once(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stride: int | None
) -> None:
    texts = [prose(250), "on", prose(200)[150:], "a"]
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text(text)
    flags = [] if stride is None else ["--stride", str(stride)]
    found = evaluate(capsys, run, "--source", str(tmp_path), *flags)
    losses = [loss for text in texts for loss in token_losses(run, text, 32, stride or 32)]
    assert found["targets"] == len(losses) == sum(map(len, texts)) - 4
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["bytes"] == found["targets"]
    assert found["bits_per_byte"] == pytest.approx(np.mean(losses) / math.log(2), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--stride", "34", "--context", "33"], {"--context": 33, "--stride": 34}),
        (["--batch_size", "0", "--stride", "0"], {"--batch_size": 0, "--stride": 0}),
        (["--source", "nowhere.txt"], {"--source": "nowhere.txt"}),
    ],
)
def test_evaluate_names_a_wrong_argument(run: Path, arguments: list[str], named: dict) -> None:
    with pytest.raises(ConfigError) as error:
        command.main(["--checkpoint", str(run), *arguments], "evaluate")
    assert {problem.setting: problem.value for problem in error.value.problems} == named


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [("rows.jsonl", "a row", "text files"), ("tokens.bin", "aaaa", "text files"), ("foreign.txt", "größe", "'ß'")],
)
def test_evaluate_refuses_other_than_texts_of_the_model(
    run: Path, tmp_path: Path, name: str, content: str, named: str
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        command.main(["--checkpoint", str(run), "--source", str(tmp_path / name)], "evaluate")
    (problem,) = error.value.problems
    assert (problem.setting, problem.value) == ("--source", str(tmp_path / name))
    assert named in problem.allowed + problem.reason


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


@given(length=st.integers(0, 30), context=st.integers(1, 7), data=st.data())
def test_windows_count_each_target_once_with_enough_context(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    counted = []
    for window in windows(length, context, stride):
        assert 0 < window.end - window.start <= context
        for index in range(window.start + window.counted, window.end):
            counted.append(index)
            assert index - window.start >= min(index, context - stride)
    assert counted == list(range(max(length - 1, 0)))


def test_score_equals_the_loss_of_the_logits() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(50, d_model=16, num_heads=2, num_layers=1)).eval()
    inputs, targets = torch.randint(50, (2, 3, CHUNK // 2))
    targets[1, 7] = IGNORE_INDEX
    with torch.no_grad():
        losses = F.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(score(model, inputs, targets), losses)
