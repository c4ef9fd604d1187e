"""Fine-tuning on chats: the same in any layout, resumed to the bit, and a checkpoint that keeps its chat template."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fundamentallm import Config, DataConfig, ModelConfig, Trainer, TrainingConfig
from fundamentallm.commands.generate import main as generate
from fundamentallm.train import make_trainer, run
from tests.conftest import reset_accelerate
from tests.integration.runs import StopAt, assert_same_weights, lines, on_processes, timeless, weights
from tests.unit.test_chat import PLAIN, chat, model_folder

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template, and chats of one turn or two."""
    folder = tmp_path_factory.mktemp("chat")
    model_folder(folder / "model", PLAIN)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=271, eos_token_id=256, **sizes)).save_pretrained(folder / "model")
    with open(folder / "chats.jsonl", "w") as file:
        for a in range(40):
            turns = [("user", f"{a}+2?"), ("assistant", f"{a + 2}")] * (1 + a % 2)
            file.write(json.dumps({"messages": chat(*turns)}) + "\n")
    return folder


def config_of(folder: Path, output: Path, micro_batch_size: int | None = None) -> Config:
    data = DataConfig(
        str(folder / "chats.jsonl"), messages_field="messages", sequence_length=64, cache_dir=str(folder / "cache")
    )
    training = TrainingConfig(
        max_steps=STEPS, batch_size=8, micro_batch_size=micro_batch_size, log_every_n_steps=1, learning_rate=1e-2
    )
    return Config(str(output), ModelConfig(pretrained=str(folder / "model")), data, training, sample_tokens=0)


def on_chats(world: int, folder: Path, output: Path) -> None:
    assert run(config_of(folder, output, micro_batch_size=3)).accelerator.num_processes == world


@pytest.fixture(scope="module")
def whole(folder: Path) -> Trainer:
    reset_accelerate()
    return run(config_of(folder, folder / "whole"))


def test_chats_train_the_same_on_two_processes(folder: Path, whole: Trainer, tmp_path: Path) -> None:
    on_processes(2, on_chats, folder, tmp_path)
    one, two = (timeless(lines(output)) for output in (whole.output_dir, tmp_path))
    assert len(one) == len(two) > STEPS
    for expected, found in zip(one, two, strict=True):
        for key in expected.keys() & {"tokens", "train_loss", "val_loss", "val_bits_per_byte"}:
            assert found[key] == pytest.approx(expected[key], rel=1e-5)


def test_run_on_chats_resumes_and_keeps_its_template(
    folder: Path, whole: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_trainer(config_of(folder, tmp_path / "part"))
    first.callbacks.add(StopAt(STEPS // 2))
    first.train()
    assert_same_weights(weights(run(config_of(folder, tmp_path / "part"))), weights(whole))
    checkpoint = tmp_path / "part/checkpoints" / f"step_{STEPS:08}"
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)
    asked = tokenizer.apply_chat_template(chat(("user", "3+2?")), add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=5, do_sample=False)[0, asked["input_ids"].shape[1] :]
    capsys.readouterr()
    options = ["--chat", "--json", "--prompt", "3+2?", "--temperature", "0", "--max_new_tokens", "5"]
    assert generate([str(checkpoint), *options], "generate") == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert text == tokenizer.decode(answer, skip_special_tokens=True)
