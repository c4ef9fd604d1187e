"""Runs on rows, pairs and several sources: targets, independence of the layout, and resuming."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fundamentallm import Config
from fundamentallm.config.schema import DataConfig, ModelConfig, TrainingConfig
from fundamentallm.train import make_trainer, run
from tests.integration.runs import StopAt, assert_same_weights, lines, on_processes, prose, timeless, weights

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, chance = tmp_path_factory.mktemp("data"), random.Random(0)
    documents = [text for text in prose(60_000).split("\n\n") if text.strip()]
    for name, part in (("a", documents[:90]), ("b", documents[90:])):
        rows = [json.dumps({"text": text}) for text in part]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    sums = [(chance.randrange(9), chance.randrange(9)) for _ in range(300)]
    pairs = [json.dumps({"q": f"{a}+{b} is " + "?" * chance.randrange(70), "text": f"{a + b}"}) for a, b in sums]
    (folder / "pairs.jsonl").write_text("\n".join(pairs))
    return folder


def config_of(folder: Path, output: Path | str, source: Any, data: dict[str, Any], **training: Any) -> Config:
    defaults = {"batch_size": 8, "max_steps": 12, "learning_rate": 1e-2, "log_every_n_steps": 1}
    data = {"end_of_text": END, "sequence_length": 96, "cache_dir": str(folder / "cache")} | data
    return Config(
        str(output), ModelConfig(d_model=16, num_heads=2, num_layers=2), DataConfig(source, **data),
        TrainingConfig(**{**defaults, **training}), sample_tokens=20,
    )  # fmt: skip


def on_pairs(world: int, folder: Path, output: Path, micro_batch_size: int | None) -> None:
    source = str(folder / "pairs.jsonl")
    trainer = run(config_of(folder, output, source, {"prompt_field": "q"}, micro_batch_size=micro_batch_size))
    assert trainer.accelerator.num_processes == world


def test_pairs_train_the_same_in_any_layout(folder: Path, tmp_path: Path) -> None:
    """The padding of each process and micro-batches change nothing but rounding."""
    on_pairs(1, folder, tmp_path / "one", None)
    on_processes(2, on_pairs, folder, tmp_path / "two", 2)
    reference, other = (timeless(lines(tmp_path / name)) for name in ("one", "two"))
    answers = [json.loads(row)["text"] for row in (folder / "pairs.jsonl").read_text().splitlines()]
    per_answer = sum(len(text) + 1 for text in answers) / len(answers)
    assert abs(reference[11]["tokens"] - 12 * 8 * per_answer) < 30  # and not those of the prompts
    assert [line.get("tokens") for line in other] == [line.get("tokens") for line in reference]
    for one, two in zip(reference, other, strict=True):
        for key in one.keys() & {"train_loss", "val_loss", "grad_norm", "val_bits_per_byte"}:
            assert two[key] == pytest.approx(one[key], rel=1e-5)
    validation = reference[-1]
    held_out = answers[int(len(answers) * 0.9) :]
    targets, num_bytes = sum(len(text) + 1 for text in held_out), sum(map(len, held_out))
    bits = validation["val_loss"] / math.log(2) * targets / num_bytes
    assert validation["val_bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_mixture_with_masked_documents_resumes_bit_exactly(folder: Path, tmp_path: Path) -> None:
    source = {str(folder / "a.jsonl"): 0.7, str(folder / "b.jsonl"): 0.3}
    settings = {"mask_documents": True, "tokenizer": "bpe:300"}
    whole = run(config_of(folder, tmp_path / "whole", source, settings))
    part = config_of(folder, tmp_path / "part", source, settings)
    first = make_trainer(part)
    first.callbacks.add(StopAt(5))
    first.train()
    rest = run(part)
    assert rest.global_step == 12
    assert_same_weights(weights(rest), weights(whole))
    assert timeless(lines(tmp_path / "part")) == timeless(lines(tmp_path / "whole"))
    checkpoint = tmp_path / "whole/checkpoints/step_00000012"
    assert AutoTokenizer.from_pretrained(checkpoint).eos_token == END
    shape = json.loads((checkpoint / "config.json").read_text())
    assert shape["eos_token_id"] == whole.model.document_start == whole.train_loader.dataset.end_of_text
