"""A model of ours in lm-eval gets what lm-eval's own adapter for transformers gets of the same checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra 'eval'")

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.checkpoint.snapshot import MODEL_KEY
from fundamentallm.commands import evaluate as command
from fundamentallm.config.schema import ModelConfig
from fundamentallm.data.tokenizers import create_tokenizer
from fundamentallm.errors import ConfigError
from fundamentallm.inference.lm_eval_model import HarnessModel
from fundamentallm.models.transformer import Transformer
from tests.integration.runs import prose

COMMON = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
}
TASKS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        **COMMON,
        "output_type": "multiple_choice",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_text": {
        **COMMON,
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "tiny_writing": {
        **COMMON,
        "output_type": "generate_until",
        "doc_to_target": "{{written}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
CONTEXT = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and tasks whose data lies beside them."""
    folder, text = tmp_path_factory.mktemp("harness"), prose(3_000)
    tokenizer = create_tokenizer("bpe:300", lambda: [text], lambda: [text])
    torch.manual_seed(0)
    model = Transformer(ModelConfig(300, d_model=16, num_heads=2, num_layers=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3).add_(1.0 if parameter.ndim == 1 else 0.0)
    files = {
        "config.json": json.dumps(model.transformers_config(CONTEXT, end_of_text=3)),
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "$"}),
    }
    CheckpointManager(folder).save({MODEL_KEY: model.state_dict()}, "model", files=files)
    assert tokenizer.token_to_id("$") == 3
    words = text.split()
    documents = [
        {
            "question": " ".join(words[i * 11 : i * 11 + 5]),
            "choices": [f" {word}" for word in words[i * 11 + 5 : i * 11 + 9]],
            "answer": i % 4,
            "text": text[i * 100 : i * 100 + 40 * (i + 1)],
            "written": "",
        }
        for i in range(12)
    ]
    (folder / "tasks").mkdir()
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    for name, task in TASKS.items():
        data = {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")}
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": name, "dataset_kwargs": data, **task}))
    return folder


def test_tasks_give_what_they_give_of_the_checkpoint_in_transformers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    flags = ["--include_path", str(folder / "tasks"), "--batch_size", "5", "--json"]
    assert command.main(["--checkpoint", str(folder / "model"), "--tasks", *TASKS, *flags], "evaluate") == 0
    ours = json.loads(capsys.readouterr().out.splitlines()[-1])
    theirs = simple_evaluate(
        model=HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", max_length=CONTEXT),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
    )["results"]
    assert ours.keys() == TASKS.keys()
    for task, measures in ours.items():
        assert measures
        for name, value in measures.items():
            key = name if name in theirs[task] else f"{name},none"
            assert value == pytest.approx(theirs[task][key], rel=1e-5), (task, name)


def test_texts_are_those_that_transformers_writes(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model"), create(folder)
    theirs = AutoTokenizer.from_pretrained(folder / "model")
    ids = theirs("the statement", return_tensors="pt")["input_ids"]
    text = theirs.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :])
    assert tokenizer._generate("the statement", {"until": [], "max_gen_toks": 12, "do_sample": False}) == text
    end = text[5]
    assert tokenizer._generate("the statement", {"until": end, "max_gen_toks": 12}) == text[: text.index(end)]


def create(folder: Path) -> HarnessModel:
    return HarnessModel(str(folder / "model"))


def test_a_task_that_is_not_known_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no_such_task"):
        command.main(["--checkpoint", str(folder / "model"), "--tasks", "no_such_task"], "evaluate")
