"""GGUF files for llama.cpp: their tensors, metadata and tokenizer, read by gguf's own reader; what is refused."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Split

from fundamentallm.commands.export import main as export
from fundamentallm.config.schema import END_OF_TEXT, ModelConfig
from fundamentallm.data.datasets import TokenDataset
from fundamentallm.data.tokenizers import create_tokenizer, num_ids
from fundamentallm.errors import FundamentaLLMError
from fundamentallm.models.transformer import Transformer
from fundamentallm.models.transformers_format import model_files
from tests.conftest import problem_of

TEXT = "to be or not to be, that is the question; don't you 12 34? " * 20
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def save(folder: Path, tokenizer: Tokenizer, end: str | None = END_OF_TEXT, rows: int = 0, **shape: Any) -> Transformer:
    """A model of random weights with a tokenizer, in Hugging Face format."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2} | shape
    model = Transformer(ModelConfig(rows or num_ids(tokenizer), **sizes))
    folder.mkdir()
    dataset = TokenDataset(np.arange(20), 16, tokenizer, end_of_text=end and tokenizer.token_to_id(end))
    for name, text in model_files(model, dataset).items():
        (folder / name).write_text(text)
    weights = model.state_dict()
    save_file({name: weights[name].clone() for name in weights}, folder / "model.safetensors", {"format": "pt"})
    return model


def fields(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns metadata and tensors of a file, by name."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


@pytest.fixture
def bpe() -> Tokenizer:
    return create_tokenizer("bpe:280", TEXT, END_OF_TEXT)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_file_holds_weights_and_shape(bpe: Tokenizer, tmp_path: Path, kind: str, tied: bool) -> None:
    model = save(tmp_path / "model", bpe, qk_norm=kind == "qwen3", tie_embeddings=tied, rope_theta=5e4)
    assert export([str(tmp_path / "model"), str(tmp_path / "my.gguf")], "") == 0
    found, tensors = fields(tmp_path / "my.gguf")
    expected = {"context_length": 16, "embedding_length": 16, "feed_forward_length": 48, "block_count": 2}
    expected |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 4}
    expected |= {"attention.value_length": 4, "rope.freq_base": 5e4, "vocab_size": 280}
    assert {name: found[f"{kind}.{name}"] for name in expected} == expected
    assert found[f"{kind}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert (found["general.architecture"], found["general.name"], found["general.file_type"]) == (kind, "my", 0)
    weights = model.state_dict()
    assert ("output.weight" in tensors) == (not tied)
    assert len(tensors) == len({id(parameter) for parameter in model.parameters()})
    for name, here in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj"), ("attn_norm", "input_layernorm")):
        stored, own = tensors[f"blk.1.{name}.weight"].data, weights[f"model.layers.1.{here}.weight"]
        assert np.array_equal(stored, own)
    assert np.array_equal(tensors["token_embd.weight"].data, weights["model.embed_tokens.weight"])
    for name, heads in (("q", 4), ("k", 2)):
        stored, own = tensors[f"blk.0.attn_{name}.weight"].data, weights[f"model.layers.0.self_attn.{name}_proj.weight"]
        # In llama.cpp's "llama", features 2i and 2i + 1 of a head are rotated together; else i and i + 2 of four.
        order = [0, 2, 1, 3] if kind == "llama" else [0, 1, 2, 3]
        assert np.array_equal(stored, own[[4 * head + row for head in range(heads) for row in order]])


def test_file_holds_the_tokenizer(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.add_tokens(["<mine>"])
    save(tmp_path / "model", bpe, rows=284)  # two rows without a token
    (tmp_path / "model/chat_template.jinja").write_text("{{ messages }}")
    export([str(tmp_path / "model"), str(tmp_path / "my.gguf")], "")
    found, _ = fields(tmp_path / "my.gguf")
    saved = json.loads(bpe.to_str())["model"]
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert tokens[:281] == [bpe.id_to_token(index) for index in range(281)]
    assert [" ".join(pair) for pair in saved["merges"]] == found["tokenizer.ggml.merges"]
    kinds = gguf.TokenType
    assert types == [kinds.NORMAL] * 279 + [kinds.CONTROL, kinds.USER_DEFINED] + [kinds.UNUSED] * 3
    assert len(set(tokens)) == len(tokens)
    names = ("model", "pre", "eos_token_id", "bos_token_id", "add_bos_token")
    assert [found[f"tokenizer.ggml.{name}"] for name in names] == ["gpt2", "gpt-2", 279, 279, False]
    assert found["tokenizer.chat_template"] == "{{ messages }}"


def test_vocabulary_without_an_end_ends_at_no_byte_of_utf8(tmp_path: Path) -> None:
    tokenizer = create_tokenizer("bpe:280", TEXT)
    save(tmp_path / "model", tokenizer, end=None)
    export([str(tmp_path / "model"), str(tmp_path / "my.gguf")], "")
    found, _ = fields(tmp_path / "my.gguf")
    every = "".join(map(chr, range(0x80))) + "é漢🙂"
    assert tokenizer.id_to_token(found["tokenizer.ggml.eos_token_id"]) == "ÿ"  # ByteLevel's name for 0xFF
    assert found["tokenizer.ggml.eos_token_id"] not in tokenizer.encode(every).ids


def test_ends_without_a_token_are_left_out(bpe: Tokenizer, tmp_path: Path) -> None:
    save(tmp_path / "model", bpe, rows=284)
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"eos_token_id": [-1, 283, 279, 999]}))
    export([str(tmp_path / "model"), str(tmp_path / "my.gguf")], "")
    found, _ = fields(tmp_path / "my.gguf")
    assert found["tokenizer.ggml.eos_token_id"] == 279
    assert "tokenizer.ggml.eot_token_id" not in found


