"""TokenDataset: windows that make every token but the first a target exactly once."""

import numpy as np
import pytest
import torch

from fundamentallm.config.schema import IGNORE_INDEX
from fundamentallm.data.corpus import Tokens
from fundamentallm.data.datasets import MixedDataset, PairDataset, TokenDataset
from fundamentallm.data.tokenizers import create_tokenizer
from tests.conftest import problem_of


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_every_token_but_the_first_is_a_target_once(length: int) -> None:
    for count in range(length + 1, 5 * length + 2):  # up to five samples, with every possible length of the last
        dataset = TokenDataset(np.arange(count), length)  # a token is its position
        inputs, targets = dataset.__getitems__(range(len(dataset)))
        kept = targets != IGNORE_INDEX
        assert targets[kept].tolist() == list(range(1, count))
        assert torch.equal(inputs[kept], targets[kept] - 1)
        assert inputs[-1].tolist() == list(range(count - 1 - length, count - 1))


def test_a_batch_is_its_items_stacked() -> None:
    dataset = TokenDataset(np.random.default_rng(0).integers(0, 50, 33).astype(np.uint16), 7)
    items = [dataset[index] for index in (1, -4, 4, 0)]
    for part, whole in enumerate(dataset.__getitems__([1, 1, 4, 0])):
        assert torch.equal(whole, torch.stack([item[part] for item in items]))
        assert whole.dtype == torch.int64
    assert len(list(dataset)) == len(dataset) == 5
    with pytest.raises(IndexError):
        dataset[-6]


def test_token_dataset_refuses_too_few_tokens() -> None:
    assert len(TokenDataset(np.arange(8), 7)) == 1
    problem = problem_of(TokenDataset, np.arange(7), 7)
    assert (problem.setting, problem.value) == ("data.sequence_length", 7)
    assert "7 tokens" in problem.reason
    assert problem_of(TokenDataset, np.arange(7), 0).value == 0


# ---- pairs --------------------------------------------------------------------------------------------------

END = 999
PAIRS = [([1, 2, 3], [4, 5]), ([6], [7]), ([8] * 70, [9, 10]), ([11], list(range(12, 112))), ([], [112])]


def pairs(length: int, num_bytes: int | None = None) -> PairDataset:
    rows, tokens = [], list[int]()
    for prompt, answer in PAIRS:
        rows.append((len(tokens) + len(prompt), len(tokens) + len(prompt) + len(answer) + 1))
        tokens += [*prompt, *answer, END]
    return PairDataset(Tokens(np.array(tokens, np.uint16), np.array(rows), num_bytes), length, None, END)


@pytest.mark.parametrize("indices", [[0], [1, 0], [0, 1, 2, 3, 4], [4, 3]])
def test_targets_of_a_pair_are_its_answer_and_end(indices: list[int]) -> None:
    inputs, targets = pairs(200).__getitems__(indices)
    for x, y, index in zip(inputs, targets, indices, strict=True):
        prompt, answer = PAIRS[index]
        whole = [*prompt, *answer, END]
        expected = [IGNORE_INDEX] * max(len(prompt) - 1, 0) + whole[max(len(prompt), 1) :]
        assert x[: len(whole) - 1].tolist() == whole[:-1]
        assert y.tolist() == expected + [IGNORE_INDEX] * (len(y) - len(expected))


def test_batch_of_pairs_is_padded_to_a_multiple() -> None:
    widths = [pairs(200).__getitems__(indices)[0].shape[1] for indices in ([0], [0, 2], [0, 1, 3], [4])]
    assert widths == [64, 128, 128, 64]
    assert pairs(100).__getitems__([3])[0].shape[1] == 100


def test_long_pairs_are_cut_off_and_counted() -> None:
    dataset = pairs(50)
    assert (dataset.num_cut, dataset.num_lost) == (2, 1)
    _, targets = dataset.__getitems__([2, 3])
    assert (targets[0] == IGNORE_INDEX).all()
    assert targets[1].tolist() == list(range(12, 62))
    problem = problem_of(PairDataset, Tokens(np.arange(9), np.array([[4, 9]]), None), 1)
    assert (problem.setting, problem.value) == ("data.sequence_length", 1)
    none = Tokens(np.arange(9), np.empty((0, 2), np.int64), None)
    assert problem_of(PairDataset, none, 1).setting == "data.sequence_length"


def test_num_bytes_excludes_what_is_cut_off() -> None:
    tokenizer = create_tokenizer("byte", end_of_text="<end>")
    ids = tokenizer.encode("qqaaaa").ids
    tokens = np.array([*ids, tokenizer.token_to_id("<end>")] * 2)
    rows, end = np.array([[2, 7], [9, 14]]), tokenizer.token_to_id("<end>")
    sizes = [PairDataset(Tokens(tokens, rows, 8), length, tokenizer, end).num_bytes for length in (6, 5, 3)]
    assert sizes == [8, 8, 4]


# ---- several sources ----------------------------------------------------------------------------------------


def mixed(weights: list[float] | None = None) -> tuple[MixedDataset, dict[str, TokenDataset]]:
    parts = {"a": TokenDataset(np.arange(0, 81), 8), "b": TokenDataset(np.arange(1000, 1241), 8)}  # 10, 30 samples
    return MixedDataset(parts, weights), parts


@pytest.mark.parametrize(
    ("weights", "counts"),
    [(None, (10, 30)), ([1, 3], (10, 30)), ([1, 1], (30, 30)), ([1, 9], (10, 90)), ([7, 1], (210, 30))],
)
def test_mixture_follows_weights_with_every_sample_present(
    weights: list[float] | None, counts: tuple[int, int]
) -> None:
    dataset, parts = mixed(weights)
    assert len(dataset) == sum(counts)
    inputs, _ = dataset.__getitems__(range(len(dataset)))
    firsts = inputs[:, 0].tolist()
    for part, count, offset in zip(parts.values(), counts, (0, 1000), strict=True):
        times = [firsts.count(offset + 8 * index) for index in range(len(part))]
        assert sum(times) == count
        assert max(times) - min(times) <= 1


def test_mixture_has_the_samples_of_its_parts() -> None:
    dataset, parts = mixed([1, 9])
    inputs, targets = dataset.__getitems__([3, 99, 12, 0])
    ones = [parts["a"][3], parts["b"][29], parts["b"][0], parts["a"][0]]
    assert torch.equal(inputs, torch.stack([x for x, _ in ones]))
    assert torch.equal(targets, torch.stack([y for _, y in ones]))
    assert dataset.locate(99)[0] == "b 232-239"


def test_mixture_of_pairs_is_padded_to_the_widest() -> None:
    dataset = MixedDataset({"a": pairs(200), "b": pairs(200)})
    inputs, targets = dataset.__getitems__([0, len(PAIRS) + 3])
    wide = pairs(200)[3]
    assert torch.equal(inputs[1], wide[0])
    assert torch.equal(targets[1], wide[1])
    assert targets[0].tolist()[:5] == [IGNORE_INDEX] * 2 + [4, 5, END]
    assert (targets[0, 5:] == IGNORE_INDEX).all()


def test_fingerprints_depend_on_weights_and_on_where_answers_start() -> None:
    starts = ([[2, 8]], [[3, 8]], [[2, 4], [5, 8]])
    assert len({PairDataset(Tokens(np.arange(8), np.array(rows), None), 8).fingerprint() for rows in starts}) == 3
    prints = [mixed(weights)[0].fingerprint() for weights in (None, [1, 3], [1, 1], [2, 2])]
    assert prints[0] == prints[1]
    assert prints[2] == prints[3] != prints[0]
