"""Model folders in Hugging Face format: which shapes are ours and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fundamentallm.checkpoint.reading import load_weights
from fundamentallm.config.schema import ModelConfig
from fundamentallm.data.datasets import TokenDataset
from fundamentallm.data.tokenizers import create_tokenizer, num_ids
from fundamentallm.errors import CheckpointError, ConfigError
from fundamentallm.models.transformer import Transformer
from fundamentallm.models.transformers_format import find_pretrained, model_files, shape_of, transformers_model
from tests.unit.test_transformer import SHAPES

SIZES = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 5}
LLAMA = {**SIZES, **HEADS, "rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}


def llama(folder: Path, dtype: torch.dtype = torch.float32, **config: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | config)).to(dtype)
    model.save_pretrained(folder, max_shard_size="4KB" if config.get("mlp_bias") is None else "1GB")
    return model


def write(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("config", SHAPES)
def test_shape_of_inverts_transformers_config(config: ModelConfig) -> None:
    saved = json.loads(json.dumps(Transformer(config).transformers_config(16)))
    assert shape_of(saved) == (config.resolved(), "")


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"head_dim": 4},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        {"layer_types": ["sliding_attention"]},
        {"model_type": "gpt2"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_find_pretrained_names_what_we_do_not_compute(tmp_path: Path, change: dict) -> None:
    llama(tmp_path)
    assert find_pretrained(str(tmp_path)).shape is not None
    write(tmp_path, **change)
    found = find_pretrained(str(tmp_path))
    assert found.shape is None
    name = "rotary" if "rope" in str(change) else next(iter(change)).removeprefix("model_")
    assert name in found.why_not


def test_width_with_odd_heads_beside_a_head_dim_is_left_to_transformers(tmp_path: Path) -> None:
    llama(tmp_path, hidden_size=20, num_attention_heads=4, num_key_value_heads=4, head_dim=8)
    found = find_pretrained(str(tmp_path))
    assert found.shape is None
    assert transformers_model(found).config.hidden_size == 20


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_sharded_llama_becomes_a_transformer_in_float32(tmp_path: Path, tied: bool) -> None:
    """Whatever names of files its index has: large models have numbers of six digits."""
    theirs = llama(tmp_path, torch.bfloat16, tie_word_embeddings=tied).float().eval()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("-of-0", "-of-00"))
    for file in tmp_path.glob("model-*"):
        file.rename(tmp_path / file.name.replace("-of-0", "-of-00"))
    found = find_pretrained(str(tmp_path))
    assert len(found.weights) > 2
    assert found.shape is not None
    assert (found.shape.rope_theta, found.shape.norm_epsilon, found.shape.tie_embeddings) == (500.0, 1e-3, tied)
    assert (found.context, found.stop) == (2048, {5})
    ours = Transformer(found.shape).eval()
    load_weights(found.folder, found.weights, ours)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == tied
    ids = torch.randint(37, (2, 20))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"norm.weight": None}, r"model\.norm\.weight"),
        ({"norm.bias": torch.zeros(16)}, r"model\.norm\.bias"),
        ({"norm.weight": torch.zeros(8)}, r"model\.norm\.weight.*8.*16"),
    ],
)
def test_load_weights_names_what_does_not_fit(tmp_path: Path, change: dict, named: str) -> None:
    llama(tmp_path, mlp_bias=False)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {**weights, **{f"model.{name}": tensor for name, tensor in change.items()}}
    save_file({k: v for k, v in weights.items() if v is not None}, tmp_path / "model.safetensors")
    found = find_pretrained(str(tmp_path))
    assert found.shape is not None
    with pytest.raises(CheckpointError, match=named):
        load_weights(tmp_path, found.weights, Transformer(found.shape))


def test_load_weights_needs_equal_tied_weights(tmp_path: Path) -> None:
    llama(tmp_path, mlp_bias=False, tie_word_embeddings=True)
    weights, found = load_file(tmp_path / "model.safetensors"), find_pretrained(str(tmp_path))
    table = weights["model.embed_tokens.weight"]
    older = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # as transformers once saved it
    save_file(weights | older | {"lm_head.weight": table.clone()}, tmp_path / "model.safetensors")
    load_weights(tmp_path, found.weights, Transformer(found.shape))
    save_file(weights | {"lm_head.weight": table + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="ties"):
        load_weights(tmp_path, found.weights, Transformer(found.shape))


def test_find_pretrained_refuses_unsafe_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(named: str, name: str = str(tmp_path)) -> None:
        with pytest.raises(ConfigError, match=named) as error:
            find_pretrained(name)
        assert (error.value.problems[0].setting, error.value.problems[0].value) == ("model.pretrained", name)

    refused("no config.json")
    refused("neither a folder", str(tmp_path / "nowhere"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    refused("hf download somebody/something", "somebody/something")
    refused("Hugging Face cache", "no such name!")
    llama(tmp_path)
    (tmp_path / "model-00002-of-00006.safetensors").unlink(missing_ok=True)
    for file in list(tmp_path.glob("model-*"))[1:]:
        file.unlink()
    refused("lacks model-")
    for file in tmp_path.glob("model*"):
        file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused("weights as safetensors")
    write(tmp_path, quantization_config={"bits": 4})
    refused("quantized")


@pytest.mark.parametrize("name", ["chat_template.jinja", "model.safetensors", "config.json", "other"])
def test_find_pretrained_follows_no_link_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    llama(folder, mlp_bias=False)
    inside, outside = folder / f"real-{name}", tmp_path / f"outside-{name}"
    inside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(inside.name)
    (tmp_path / "alias").symlink_to("model")
    assert find_pretrained(str(tmp_path / "alias")).shape is not None
    inside.rename(outside)
    (folder / name).unlink()
    (folder / name).symlink_to(outside)
    with pytest.raises(ConfigError, match=name) as error:
        find_pretrained(str(folder))
    assert error.value.problems[0].setting == "model.pretrained"


def test_find_pretrained_reads_no_weights_beside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    llama(folder, mlp_bias=False)
    (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"other\.safetensors"):
        find_pretrained(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="adapter"):
        find_pretrained(str(folder))


@pytest.mark.parametrize(("spec", "end"), [("bpe:300", "<end>"), ("char", "<end>"), ("char", None)])
def test_checkpoints_tokenizer_has_all_special_tokens(tmp_path: Path, spec: str, end: str | None) -> None:
    tokenizer = create_tokenizer(spec, "to be or not to be " * 9, end)
    dataset = TokenDataset(np.arange(20), 16, tokenizer, end_of_text=end and tokenizer.token_to_id(end))
    model = Transformer(ModelConfig(num_ids(tokenizer), d_model=16, num_heads=2, num_layers=1))
    for name, text in model_files(model, dataset).items():
        (tmp_path / name).write_text(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    unknown = "<unk>" if spec == "char" else end
    assert (theirs.eos_token, theirs.bos_token, theirs.unk_token) == (end, end, unknown)
    assert (theirs.pad_token, theirs.model_max_length, len(theirs)) == (end or unknown, 16, num_ids(tokenizer))
    batch = theirs(["to be", "not"], padding=True)
    assert [ids[: sum(mask)] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)] == [
        tokenizer.encode(text).ids for text in ("to be", "not")
    ]


def test_transformers_model_refuses_what_it_cannot_train(tmp_path: Path) -> None:
    """It runs no code of the folder."""

    def refused(named: str, **config: object) -> None:
        write(tmp_path, **config)
        with pytest.raises(ConfigError, match=named):
            transformers_model(find_pretrained(str(tmp_path)))

    GPT2LMHeadModel(GPT2Config(vocab_size=37, n_positions=16, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.0.attn.c_attn.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    refused(r"transformer\.h\.0\.attn\.c_attn\.weight")
    (tmp_path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    mapped = {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}
    refused("transformers cannot open", model_type="mine", auto_map=mapped)
    assert not (tmp_path / "ran").exists()
    refused("BertForMaskedLM", model_type="bert", architectures=["BertForMaskedLM"])


def test_find_pretrained_looks_into_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo, commit = tmp_path / "models--somebody--something", "a" * 40
    llama(repo / "snapshots" / commit)
    (repo / "blobs").mkdir()
    (repo / "snapshots" / commit / "config.json").rename(repo / "blobs" / "config")
    (repo / "snapshots" / commit / "config.json").symlink_to("../../blobs/config")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_pretrained("somebody/something").folder == repo / "snapshots" / commit


def test_estimate_takes_the_shape_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fundamentallm.commands.estimate import main

    model = llama(tmp_path)
    create_tokenizer("byte").save(str(tmp_path / "tokenizer.json"))
    assert main(["--model.pretrained", str(tmp_path), "--devices", "1"], "estimate") == 0
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,}, of which" in capsys.readouterr().out
    write(tmp_path, mlp_bias=True)
    with pytest.raises(ConfigError, match="mlp_bias"):
        main(["--model.pretrained", str(tmp_path)], "estimate")
