"""Compares training on a model's own loss with a plain torch loop, for models of many kinds and in several layouts.

    python -m tests.integration.objectives [--steps 20] [--models gpt2 t5]

Prints the largest relative difference of the losses, for each model and layout, and whether a resumed run is the same.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from fundamentallm import Trainer, TrainingConfig
from tests.integration.runs import StopAt, on_processes, weights

VOCABULARY, BATCH, ROWS = 64, 6, 20
IGNORED = -100


def samples() -> list[Tensor]:
    """Rows of token ids, of 5 to 16 tokens. The last batch of an epoch is short."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 17, (ROWS,), generator=generator).tolist()
    return [torch.randint(4, VOCABULARY, (length,), generator=generator) for length in lengths]


def padded(rows: list[Tensor], value: int = 0) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)


def texts(rows: list[Tensor], labels: Any) -> dict[str, Any]:
    mask = padded([torch.ones_like(row) for row in rows])
    return {"input_ids": padded(rows), "attention_mask": mask, "labels": labels}


def causal(rows: list[Tensor]) -> dict[str, Any]:
    return texts(rows, padded(rows, IGNORED))


def masked(rows: list[Tensor]) -> Any:
    """Masks each row by itself, seeded by the row: the collator would draw other masks on other processes."""
    from tokenizers import Tokenizer, models
    from transformers import BatchEncoding, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    names = {name: number for number, name in enumerate(["[PAD]", "[MASK]", *map(str, range(2, VOCABULARY))])}
    words = Tokenizer(models.WordLevel(names, unk_token="[PAD]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", mask_token="[MASK]")
    collator, made = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3), []
    for row in rows:
        torch.manual_seed(int(row.sum()))
        made.append(collator([{"input_ids": row}]))
    ids, labels = ([batch[name][0] for batch in made] for name in ("input_ids", "labels"))
    return BatchEncoding(texts(ids, padded(labels, IGNORED)))


def classes(rows: list[Tensor]) -> dict[str, Any]:
    return texts(rows, torch.tensor([int(row.sum()) % 3 for row in rows]))


def numbers(rows: list[Tensor]) -> dict[str, Any]:
    return texts(rows, torch.stack([row.float().mean() / VOCABULARY for row in rows]))


def tags(rows: list[Tensor]) -> dict[str, Any]:
    return texts(rows, padded([row % 3 for row in rows], IGNORED))


