"""Generated text: seeded and sampled from the model's distribution; loading models; the command."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.checkpoint.snapshot import MODEL_KEY
from fundamentallm.commands import evaluate, generate as command
from fundamentallm.config.schema import ModelConfig
from fundamentallm.data.datasets import TokenDataset
from fundamentallm.data.tokenizers import create_tokenizer, num_ids
from fundamentallm.errors import CheckpointNotFoundError, ConfigError, FundamentaLLMError, report
from fundamentallm.inference.generation import generate
from fundamentallm.inference.loading import load_model
from fundamentallm.models.transformer import Transformer
from fundamentallm.models.transformers_format import model_files
from tests.conftest import problem_of

CONTEXT = 8
PROMPT = [3, 1, 4, 1, 5]


def make(seed: int = 0, vocab_size: int = 23, **shape: object) -> Transformer:
    """A model with an opinion: initial weights would make all tokens about equally probable."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab_size, d_model=16, num_heads=2, num_layers=2, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.4)
    return model.eval()


@pytest.fixture
def model() -> Transformer:
    return make()


@torch.no_grad()
def last_logits(model: Transformer, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]))[0, -1]


def test_generate_depends_on_its_seed_only(model: Transformer) -> None:
    texts = []
    for global_seed, seed in ((0, 0), (1, 0), (0, 1)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        texts.append(list(generate(model, PROMPT, 40, CONTEXT, seed=seed)))
        assert torch.equal(torch.get_rng_state(), before)
    assert texts[0] == texts[1] != texts[2]


def test_temperature_zero_takes_the_most_probable_token(model: Transformer) -> None:
    seen = PROMPT
    text = list(generate(model, PROMPT, 40, CONTEXT, temperature=0))
    assert len(text) == 40
    for token in text:
        assert token == last_logits(model, seen).argmax()
        seen = [*seen, token] if len(seen) < CONTEXT else [*seen, token][-(CONTEXT // 2) :]  # the newer half


@torch.no_grad()
def drawn(model: Transformer, **options: float) -> Iterator[tuple[int, torch.Tensor]]:
    """Each token of a text, and the logits that it was drawn by."""
    text = list(generate(model, PROMPT, 150, None, **options))
    return zip(text, model(torch.tensor([PROMPT + text]))[0, len(PROMPT) - 1 : -1], strict=True)


def test_top_k_draws_among_the_most_probable_tokens(model: Transformer) -> None:
    pairs = drawn(model, temperature=100.0, top_k=5)
    assert {logits.argsort(descending=True).tolist().index(token) for token, logits in pairs} == set(range(5))


def test_top_p_draws_among_the_fewest_tokens(model: Transformer) -> None:
    seen = set()
    for token, logits in drawn(model, temperature=2.0, top_p=0.7):
        probabilities = (logits / 2.0).softmax(0)
        more_probable = probabilities[probabilities > probabilities[token]].sum()
        assert more_probable < 0.7
        seen.add(bool(more_probable + probabilities[token] >= 0.7))
    assert True in seen  # the last of the fewest is drawn too


def test_generate_computes_each_token_once(model: Transformer) -> None:
    computed = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: computed.append(ids[0].numel()))
    list(generate(model, PROMPT, 40, CONTEXT))
    assert computed[:4] == [5, 1, 1, 1]  # now the context is full
    assert computed[4:] == [4, 1, 1, 1, 1] * 7 + [4]


@pytest.mark.parametrize(("qk_norm", "penalty"), [(True, 1.0), (False, 1.7)])
def test_greedy_text_equals_transformers_on_our_checkpoint(tmp_path: Path, qk_norm: bool, penalty: float) -> None:
    from transformers import AutoModelForCausalLM

    model = make(3, num_kv_heads=1, qk_norm=qk_norm)
    files = {"config.json": json.dumps(model.transformers_config(40))}
    folder = CheckpointManager(tmp_path).save({MODEL_KEY: model.state_dict()}, files=files)
    theirs = AutoModelForCausalLM.from_pretrained(folder).generate(
        torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False, repetition_penalty=penalty
    )
    ours = list(generate(model, PROMPT, 30, 40, temperature=0, repetition_penalty=penalty))
    assert PROMPT + ours == theirs[0].tolist()


@pytest.mark.parametrize("is_cached", [True, False])
def test_generate_of_a_transformers_model_equals_its_own(is_cached: bool) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_positions": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=23, initializer_range=0.5, use_cache=is_cached, **sizes)).eval()
    theirs = model.generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False)[0].tolist()
    if not is_cached:  # as other models, which keep nothing
        del model.generation_config
    computed = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: computed.append(ids[0].numel()))
    assert PROMPT + list(generate(model, PROMPT, 30, 40, temperature=0)) == theirs
    assert computed == ([5] + [1] * 29 if is_cached else list(range(5, 35)))


