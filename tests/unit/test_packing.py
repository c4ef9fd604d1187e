"""Packed pairs: whole pairs in few windows, each computed as it is alone."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, Qwen2Config

from fundamentallm import DataConfig, ModelConfig, Trainer, TrainingConfig, Transformer, create_loss
from fundamentallm.config.schema import IGNORE_INDEX
from fundamentallm.data.corpus import Tokens
from fundamentallm.data.datasets import MixedDataset, PackedDataset, PairDataset, best_fit, opening
from fundamentallm.data.loaders import collate
from fundamentallm.errors import ConfigError
from fundamentallm.models.with_loss import ModelWithLoss
from tests.conftest import problem_of

VOCABULARY, LENGTH = 40, 96


def tokens(count: int = 60, longest: int = 60, seed: int = 0, with_turns: bool = False) -> Tokens:
    """Pairs of random tokens; the last prompt fills its sample, and the pair before is cut."""
    chance = np.random.default_rng(seed)
    prompts, answers = chance.integers(0, longest // 2, count), chance.integers(1, longest // 2, count)
    prompts[-1], answers[-2] = 2 * LENGTH, 2 * LENGTH
    ends = (prompts + answers).cumsum()
    rows = np.stack([ends - answers, ends], 1)
    # In a chat, only the first and the last token of each answer are in a turn.
    turns = np.stack([rows[:, 0], rows[:, 0] + 1, np.maximum(ends - 1, rows[:, 0] + 1), ends], 1).reshape(-1)
    ids = chance.integers(0, VOCABULARY, ends[-1]).astype(np.uint16)
    return Tokens(ids, rows, None, turns if with_turns else None)


def both(**settings: Any) -> tuple[PairDataset, PackedDataset]:
    return PairDataset(tokens(**settings), LENGTH), PackedDataset(tokens(**settings), LENGTH)


def documents(inputs: dict[str, Tensor], targets: Tensor) -> list[tuple[list[int], list[int]]]:
    """Returns input ids and targets of each document that has a target, over all windows."""
    found = []
    for ids, positions, row in zip(inputs["input_ids"], inputs["position_ids"], targets, strict=True):
        begins = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        for begin, end in itertools.pairwise(begins):
            assert positions[begin:end].tolist() == list(range(end - begin))
            if (row[begin:end] != IGNORE_INDEX).any():
                found.append((ids[begin:end].tolist(), row[begin:end].tolist()))
    return found


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(50, 120))
def test_best_fit_never_overfills_and_beats_first_come(sizes: list[int], capacity: int) -> None:
    lengths = np.array(sizes)
    windows = best_fit(lengths, capacity)
    filled = np.bincount(windows, weights=lengths)
    assert len(windows) == len(lengths)
    assert filled.min() > 0
    assert filled.max() <= capacity
    count, room = 1, capacity  # the next window is begun if a sample does not fit
    for size in sizes:
        count, room = (count, room - size) if size <= room else (count + 1, capacity - size)
    assert len(filled) <= count
    again: NDArray[np.int64] = best_fit(lengths.copy(), capacity)
    assert (again == windows).all()


@pytest.mark.parametrize("with_turns", [False, True])
def test_windows_hold_each_pair_with_its_own_targets_once(with_turns: bool) -> None:
    single, packed = both(with_turns=with_turns)
    expected = []
    starts, _, stops = single._segments(np.arange(len(single)))
    for index, size in enumerate(stops - starts - 1):
        ids, targets = single[index]
        if (targets != IGNORE_INDEX).any():
            expected.append((ids[:size].tolist(), targets[:size].tolist()))
    found = documents(*packed.__getitems__(range(len(packed))))
    assert sorted(found) == sorted(expected)
    assert len(packed) < len(single) / 2
    assert (packed.num_cut, packed.num_lost) == (single.num_cut, single.num_lost) == (2, 1)


def test_packed_batch_is_its_items_padded() -> None:
    _, packed = both()
    inputs, targets = packed.__getitems__([2, 0, len(packed) - 1])
    for row, index in enumerate((2, 0, len(packed) - 1)):
        one, of_one = packed[index]
        for whole, part in ((inputs["input_ids"], one["input_ids"]), (targets, of_one)):
            assert torch.equal(whole[row, : len(part)], part)
        assert (targets[row, len(of_one) :] == IGNORE_INDEX).all()
    where, ids = packed.locate(0)
    assert len(where.split(", ")) == len(documents(*packed.__getitems__([0])))
    assert ids[: len(opening(packed[0]))].tolist() == opening(packed[0])


def test_mixture_of_packed_sources_has_their_windows() -> None:
    parts = {"a": both()[1], "b": both(seed=1, count=6, longest=20)[1]}
    mixed = MixedDataset(parts, [1, 1])
    inputs, targets = mixed.__getitems__(range(len(mixed)))
    times = len(mixed) // 2 / len(parts["b"])
    assert times > 1
    for number, part in enumerate(parts.values()):
        own = documents(*part.__getitems__(range(len(part))))
        found = documents(inputs, targets)
        assert {str(each) for each in own} <= {str(each) for each in found}
        one, other = mixed[number * len(mixed) // 2], part[0]
        assert torch.equal(one[0]["position_ids"], other[0]["position_ids"])
    assert mixed.fingerprint() != MixedDataset({"a": both()[0], "b": parts["b"]}, [1, 1]).fingerprint()


def test_fingerprint_differs_from_that_of_unpacked_pairs() -> None:
    single, packed = both()
    assert single.fingerprint() != packed.fingerprint() == both()[1].fingerprint()


# ---- models


def answer_losses(model: nn.Module, dataset: PairDataset, with_outputs: bool) -> dict[int, Tensor]:
    """Returns the loss of each pair. All targets of the other pairs in its window are ignored."""
    with_loss, found = ModelWithLoss(model, create_loss()), {}
    for index in range(len(dataset)):
        inputs, targets = dataset.__getitems__([index])
        pairs, document = [index], torch.ones_like(targets)
        if isinstance(dataset, PackedDataset):
            pairs = dataset.pairs[dataset.bounds[index] : dataset.bounds[index + 1]].tolist()
            document = (inputs["position_ids"] == 0).cumsum(1)
        for number, pair in enumerate(pairs, start=1):
            batch = inputs, torch.where(document == number, targets, IGNORE_INDEX)
            found[pair] = with_loss(batch, True)[0] if with_outputs else with_loss(batch)
    return found


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def with_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes))
    return get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))


def ours() -> nn.Module:
    return Transformer(ModelConfig(vocab_size=VOCABULARY, d_model=32, num_heads=4, num_kv_heads=2, num_layers=2))


@pytest.mark.parametrize(("make", "with_outputs"), [(ours, False), (ours, True), (llama, True), (with_lora, True)])
def test_packed_answers_have_their_unpacked_losses(make: Callable[[], nn.Module], with_outputs: bool) -> None:
    """Gradients too. Without outputs, our model computes the loss from hidden states."""
    torch.manual_seed(0)
    model, found = make(), []
    for dataset in both(count=20):
        model.zero_grad()
        losses = answer_losses(model, dataset, with_outputs)
        torch.stack([*losses.values()]).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append(({pair: loss.item() for pair, loss in losses.items()}, gradients))
    (single, expected), (packed, gradients) = found
    assert single[19] == 0  # whose prompt fills its sample
    assert packed == pytest.approx({pair: loss for pair, loss in single.items() if loss}, rel=1e-5)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class NoPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embedding(input_ids))


class Ignores(NoPositions):
    """Takes positions, and lets each token see all before it."""

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.head(self.embedding(input_ids).cumsum(1))


class MixesLittle(NoPositions):
    """Mixes by less than bfloat16 may round."""

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        hidden = self.embedding(input_ids)
        return self.head(hidden + 1e-3 * hidden.cumsum(1)).bfloat16()


def falcon() -> nn.Module:
    """Makes no mask from positions, in transformers 5."""
    shape = FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    return AutoModelForCausalLM.from_config(shape)


@pytest.mark.parametrize("make", [NoPositions, Ignores, MixesLittle, falcon])
def test_model_that_mixes_packed_samples_is_refused(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    loader = DataLoader(both()[1], batch_size=3, collate_fn=collate)
    trainer = Trainer(make(), TrainingConfig(max_steps=2), loader, callbacks=[])
    problem = problem_of(trainer.train)
    assert (problem.setting, problem.value) == ("data.packing", True)
    assert type(trainer.model).__name__ in problem.reason
    assert trainer.global_step == 0


CONFLICTS = [
    ({}, "packing"),
    ({"prompt_field": "q", "end_of_text": "#", "mask_documents": True}, "mask_documents"),
    ({"prompt_field": "q", "end_of_text": "#", "streaming": True}, "packing"),
]


@pytest.mark.parametrize(("settings", "setting"), CONFLICTS)
def test_packing_in_conflict_with_another_setting_is_refused(settings: dict[str, Any], setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(packing=True, **settings)
    assert (setting, True) in [(found.setting, found.value) for found in caught.value.problems]