def answers(rows: list[Tensor]) -> dict[str, Any]:
    return texts(rows, padded([row.flip(0)[: len(row) // 2 + 1] for row in rows], IGNORED))


def images(rows: list[Tensor]) -> dict[str, Any]:
    pixels = [torch.sin(row.float().sum() * torch.arange(3 * 16 * 16)).view(3, 16, 16) for row in rows]
    return {"pixel_values": torch.stack(pixels), "labels": classes(rows)["labels"]}


class OwnModel(nn.Module):
    """Returns a mapping, and shifts its labels without saying so."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.head(self.embedding(input_ids).cumsum(1) / 8)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8, **PLAIN}


class Case(NamedTuple):
    """A model and its collate function."""

    model: str
    settings: dict[str, Any]
    collate: Callable[[list[Tensor]], Any]

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        if self.model == "own":
            return OwnModel()
        import transformers

        model_class = getattr(transformers, self.model)
        return model_class(model_class.config_class(**self.settings))  # type: ignore[no-any-return]


CASES = {
    "gpt2": Case("GPT2LMHeadModel", {**GPT2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}, causal),
    "llama": Case("LlamaForCausalLM", TEXT, causal),
    "qwen3": Case("Qwen3ForCausalLM", {**TEXT, "head_dim": 8, "num_key_value_heads": 2}, causal),
    "bert": Case("BertForMaskedLM", {**TEXT, **PLAIN}, masked),
    "sequences": Case("BertForSequenceClassification", {**TEXT, **PLAIN, "num_labels": 3}, classes),
    "numbers": Case("BertForSequenceClassification", {**TEXT, **PLAIN, "num_labels": 1}, numbers),
    "tokens": Case("BertForTokenClassification", {**TEXT, **PLAIN, "num_labels": 3}, tags),
    "t5": Case("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0, "pad_token_id": 0}, answers),
    "vit": Case("ViTForImageClassification", {**IMAGE, "num_labels": 3}, images),
    "own": Case("own", {}, causal),
}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def plain_losses(name: str, steps: int) -> list[float]:
    """A loop without any of the package's code, over whole batches."""
    case, rows, losses = CASES[name], samples(), []
    model = case.make().train()
    optimizer = optimizer_of(model)
    for step in range(steps):
        start = step % -(-ROWS // BATCH) * BATCH
        batch = dict(case.collate(rows[start : start + BATCH]))
        loss = model(**(batch if case.model != "own" else {k: batch[k] for k in ("input_ids", "labels")}))["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trainer_of(
    name: str, steps: int, folder: Path | str | None = None, callbacks: Any = (), **training: Any
) -> Trainer:
    case = CASES[name]
    model = case.make()
    optimizer, accelerator = optimizer_of(model), training.pop("accelerator", None)
    config = TrainingConfig(
        max_steps=steps,
        log_every_n_steps=1,
        lr_scheduler="constant",
        checkpoint_dir=folder and str(folder),
        **training,
    )
    loader = DataLoader(samples(), batch_size=BATCH, collate_fn=case.collate)
    extra = {"callbacks": list(callbacks), "optimizer": optimizer, "accelerator": accelerator}
    return Trainer(model, config, loader, **extra)


def difference(one: list[float], other: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(x - y) / abs(x) for x, y in zip(one, other, strict=True))


def resumes_to_the_bit(name: str, steps: int, folder: Path) -> bool:
    """Whether a run that was stopped half-way, in the middle of an epoch, ends with the weights of one that was not."""
    whole = trainer_of(name, steps, micro_batch_size=4)
    whole.train()
    trainer_of(name, steps, folder, [StopAt(steps // 2)], micro_batch_size=4).train()
    resumed = trainer_of(name, steps, folder, micro_batch_size=4)
    resumed.train()
    return all(torch.equal(value, weights(resumed)[key]) for key, value in weights(whole).items())


def compare_on_processes(count: int, expected: dict[str, list[float]], folder: str, micro: int | None) -> None:
    """Runs on each process: compares the losses of each model, and writes the differences to a file."""
    found = {}
    for name, losses in expected.items():
        trainer = trainer_of(name, len(losses), micro_batch_size=micro)
        assert trainer.accelerator.num_processes == count
        found[name] = difference(losses, trainer.train()["train_loss"])
    Path(folder, f"found-{trainer.accelerator.process_index}.json").write_text(json.dumps(found))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--models", nargs="*", default=list(CASES))
    options = parser.parse_args()
    expected = {name: plain_losses(name, options.steps) for name in options.models}
    with tempfile.TemporaryDirectory() as folder:
        two: dict[int | None, dict[str, float]] = {}
        for micro in (None, 1):
            on_processes(2, compare_on_processes, expected, folder, micro)
            two[micro] = json.loads(Path(folder, "found-0.json").read_text())
        print("| model | 1 process | micro-batches of 4 | of 1 | 2 processes | micro-batches of 1 | resumed |")
        print("|---|---|---|---|---|---|---|")
        for name, losses in expected.items():
            single = [
                difference(losses, trainer_of(name, options.steps, micro_batch_size=micro).train()["train_loss"])
                for micro in (None, 4, 1)
            ]
            cells = [f"{value:.0e}" for value in (*single, two[None][name], two[1][name])]
            same = resumes_to_the_bit(name, options.steps, Path(folder, name))
            print(f"| {name} | {' | '.join(cells)} | {'to the bit' if same else 'DIFFERS'} |", flush=True)


if __name__ == "__main__":
    main()
