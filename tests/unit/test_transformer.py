"""The Transformer: transformers' arithmetic and parameter names, causal, well initialised."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.checkpoint.snapshot import MODEL_KEY
from fundamentallm.config.schema import ModelConfig
from fundamentallm.errors import ConfigError
from fundamentallm.models.transformer import INITIAL_STD, Transformer

SHAPES = [
    ModelConfig(37, d_model=32, num_heads=4, num_layers=2, qk_norm=qk_norm, tie_embeddings=tied, **shape)
    for qk_norm in (True, False)
    for tied in (True, False)
    for shape in ({}, {"num_kv_heads": 2, "d_ff": 40, "rope_theta": 77.0, "norm_epsilon": 0.1})
]


def make(config: ModelConfig) -> Transformer:
    """A model whose every parameter matters: initial weights are too small, and norms of one hide mistakes."""
    torch.manual_seed(0)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model


def some_ids(*shape: int) -> torch.Tensor:
    return torch.randint(37, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", SHAPES)
@torch.no_grad()
def test_logits_equal_transformers_on_the_checkpoint(config: ModelConfig, tmp_path: Path) -> None:
    model, ids = make(config), some_ids(2, 33)
    files = {"config.json": json.dumps(model.transformers_config(sequence_length=48))}
    folder = CheckpointManager(tmp_path).save({MODEL_KEY: model.state_dict()}, files=files)
    theirs, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM")
    assert theirs.config.max_position_embeddings == 48
    ours = model(ids)
    assert ours.std() > 0.5
    assert torch.equal(ours, model.train()(ids))  # there is no dropout
    torch.testing.assert_close(ours, theirs.eval()(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_initial_weights_of_residual_projections_are_smaller(num_layers: int, tied: bool) -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(500, d_model=128, num_heads=2, num_layers=num_layers, tie_embeddings=tied))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all()
            continue
        residual = name.rsplit(".", 2)[-2] in ("o_proj", "down_proj")
        expected = INITIAL_STD / math.sqrt(2 * num_layers) if residual else INITIAL_STD
        assert parameter.std().item() == pytest.approx(expected, rel=0.03)
        assert abs(parameter.mean().item()) < 0.03 * INITIAL_STD


@torch.no_grad()
def test_zero_init_residual_makes_blocks_the_identity() -> None:
    models = []
    for zero in (False, True):
        torch.manual_seed(0)
        models.append(Transformer(ModelConfig(37, 32, 4, num_layers=2, zero_init_residual=zero)).eval())
    plain, zeroed = (dict(model.named_parameters()) for model in models)
    different = {name for name in plain if not torch.equal(plain[name], zeroed[name])}
    assert different == {name for name in plain if name.endswith(("o_proj.weight", "down_proj.weight"))}
    assert all((zeroed[name] == 0).all() for name in different)
    x = models[1].get_input_embeddings()(some_ids(2, 9))
    assert torch.equal(models[1].model["layers"][0](x, *rope(9)), x)


def rope(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(length, 4), torch.zeros(length, 4)


@torch.no_grad()
def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model, ids = Transformer(ModelConfig(37, d_model=16, num_heads=2, num_layers=1, dropout=0.5)), some_ids(2, 20)
    assert torch.equal(model.eval()(ids), model(ids))
    assert not torch.equal(model.train()(ids), model(ids))
    attention, x = model.model["layers"][0].self_attn, torch.randn(2, 20, 16)
    assert not torch.equal(attention(x, *rope(20)), attention(x, *rope(20)))


@pytest.mark.parametrize("config", SHAPES)
@torch.no_grad()
def test_logits_with_a_cache_equal_those_of_whole_texts(config: ModelConfig) -> None:
    """Five tokens at once, then one at a time."""
    model, ids = make(config), some_ids(2, 12)
    cache = model.new_cache()
    parts = [model(ids[:, begin:end], cache=cache) for begin, end in ((0, 5), *((n, n + 1) for n in range(5, 12)))]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-5, rtol=1e-5)


def test_transformer_needs_a_vocabulary_size() -> None:
    with pytest.raises(ConfigError) as error:
        Transformer(ModelConfig())
    assert (error.value.problems[0].setting, error.value.problems[0].value) == ("model.vocab_size", None)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_masked_documents_equal_each_alone(checkpointing: bool) -> None:
    """Losses and gradients too; the end-of-text token begins a document and is the last target of the one before."""
    end, config = 36, SHAPES[0]
    documents = [some_ids(1, size).clamp(max=35)[0] for size in (7, 1, 20, 4)]
    packed = torch.cat([torch.cat([document, torch.tensor([end])]) for document in documents])
    targets = packed.roll(-1)
    model = make(config).train()
    model.document_start, model.gradient_checkpointing = end, checkpointing
    ((logits,), (without,)) = (model(packed[None]), make(config)(packed[None]))
    loss = nn.functional.cross_entropy(logits[:-1], targets[:-1], reduction="sum")
    loss.backward()
    alone, total = make(config).train(), torch.zeros(())
    begins = 0
    for document, start in zip(documents, [[], [end], [end], [end]], strict=True):
        ids = torch.cat([torch.tensor(start, dtype=torch.int64), document])
        expected = alone(ids[None])[0]
        torch.testing.assert_close(logits[begins : begins + len(ids)], expected, atol=1e-5, rtol=1e-5)
        total = total + nn.functional.cross_entropy(expected, targets[begins : begins + len(ids)], reduction="sum")
        begins += len(ids)
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    for (name, got), wanted in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert (logits - without).abs().max() > 0.1  # which sees them all
