"""Training from a model in Hugging Face format, and the checkpoints of such a run."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fundamentallm import Config, DataConfig, ModelConfig, Trainer, TrainingConfig, create_tokenizer
from fundamentallm.commands.checkpoints import main as checkpoints
from fundamentallm.commands.generate import main as generate
from fundamentallm.commands.prepare import main as prepare
from fundamentallm.data.corpus import load_corpus
from fundamentallm.distributed import accelerator as accelerators
from fundamentallm.errors import CheckpointError, ConfigError
from fundamentallm.run.resume import completed
from fundamentallm.train import make_trainer
from tests.conftest import reset_accelerate
from tests.integration.runs import (
    StopAt,
    assert_same_weights,
    lines,
    on_processes,
    prose,
    sharded_accelerator,
    weights,
)

KINDS = ("llama", "gpt2")


def make(kind: str, vocabulary: int) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        ids = {"bos_token_id": None, "eos_token_id": 3}
        return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes, **ids, tie_word_embeddings=True))
    sizes = {"n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 3}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each kind, in bfloat16, with a tokenizer that has a few tokens less than the model has rows."""
    base, text = tmp_path_factory.mktemp("pretrained"), prose()
    (base / "text.txt").write_text(text)
    tokenizer = create_tokenizer("bpe:300", text)
    for kind in KINDS:
        make(kind, 308).bfloat16().save_pretrained(base / kind)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=77).save_pretrained(base / kind)
    return {"text": base / "text.txt", **{kind: base / kind for kind in KINDS}}


def config(folders: dict[str, Path], kind: str, output: Path, **training: Any) -> Config:
    defaults: dict[str, Any] = {"batch_size": 8, "max_steps": 6, "log_every_n_steps": 1, "save_every_n_steps": 3}
    return Config(
        output_dir=str(output),
        model=ModelConfig(pretrained=str(folders[kind])),
        data=DataConfig(str(folders["text"]), sequence_length=16, cache_dir=str(output.parent / "cache")),
        training=TrainingConfig(**{**defaults, **training}),
        sample_tokens=0,
    )