def test_dropout_of_training_is_of_no_account(bpe: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    save(tmp_path / "model", bpe)
    config = json.loads((tmp_path / "model/config.json").read_text()) | {"attention_dropout": 0.1}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert export([str(tmp_path / "model"), str(tmp_path / "my.gguf")], "") == 0


def like(digits: str, normalizer: Any = None, level: Any = None, **options: Any) -> Tokenizer:
    """A tokenizer that splits as Qwen2's or Llama 3's."""
    tokenizer = Tokenizer(models.BPE(**options))
    level = level or ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([Split(Regex(WORDS % digits), "isolated"), level])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT), AddedToken("<|im_end|>")])
    return tokenizer


@pytest.mark.parametrize(
    ("split", "tokenizer"),
    [("qwen2", like("", normalizers.NFC())), ("llama-bpe", like("{1,3}", ignore_merges=True))],
)
def test_known_splits_keep_their_name_and_all_ends(tmp_path: Path, split: str, tokenizer: Tokenizer) -> None:
    save(tmp_path / "model", tokenizer)
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"eos_token_id": [281, 280]}))
    config = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(config | {"eos_token": {"content": "<|im_end|>"}}))
    export([str(tmp_path / "model"), str(tmp_path / "my.gguf")], "")
    found, _ = fields(tmp_path / "my.gguf")
    names = ("pre", "eos_token_id", "eot_token_id", "bos_token_id")
    assert [found[f"tokenizer.ggml.{name}"] for name in names] == [split, 281, 280, 280]


def other(**changes: Any) -> Tokenizer:
    saved = json.loads(create_tokenizer("bpe:280", TEXT, END_OF_TEXT).to_str())
    for name, value in changes.items():
        saved[name] = value if isinstance(value, list) else (saved[name] or {}) | value
    return Tokenizer.from_str(json.dumps(saved))