def test_token_frequencies_follow_the_temperature() -> None:
    temperature = 3.0
    model = make(vocab_size=6)
    with torch.no_grad():  # equal embeddings: each draw is from the same distribution
        model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight[0].expand(6, -1).clone())
    expected = (last_logits(model, [0]) / temperature).softmax(0)
    assert expected.max() - expected.min() > 0.1
    drawn = torch.tensor(list(generate(model, [0], 400, 1, temperature)))
    assert (drawn.bincount(minlength=6) / 400 - expected).abs().max() < 0.08


def test_generate_switches_dropout_off_and_on_again() -> None:
    model = make(dropout=0.5).train()
    assert list(generate(model, PROMPT, 40, CONTEXT)) == list(generate(make(), PROMPT, 40, CONTEXT))
    assert model.training
    reader = generate(model, PROMPT, 3, CONTEXT)
    next(reader)
    reader.close()
    assert model.training


def test_generate_names_all_values_outside_their_range(model: Transformer) -> None:
    wrong = {"temperature": math.nan, "top_p": 0.0, "top_k": 0, "context": 0, "max_new_tokens": -1}
    with pytest.raises(ConfigError) as error:
        generate(model, [], **wrong)
    assert {problem.setting for problem in error.value.problems} == {"prompt", *wrong}


TEXT = "to be, or not to be: that is the question\n"


@pytest.fixture
def tokenizer() -> Tokenizer:
    return create_tokenizer("char", TEXT)


def save(folder: Path, tokenizer: Tokenizer, seed: int, is_best: bool = False, **config: object) -> Path:
    """A checkpoint as the Trainer makes them, of a model that is all its own."""
    model = make(seed, tokenizer.get_vocab_size())
    about = json.dumps(model.transformers_config(CONTEXT) | config)
    files = {"config.json": about, "tokenizer.json": tokenizer.to_str()}
    return CheckpointManager(folder, 10).save({MODEL_KEY: model.state_dict()}, f"step_{seed}", is_best, files)


def expected_output(tokenizer: Tokenizer, model_seed: int, prompt: str, count: int, **options: float) -> str:
    model, ids = make(model_seed, tokenizer.get_vocab_size()), tokenizer.encode(prompt).ids
    return prompt + tokenizer.decode(list(generate(model, ids, count, CONTEXT, **options))) + "\n"


def run(path: Path, *arguments: str) -> int:
    return command.main(["--checkpoint", str(path), *arguments], "fundamentallm generate")


def test_command_prints_several_texts(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path, tokenizer, seed=1)
    (tmp_path / "prompts").write_text("be\r\n\nthat is\n", newline="")
    flags = ["--prompt", "to", "--prompts", str(tmp_path / "prompts"), "--max_new_tokens", "20", "--top_p", "0.9"]
    prompts, options = ["to", "be", "that is"], {"temperature": 0.8, "top_p": 0.9}
    texts = [expected_output(tokenizer, 1, text, 20, seed=index, **options)[:-1] for index, text in enumerate(prompts)]
    assert run(path, *flags) == 0
    assert capsys.readouterr().out == "\n".join(f"---- {i} ----\n{text}\n" for i, text in enumerate(texts))
    assert run(path, *flags, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] + line["text"] for line in lines] == texts
    assert [line["tokens"] for line in lines] == [20, 20, 20]
    assert run(path) == 0
    assert capsys.readouterr().out == expected_output(tokenizer, 1, "\n", 200, temperature=0.8)