def start(config: Config) -> Trainer:
    reset_accelerate()
    return make_trainer(config.resolved())


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of six steps."""
    output = tmp_path_factory.mktemp("run") / "run"
    trainer = start(config(folders, request.param, output))
    before = logits(trainer.model)
    history = trainer.train()
    return Run(request.param, output, before, logits(trainer.model), history["train_loss"], weights(trainer))


class Run(NamedTuple):
    kind: str
    folder: Path
    before: Tensor
    after: Tensor
    losses: list[float]
    weights: dict[str, Tensor]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "step_00000006"


IDS = torch.arange(16)[None]


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    output = model.eval()(IDS)
    return output if isinstance(output, Tensor) else output.logits


def test_run_starts_from_the_model_and_its_checkpoint_opens(run: Run, folders: dict[str, Path]) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folders[run.kind], dtype=torch.float32)
    torch.testing.assert_close(run.before, logits(theirs), atol=1e-5, rtol=1e-5)
    assert run.losses[-1] < run.losses[0] - 0.01
    again, found = AutoModelForCausalLM.from_pretrained(run.checkpoint, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(theirs)
    assert (again.dtype, again.config.vocab_size, again.generation_config.eos_token_id) == (torch.float32, 308, 3)
    torch.testing.assert_close(logits(again), run.after, atol=1e-5, rtol=1e-5)
    theirs, again = (AutoTokenizer.from_pretrained(folder) for folder in (folders[run.kind], run.checkpoint))
    assert again.model_max_length == 77
    assert again("the statement")["input_ids"] == theirs("the statement")["input_ids"]


def test_stopped_run_resumes_bit_exactly(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    """Also with GPT-2's own dropout, and although the model's folder has moved."""
    half = start(config(folders, run.kind, tmp_path / "half"))
    half.callbacks.add(StopAt(3))
    half.train()
    moved = folders | {run.kind: shutil.copytree(folders[run.kind], tmp_path / "moved")}
    again = start(config(moved, run.kind, tmp_path / "half"))
    again.train()
    assert again.global_step == 6
    assert_same_weights(weights(again), run.weights)


def test_checkpoint_is_a_pretrained_model(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    trainer = start(config({**folders, "old": run.checkpoint}, "old", tmp_path / "new"))
    assert_same_weights(weights(trainer), run.weights)
    assert trainer.global_step == 0


def test_damaged_checkpoint_is_no_pretrained_model(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    damaged = shutil.copytree(run.checkpoint, tmp_path / "damaged")
    content = bytearray((damaged / "config.json").read_bytes())
    content[-3] ^= 1
    (damaged / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        start(config({**folders, "old": damaged}, "old", tmp_path / "new"))
    (damaged / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        start(config({**folders, "old": damaged}, "old", tmp_path / "new"))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_token_without_a_row_and_own_end_of_text(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(folders[kind], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{index}>" for index in range(8)]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # the model has 308 rows
    tokenizer.save_pretrained(folder)
    assert tokenizer.pad_token_id == 308
    made = config({**folders, kind: folder}, kind, tmp_path / "run", max_steps=1)
    made = dataclasses.replace(made, data=dataclasses.replace(made.data, end_of_text="<0>"))
    start(made).train()
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    again = AutoTokenizer.from_pretrained(checkpoint)
    assert (again.eos_token, again.pad_token, again.model_max_length) == ("<0>", "<pad>", 77)
    assert AutoModelForCausalLM.from_pretrained(checkpoint).generation_config.eos_token_id == [300, 3]
    text = tmp_path / "padded.txt"
    text.write_text(prose() + "<pad>")
    with pytest.raises(ConfigError) as error:
        start(dataclasses.replace(made, data=dataclasses.replace(made.data, source=str(text))))
    assert [problem.setting for problem in error.value.problems] == ["model.vocab_size"]
    assert "<pad>" in error.value.problems[0].reason


def test_generate_takes_a_run_and_a_model_folder(
    run: Run, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--prompt", "the", "--max_new_tokens", "9", "--temperature", "0", "--ignore_end"]
    for given, folder in ((run.folder, run.checkpoint), (folders[run.kind], folders[run.kind])):
        assert generate(["--checkpoint", str(given), *flags], "generate") == 0
        tokenizer, model = (kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoModelForCausalLM))
        model.float().generation_config.eos_token_id = None
        ids = tokenizer("the", return_tensors="pt")["input_ids"]
        expected = model.generate(ids, max_new_tokens=9, do_sample=False)[0]
        assert capsys.readouterr().out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def train_sharded(processes: int, kind: str, folders: dict[str, Path], output: str) -> None:
    accelerators.create_accelerator = lambda *_: sharded_accelerator()
    trainer = make_trainer(config(folders, kind, Path(output), max_minutes=60).resolved())
    assert (trainer.accelerator.num_processes, trainer.is_sharded) == (processes, True)
    trainer.train()
    trainer.leave_group()


def test_sharded_run_is_the_same_and_can_be_consolidated(
    run: Run, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_processes(2, train_sharded, run.kind, folders, str(tmp_path / "run"))
    if run.kind == "llama":  # dropout masks depend on the process
        losses = [line["train_loss"] for line in lines(tmp_path / "run") if "train_loss" in line]
        assert losses == pytest.approx(run.losses, rel=1e-5)
    assert checkpoints(["consolidate", str(tmp_path / "run"), str(tmp_path / "whole")], "checkpoints") == 0
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(again), run.after, atol=2e-2 if run.kind == "gpt2" else 1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").model_max_length == 77
    flags = ["--prompt", "the", "--max_new_tokens", "1"]
    if run.kind == "llama":
        assert generate(["--checkpoint", str(tmp_path / "run"), *flags], "generate") == 0
    else:
        with pytest.raises(CheckpointError, match="checkpoints consolidate"):
            generate(["--checkpoint", str(tmp_path / "run"), *flags], "generate")


@pytest.mark.parametrize(
    ("kind", "model", "data", "named"),
    [
        ("llama", {"d_model": 32}, {}, ["model.d_model is 32"]),
        ("llama", {"d_model": 16, "num_heads": 2, "dropout": 0.1}, {}, []),
        ("gpt2", {"vocab_size": 300, "num_layers": 2}, {}, ["model.vocab_size is 300", "model.num_layers is 2"]),
        ("gpt2", {"dropout": 0.1}, {"sequence_length": 25}, ["model.dropout is 0.1", "data.sequence_length is 25"]),
        ("gpt2", {"init_from": "checkpoint"}, {}, ["model.init_from is 'checkpoint'"]),
        ("llama", {}, {"tokenizer": "bpe:300"}, ["data.tokenizer is 'bpe:300'"]),
        ("llama", {}, {"tokenizer": "gpt2/tokenizer.json"}, []),
        ("llama", {}, {"tokenizer": "other.json"}, ["other.json"]),
    ],
)
def test_settings_that_contradict_the_folder_are_refused(
    folders: dict[str, Path], tmp_path: Path, kind: str, model: dict, data: dict, named: list[str]
) -> None:
    made = config(folders, kind, tmp_path)
    text = prose(200)
    (folders["gpt2"].parent / "other.json").write_text(create_tokenizer("char", text).to_str())
    if str(data.get("tokenizer")).endswith(".json"):
        data = {"tokenizer": str(folders["gpt2"].parent / data["tokenizer"])}
    made = dataclasses.replace(
        made, model=dataclasses.replace(made.model, **model), data=dataclasses.replace(made.data, **data)
    )
    if not named:
        done, _ = completed(made.resolved())
        assert (done.model.vocab_size, done.model.dropout) == (308, model.get("dropout", 0.0))
        assert done.data.tokenizer == data.get("tokenizer", str(folders[kind] / "tokenizer.json"))
        assert completed(done.resolved())[0] == done
        return
    with pytest.raises(ConfigError) as caught:
        completed(made.resolved())
    assert len(caught.value.problems) == len(named)
    for text, problem in zip(named, caught.value.problems, strict=True):
        assert text in problem


def test_prepare_uses_the_folders_tokenizer(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(folders, "gpt2", tmp_path / "run")
    words = [f"--model.pretrained={folders['gpt2']}", "--data.sequence_length=16"]
    assert prepare([*words, f"--data.source={folders['text']}", f"--data.cache_dir={made.data.cache_dir}"], "") == 0

    def refuse(*_: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr("fundamentallm.data.corpus.write_source", refuse)
    load_corpus(completed(made)[0].data, show_progress=False)
