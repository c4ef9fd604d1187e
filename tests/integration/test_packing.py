"""Runs on packed pairs and chats: the same in any layout, resumed to the bit, validated as without packing."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from fundamentallm import Config, DataConfig, ModelConfig, Trainer, TrainingConfig
from fundamentallm.commands.checkpoints import main as checkpoints
from fundamentallm.commands.evaluate import main as evaluate
from fundamentallm.config.schema import IGNORE_INDEX
from fundamentallm.errors import ConfigError
from fundamentallm.train import make_trainer, run
from tests.integration.runs import StopAt, assert_same_weights, lines, on_processes, timeless, weights
from tests.unit.test_chat import PLAIN, chat, model_folder

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that transformers computes, and chats and pairs of varied lengths."""
    folder, chance = tmp_path_factory.mktemp("packing"), random.Random(0)
    model_folder(folder / "model", PLAIN)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = LlamaConfig(vocab_size=271, eos_token_id=256, attention_bias=True, **sizes)
    LlamaForCausalLM(shape).save_pretrained(folder / "model")
    turns = [("user", "1+2?"), ("assistant", "3")]
    rows = [{"messages": chat(*turns * chance.randint(1, 3))} for _ in range(60)]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("a", "b"):
        sums = [(chance.randrange(9), chance.randrange(9)) for _ in range(100)]
        pairs = [{"q": f"{a}+{b} is " + "?" * chance.randrange(40), "text": f"{a + b}"} for a, b in sums]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


def chats(folder: Path, output: Path, packing: bool = True, **training: Any) -> Config:
    data = {"messages_field": "messages", "sequence_length": 128, "cache_dir": str(folder / "cache")}
    return Config(
        str(output),
        ModelConfig(pretrained=str(folder / "model")),
        DataConfig(str(folder / "chats.jsonl"), packing=packing, train_split=0.8, **data),
        TrainingConfig(max_steps=STEPS, batch_size=8, log_every_n_steps=1, learning_rate=1e-2, **training),
        sample_tokens=0,
    )


def pairs(folder: Path, output: Path, **data: Any) -> Config:
    source = {str(folder / "a.jsonl"): 0.7, str(folder / "b.jsonl"): 0.3}
    data = {"prompt_field": "q", "end_of_text": "#", "packing": True, "sequence_length": 96} | data
    return Config(
        str(output),
        ModelConfig(d_model=16, num_heads=2, num_layers=2, dropout=0.1),
        DataConfig(source, cache_dir=str(folder / "cache"), **data),
        TrainingConfig(max_steps=STEPS, batch_size=4, log_every_n_steps=1, learning_rate=1e-2),
    )


def on_chats(world: int, folder: Path, output: Path) -> None:
    assert run(chats(folder, output, micro_batch_size=2)).accelerator.num_processes == world


def test_packed_chats_train_the_same_in_any_layout(folder: Path, tmp_path: Path) -> None:
    run(chats(folder, tmp_path / "1"))
    on_processes(2, on_chats, folder, tmp_path / "2")
    one, two = (timeless(lines(tmp_path / name)) for name in ("1", "2"))
    assert len(one) == len(two) > STEPS
    for expected, found in zip(one, two, strict=True):
        assert found.get("tokens") == expected.get("tokens")
        for key in expected.keys() & {"train_loss", "val_loss", "grad_norm", "val_bits_per_byte"}:
            assert found[key] == pytest.approx(expected[key], rel=1e-5)


def test_packed_validation_equals_the_unpacked_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, targets = [], []
    for packing in (False, True):
        trainer = make_trainer(chats(folder, tmp_path / str(packing), packing, eval_at_start=True))
        trainer.callbacks.add(StopAt(1))
        trainer.train()
        found.append(lines(trainer.output_dir)[0])
        data = trainer.val_loader.dataset
        targets.append(sum(int((data[index][1] != IGNORE_INDEX).sum()) for index in range(len(data))))
    for key in ("val_loss", "val_bits_per_byte"):
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-5)
    assert targets[0] == targets[1] > 0  # the assistant's turns only
    capsys.readouterr()
    last = [line["val_loss"] for line in lines(tmp_path / "True") if "val_loss" in line][-1]
    for options, count in (([], 12), (["--source", str(folder / "chats.jsonl")], 60)):
        assert evaluate([str(tmp_path / "True"), "--json", *options], "evaluate") == 0
        result = json.loads(capsys.readouterr().out)
        assert result["samples"] < count  # windows
        if not options:
            assert (result["targets"], result["loss"]) == (targets[1], pytest.approx(last, rel=1e-5))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Trainer:
    return run(pairs(folder, folder / "whole"))


def test_packed_mixture_resumes_bit_exactly(folder: Path, whole: Trainer, tmp_path: Path) -> None:
    first = make_trainer(pairs(folder, tmp_path))
    first.callbacks.add(StopAt(STEPS // 2))
    first.train()
    assert_same_weights(weights(run(pairs(folder, tmp_path))), weights(whole))
    assert timeless(lines(tmp_path)) == timeless(lines(whole.output_dir))
    assert {"val_loss", "val_a_loss", "val_b_loss"} <= lines(tmp_path)[-1].keys()


def test_resume_without_packing_is_refused(folder: Path, whole: Trainer) -> None:
    with pytest.raises(ConfigError) as caught:
        run(pairs(folder, folder / "whole", packing=False))
    assert {"data.packing", "data.content"} <= {problem.setting for problem in caught.value.problems}


def test_samples_command_shows_packed_windows(folder: Path, whole: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert checkpoints(["samples", str(whole.output_dir), "--step", "2"], "checkpoints") == 0
    _, *samples = capsys.readouterr().out.split("---- sample ")
    assert len(samples) == 4
    for sample in samples:
        title, text = sample.split(" ----\n")
        assert text.count("#") == title.count(", ") > 1  # the end of each pair, and its span of tokens