def test_command_stops_at_the_end_of_text_token(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = expected_output(tokenizer, 1, "to", 60, temperature=0.8)[2:-1]
    end = next(character for character in whole[20:] if character.isascii())  # of one token
    flags = ["--prompt", "to", "--max_new_tokens", "60"]
    path = save(tmp_path, tokenizer, 1, eos_token_id=tokenizer.encode(end).ids)
    assert run(path, *flags) == 0
    assert capsys.readouterr().out == "to" + whole[: whole.index(end)] + "\n"
    assert run(path, *flags, "--ignore_end") == 0
    assert capsys.readouterr().out == "to" + whole + "\n"


def with_spaces_in_its_words(text: str) -> Tokenizer:
    """As Llama's: decoded alone, a word loses its space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    return tokenizer


@pytest.mark.parametrize("spec", ["byte", "bpe:300", "spaces in words"])
def test_pieces_are_the_whole_text(spec: str) -> None:
    text = "to be 漢é🙂 or\n\n not 🙂🙂\N{REPLACEMENT CHARACTER} to be " * 3
    made = spec == "spaces in words"
    tokenizer = with_spaces_in_its_words(text) if made else create_tokenizer(spec, text)
    for ids in (tokenizer.encode(text).ids, tokenizer.encode(text).ids[3:-2]):
        found = list(command.pieces(tokenizer, iter(ids)))
        assert "".join(found) == tokenizer.decode(ids)
        assert len(found) > len(ids) / 3


def test_load_model_uses_no_accelerator_that_is_absent(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def current(check_available: bool = False) -> torch.device | None:  # of a torch for CUDA, without a GPU
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    loaded = load_model(save(tmp_path / "checkpoints", tokenizer, 1))
    assert next(loaded.model.parameters()).device.type == "cpu"


def test_load_model_takes_the_named_the_best_or_the_newest(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint"):
        load_model(tmp_path)
    first, second = (save(tmp_path / "checkpoints", tokenizer, seed) for seed in (1, 2))
    assert load_model(tmp_path).folder == second
    best, _ = (save(tmp_path / "checkpoints", tokenizer, seed, is_best=seed == 3) for seed in (3, 4))
    assert load_model(tmp_path).folder == best
    loaded = load_model(str(first))
    assert (loaded.folder, loaded.context, loaded.model.training) == (first, CONTEXT, False)
    assert loaded.tokenizer.to_str() == tokenizer.to_str()
    for ours, saved in zip(loaded.model.parameters(), make(1, tokenizer.get_vocab_size()).parameters(), strict=True):
        assert torch.equal(ours.cpu(), saved)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "manifest.json"])
def test_load_model_names_a_missing_file(tokenizer: Tokenizer, tmp_path: Path, missing: str) -> None:
    path = save(tmp_path, tokenizer, seed=1)
    (path / missing).unlink()
    with pytest.raises(FundamentaLLMError, match=missing):
        load_model(path)


def test_command_names_the_characters_that_the_model_lacks(tokenizer: Tokenizer, tmp_path: Path) -> None:
    problem = problem_of(run, save(tmp_path, tokenizer, seed=1), "--prompt", "to é漢be")
    assert (problem.setting, problem.reason) == ("prompt", "which has 'é', '漢'")


def test_only_ids_without_a_row_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = tokenizer.get_vocab_size()
    model = make(1, rows)
    tokenizer.add_special_tokens(["<pad>"])
    dataset = TokenDataset(np.arange(9), 8, tokenizer)
    path = CheckpointManager(tmp_path).save({MODEL_KEY: model.state_dict()}, "one", files=model_files(model, dataset))
    assert run(path, "--prompt", "to", "--max_new_tokens", "3") == 0
    problem = problem_of(run, path, "--prompt", "to<pad>")
    assert (problem.setting, problem.reason) == ("prompt", f"with the id {rows}")
    (tmp_path / "text.txt").write_text("to<pad>")
    arguments = ["--checkpoint", str(path), "--source", str(tmp_path / "text.txt")]
    assert problem_of(evaluate.main, arguments, "").reason == f"with the id {rows}"


@pytest.mark.parametrize("as_text", [False, True])
def test_prompt_reads_special_tokens_as_training_did(tokenizer: Tokenizer, tmp_path: Path, as_text: bool) -> None:
    tokenizer.add_special_tokens(["<to>"])
    tokenizer.encode_special_tokens = as_text
    dataset = TokenDataset(np.arange(9), 8, tokenizer)
    model = make(1, num_ids(tokenizer))
    path = CheckpointManager(tmp_path).save({MODEL_KEY: model.state_dict()}, "one", files=model_files(model, dataset))
    theirs, ours = AutoTokenizer.from_pretrained(path), load_model(path).tokenizer
    ids = tokenizer.encode("be<to>").ids
    assert len(ids) == (6 if as_text else 3)
    assert ours.encode("be<to>").ids == theirs("be<to>")["input_ids"] == ids


def test_command_shows_control_characters_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, create_tokenizer("char", "\x1b[2J\x9b\u202e e\u3000\t\n"), seed=1)
    for is_terminal, flags in ((True, []), (True, ["--json"]), (False, [])):
        monkeypatch.setattr("sys.stdout.isatty", lambda is_terminal=is_terminal: is_terminal)
        assert run(path, "--prompt", "\x1b[2J", "--temperature", "9", "--max_new_tokens", "60", *flags) == 0
        out = capsys.readouterr().out
        raw = [character for character in out if not (character.isprintable() or character in "\n\t\u3000")]
        assert bool(raw) == (not is_terminal)


def test_report_shows_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    report(FundamentaLLMError("'\x1b]0;mine\x07\x9b2J\udcff.txt'\n\tनमस्ते\u200d 👩\u200d🚀"))
    assert capsys.readouterr().err == "error: '\\x1b]0;mine\\x07\\x9b2J\\udcff.txt'\n\tनमस्ते\u200d 👩\u200d🚀\n"


def test_generate_refuses_logits_that_are_not_finite(model: Transformer) -> None:
    assert len(list(generate(model, [1], 3, 8, temperature=1e-45))) == 3
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(FundamentaLLMError, match="not finite"):
        list(generate(model, [1], 3, 8))
