"""Tokenizers: lossless, deterministic in what they learn from, loud about what they lack."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from fundamentallm.data.tokenizers import UNKNOWN, create_tokenizer, encode_prompt, read_tokenizer
from fundamentallm.errors import ConfigError

SAMPLE = "Grüße,\r\n\tहिन्दी 漢字 🙂 don't e\u0301\n\n  two  spaces and a <unk>\n"


make = create_tokenizer


@pytest.fixture(params=["char", "byte", "bpe:300", "file"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param != "file":
        return make(request.param, SAMPLE)
    make("bpe:270", "other text").save(str(tmp_path / "tokenizer.json"))
    return make(str(tmp_path / "tokenizer.json"), SAMPLE)


@pytest.mark.parametrize("text", ["", *SAMPLE, SAMPLE, SAMPLE * 3, SAMPLE[::-1]])
def test_decoding_what_was_encoded_gives_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_every_tokenizer_survives_its_json(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "copy.json"))
    copy = read_tokenizer(tmp_path / "copy.json")
    assert copy.encode(SAMPLE).ids == tokenizer.encode(SAMPLE).ids
    assert copy.decode(copy.encode(SAMPLE).ids) == SAMPLE


def test_char_has_one_token_for_each_character_of_all_the_text() -> None:
    tokenizer = make("char", SAMPLE, training_text="only these")
    assert set(tokenizer.get_vocab()) == {*SAMPLE, UNKNOWN}
    ids = tokenizer.encode(SAMPLE).ids
    assert len(ids) == len(SAMPLE)
    assert tokenizer.token_to_id(UNKNOWN) not in ids


def test_char_vocabulary_does_not_depend_on_how_the_text_comes_in_pieces() -> None:
    pieces = create_tokenizer("char", iter(SAMPLE.splitlines(keepends=True)))
    assert pieces.to_str() == make("char", SAMPLE).to_str()


def test_byte_has_one_token_for_each_byte() -> None:
    tokenizer = make("byte", "")
    assert tokenizer.get_vocab_size() == 256
    assert len(tokenizer.encode(SAMPLE).ids) == len(SAMPLE.encode())


def test_bpe_has_the_size_it_names_and_merges_what_is_frequent(text: str) -> None:
    tokenizer = make("bpe:400", text)
    assert tokenizer.get_vocab_size() == 400
    assert len(tokenizer.encode(text).ids) < 0.7 * len(text)


def test_bpe_knows_every_byte_even_if_trained_on_none() -> None:
    tokenizer = make("bpe:300", "")
    assert tokenizer.decode(tokenizer.encode(SAMPLE).ids) == SAMPLE


def test_bpe_learns_from_the_training_text_only(text: str) -> None:
    training_text, rest = text[:10_000], text[10_000:]
    learned = make("bpe:300", training_text + rest, training_text).to_str()
    assert learned == make("bpe:300", "zqzqzq" * 1000, training_text).to_str()
    assert learned != make("bpe:300", text, rest).to_str()


def test_bpe_merges_do_not_cross_words() -> None:
    tokenizer = make("bpe:400", "of the cat, of the dog, of the cow\n" * 50)
    assert max(token.count("Ġ") for token in tokenizer.get_vocab()) == 1


def test_a_prompt_is_encoded_as_training_text_is(tokenizer: Tokenizer) -> None:
    assert encode_prompt(tokenizer, SAMPLE) == tokenizer.encode(SAMPLE, add_special_tokens=False).ids


def test_a_prompt_gets_no_special_tokens() -> None:
    tokenizer = make("char", "ab")
    tokenizer.post_processor = processors.TemplateProcessing(single="a $A b", special_tokens=[("a", 0), ("b", 1)])
    assert len(tokenizer.encode("ab").ids) == 4
    assert encode_prompt(tokenizer, "ab") == [0, 1]


def test_a_prompt_with_unknown_characters_is_refused_and_they_alone_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        encode_prompt(make("char", "cab"), "abéc漢ab")
    assert "the prompt 'abéc漢ab' has 'é', '漢', which" in str(caught.value)
    with pytest.raises(ConfigError, match="is no UTF-8 text"):
        encode_prompt(make("char", "cab"), b"ab\xff".decode(errors="surrogateescape"))


def without_unknown_token(characters: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def bytes_of_some(characters: str) -> Tokenizer:
    tokenizer = without_unknown_token(characters)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def unigram(characters: str) -> Tokenizer:
    return Tokenizer(models.Unigram([("<unk>", 0.0), *((c, -1.0) for c in characters)], unk_id=0))


@pytest.mark.parametrize("make_vocabulary", [without_unknown_token, bytes_of_some, unigram])
def test_a_vocabulary_without_an_unknown_token_does_not_drop_characters_in_silence(make_vocabulary) -> None:
    tokenizer = make_vocabulary("abc")
    assert len(encode_prompt(tokenizer, "cab")) == 3
    with pytest.raises(ConfigError, match="z"):
        encode_prompt(tokenizer, "cazb")


def whole_words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "to": 1, "be": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def characters_and_a_special_token() -> Tokenizer:
    tokenizer = make("char", "to be")
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "prompt"), [(whole_words(), "to be"), (characters_and_a_special_token(), "to<|end|>be")]
)
def test_what_is_known_only_as_a_whole_is_known(tokenizer: Tokenizer, prompt: str) -> None:
    assert encode_prompt(tokenizer, prompt) == tokenizer.encode(prompt).ids


@pytest.mark.parametrize("content", [None, b"", b"{}", b"not json", b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"mine\.json"):
        make(str(path), SAMPLE)


def test_a_tokenizer_file_set_to_truncate_and_pad_still_returns_every_token(tmp_path: Path) -> None:
    saved = make("char", SAMPLE)
    saved.enable_truncation(max_length=5)
    saved.enable_padding(length=1000)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert len(read_tokenizer(tmp_path / "tokenizer.json").encode(SAMPLE).ids) == len(SAMPLE)


@pytest.mark.parametrize("spec", ["words", "bpe:x", "bpe:10", "bpe"])
def test_what_is_no_tokenizer_is_refused_from_python_too(spec: str) -> None:
    with pytest.raises(ConfigError, match=f"tokenizer is '{spec}'; allowed: "):
        create_tokenizer(spec, "abc")
