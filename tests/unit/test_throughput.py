"""Throughput, and the peak where it is sure."""

import math
import time

import pytest
import torch
from torch import nn

from fundamentallm import ModelConfig, TrainingConfig, Transformer, create_accelerator
from fundamentallm.training.throughput import Throughput, known_peak, model_flops_per_token, peak_speed


def test_operations_of_a_transformers_model_are_those_of_the_same_shape() -> None:
    transformers = pytest.importorskip("transformers")
    shape = ModelConfig(vocab_size=50, d_model=16, num_heads=4, num_layers=3, qk_norm=False).resolved()
    with torch.device("meta"):
        ours = Transformer(shape)
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ours.transformers_config(24)))
    assert model_flops_per_token(theirs, 24) == model_flops_per_token(ours, 24)


def test_of_a_model_without_a_config_attention_is_left_out() -> None:
    assert model_flops_per_token(nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7)), 1000) == 6 * 8 * 7


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.0),
        ("NVIDIA H100 80GB HBM3", "no", None),  # with TF32 or without, nobody knows
        ("NVIDIA H1000", "bf16", None),
    ],
)
def test_the_peak_is_known_by_the_words_of_the_name(name: str, precision: str, peak: float | None) -> None:
    assert known_peak(name, precision) == peak


IDS = torch.arange(6)


@pytest.mark.parametrize(
    ("sample", "is_known"),
    [
        ((IDS, IDS), True),
        ({"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, True),
        ({"input_ids": [1, 2, 3], "label": 1}, False),  # one target for three tokens
        ((torch.zeros(3, 8, 8), 1), False),
        (IDS, False),
        (object(), False),
    ],
)
def test_peak_speed_knows_the_cost_of_a_target_for_each_token(sample: object, is_known: bool) -> None:
    config = TrainingConfig(max_steps=1, peak_tflops=1.0)
    peak = peak_speed(config, create_accelerator(), nn.Linear(2, 2), [sample])
    assert (peak is not None) == is_known


def test_speed_utilisation_and_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Throughput(1000, peak=2000.0)
    now = 130.0  # the first window, with compilation in it
    assert clock.log(60, 2000) == {"tokens_per_second": pytest.approx(1000 / 30), "mfu": pytest.approx(1 / 60)}
    assert math.isnan(clock.seconds_left(100))
    now = 140.0
    clock.pause(5.0)  # a validation
    assert clock.log(70, 3000) == {"tokens_per_second": 200.0, "mfu": pytest.approx(0.1)}
    assert clock.seconds_left(100) == 100  # validations come again
    clock = Throughput(3000)
    now = 150.0
    assert clock.log(71, 3010) == {"tokens_per_second": 1.0}