REFUSED = {
    "char": create_tokenizer("char", TEXT),
    "byte": create_tokenizer("byte"),
    "prefix": other(pre_tokenizer={"add_prefix_space": True}),
    "normalizer": other(normalizer={"type": "Lowercase"}),
    "merges": other(model={"ignore_merges": True}),
    "blanks": other(added_tokens=[AddedToken("<a>", lstrip=True).__getstate__() | {"id": 280}]),
    "digits": like("{1,2}"),
    "llama without its merges": like("{1,3}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tokenizer_that_llama_cpp_reads_otherwise_is_refused(tmp_path: Path, case: str) -> None:
    save(tmp_path / "model", REFUSED[case], end=None)
    problem = problem_of(export, [str(tmp_path / "model"), str(tmp_path / "my.gguf")], "")
    assert (problem.setting, problem.value) == ("checkpoint", str(tmp_path / "model"))
    assert ("convert_hf_to_gguf" in problem.advice) == (case not in ("char", "byte"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_architecture_is_refused(bpe: Tokenizer, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    config = hf.GPT2Config(vocab_size=280, n_embd=8, n_layer=1, n_head=2)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    hf.PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(tmp_path / "model")
    problem = problem_of(export, [str(tmp_path / "model"), str(tmp_path / "my.gguf")], "")
    assert problem.setting == "checkpoint"
    assert "'gpt2'" in problem.reason


@pytest.mark.parametrize(("dtype", "kind"), [("f16", 1), ("bf16", 32)])
def test_dtype_is_that_of_matrices(bpe: Tokenizer, tmp_path: Path, dtype: str, kind: int) -> None:
    model = save(tmp_path / "model", bpe)
    export([str(tmp_path / "model"), "--dtype", dtype, str(tmp_path / "my.gguf")], "")
    found, tensors = fields(tmp_path / "my.gguf")
    stored = tensors["blk.0.ffn_up.weight"]
    assert (found["general.file_type"], stored.tensor_type.name) == (kind, dtype.upper())
    assert tensors["blk.0.ffn_norm.weight"].tensor_type.name == "F32"
    values = gguf.dequantize(stored.data, stored.tensor_type)
    expected = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert np.array_equal(values, expected.to({"f16": torch.half, "bf16": torch.bfloat16}[dtype]).float())


def test_weight_too_large_for_a_dtype_is_refused(bpe: Tokenizer, tmp_path: Path) -> None:
    model = save(tmp_path / "model", bpe)
    weights = model.state_dict() | {"lm_head.weight": torch.full((280, 16), 1e5)}
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    problem = problem_of(export, [str(tmp_path / "model"), str(tmp_path / "my.gguf"), "--dtype", "f16"], "")
    assert "lm_head.weight" in problem.reason
    assert export([str(tmp_path / "model"), str(tmp_path / "my.gguf"), "--dtype", "bf16"], "") == 0


def test_existing_file_is_kept(bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "model", bpe)
    monkeypatch.chdir(tmp_path)
    assert export(["model"], "") == 0
    before = Path("model.gguf").read_bytes()
    assert problem_of(export, ["model"], "").setting == "OUT"
    assert Path("model.gguf").read_bytes() == before
    with pytest.raises(FundamentaLLMError, match="cannot be written"):
        export(["model", "model.gguf/no/folder.gguf"], "")
    monkeypatch.setitem(sys.modules, "gguf", None)
    problem = problem_of(export, ["model", "other.gguf"], "")
    assert "fundamentallm[gguf]" in problem.advice


def test_example_of_the_docs(bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    lines = re.findall(r"^fundamentallm export (.*)$", page, re.MULTILINE)
    (tmp_path / "runs").mkdir()
    save(tmp_path / "runs/mine", bpe)
    monkeypatch.chdir(tmp_path)
    for line in lines:
        assert export(shlex.split(line, comments=True), "") == 0
    assert {path.name for path in tmp_path.glob("*.gguf")} == {"mine.gguf", "mine-f16.gguf"}


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_llama_cpp_writes_the_same_text(bpe: Tokenizer, tmp_path: Path, kind: str) -> None:
    llama = pytest.importorskip("xllamacpp")  # a prebuilt llama.cpp
    from fundamentallm import generate, load_model

    model = save(tmp_path / "model", bpe, qk_norm=kind == "qwen3", d_model=32)
    with torch.no_grad():
        weights = {name: weight * 8 if weight.ndim > 1 else weight for name, weight in model.state_dict().items()}
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "model/config.json").read_text()) | {"max_position_embeddings": 128}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    export([str(tmp_path / "model"), str(tmp_path / "my.gguf")], "")
    options = llama.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = str(tmp_path / "my.gguf"), 128, 1
    options.cache_type_k = options.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # which rounds to float16
    result = llama.Server(options).handle_completions({"prompt": "to be", "n_predict": 100, "temperature": 0})
    loaded = load_model(tmp_path / "model")
    ids = generate(loaded.model, loaded.tokenizer.encode("to be").ids, 100, 128, temperature=0, stop=loaded.stop)
    assert result["choices"][0]["text"] == loaded.tokenizer.decode(list(ids))
