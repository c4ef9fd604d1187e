"""Tokenizers: lossless, and characters that a vocabulary lacks are errors."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from fundamentallm.data.encoding import encode_pieces
from fundamentallm.data.tokenizers import UNKNOWN, create_tokenizer, encode_prompt, read_tokenizer, with_unknown
from tests.conftest import problem_of

SAMPLE = "Grüße,\r\n\tहिन्दी 漢字 🙂 don't e\u0301\n\n  two  spaces and a <unk>\n"


@pytest.fixture(params=["char", "byte", "bpe:300", "file"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param != "file":
        return create_tokenizer(request.param, SAMPLE)
    create_tokenizer("bpe:270", "other text").save(str(tmp_path / "tokenizer.json"))
    return create_tokenizer(str(tmp_path / "tokenizer.json"), SAMPLE)


def test_decode_inverts_encode(tokenizer: Tokenizer) -> None:
    for text in ("", SAMPLE * 3, SAMPLE[::-1]):
        ids = encode_prompt(tokenizer, text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert ids == tokenizer.encode(text).ids


def test_char_has_one_token_for_each_character() -> None:
    tokenizer = create_tokenizer("char", iter(SAMPLE.splitlines(keepends=True)))
    assert set(tokenizer.get_vocab()) == {*SAMPLE, UNKNOWN}
    ids = tokenizer.encode(SAMPLE).ids
    assert len(ids) == len(SAMPLE)
    assert tokenizer.token_to_id(UNKNOWN) not in ids


def test_bpe_has_the_size_it_names_and_merges_what_is_frequent(text: str) -> None:
    tokenizer = create_tokenizer("bpe:400", text)
    assert tokenizer.get_vocab_size() == 400
    words = create_tokenizer("bpe:400", "of the cat, of the dog, of the cow\n" * 50)
    assert max(token.count("Ġ") for token in words.get_vocab()) == 1  # merges do not cross words
    assert len(tokenizer.encode(text).ids) < 0.7 * len(text)


def test_encode_prompt_adds_no_special_tokens() -> None:
    tokenizer = create_tokenizer("char", "ab")
    tokenizer.post_processor = processors.TemplateProcessing(single="a $A b", special_tokens=[("a", 0), ("b", 1)])
    assert len(tokenizer.encode("ab").ids) == 4
    assert encode_prompt(tokenizer, "ab") == [0, 1]


def test_encode_prompt_names_unknown_characters_alone() -> None:
    tokenizer = create_tokenizer("char", "cab")
    problem = problem_of(encode_prompt, tokenizer, "abéc漢ab")
    assert (problem.setting, problem.value, problem.reason) == ("prompt", "abéc漢ab", "which has 'é', '漢'")
    assert problem_of(encode_prompt, tokenizer, b"ab\xff".decode(errors="surrogateescape")).allowed == "UTF-8 text"


def test_end_of_text_is_one_more_token_within_the_size() -> None:
    assert create_tokenizer("byte", end_of_text="<end>").token_to_id("<end>") == 256
    tokenizer = create_tokenizer("bpe:270", SAMPLE * 9, "<end>")
    assert tokenizer.get_vocab_size() == 270
    problem = problem_of(create_tokenizer, "char", SAMPLE, "漢")
    assert (problem.setting, problem.value) == ("data.end_of_text", "漢")


def test_end_of_text_has_to_be_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    create_tokenizer("byte", end_of_text="<end>").save(str(path))
    assert create_tokenizer(str(path), end_of_text="<end>").get_vocab_size() == 257
    assert problem_of(create_tokenizer, str(path), end_of_text="<other>").setting == "data.end_of_text"


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
def test_encode_prompt_without_unknown_token_drops_nothing(make_vocabulary) -> None:
    tokenizer = make_vocabulary("abc")
    assert len(encode_prompt(tokenizer, "cab")) == 3
    assert problem_of(encode_prompt, tokenizer, "cazb").reason == "which has 'z'"


@pytest.mark.parametrize("content", [None, b"{}", b"\xff\xfe"])
def test_create_tokenizer_refuses_a_broken_file(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_bytes(content)
    problem = problem_of(create_tokenizer, str(path), SAMPLE)
    assert (problem.setting, problem.value) == ("data.tokenizer", str(path))


def test_read_tokenizer_switches_truncation_and_padding_off(tmp_path: Path) -> None:
    saved = create_tokenizer("char", SAMPLE)
    saved.enable_truncation(max_length=5)
    saved.enable_padding(length=1000)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert len(read_tokenizer(tmp_path / "tokenizer.json").encode(SAMPLE).ids) == len(SAMPLE)


def unknown_token_that_is_added(characters: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[], unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[UNK]"])
    return tokenizer


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("make_vocabulary", [without_unknown_token, unknown_token_that_is_added])
def test_encode_pieces_keeps_ids_beside_an_unknown_token(make_vocabulary, as_text: bool) -> None:
    tokenizer = make_vocabulary("abc<>")
    tokenizer.add_special_tokens(["<a>"])
    tokenizer.encode_special_tokens = as_text
    known, unknown = encode_pieces(with_unknown(tokenizer), ["a<a>b", "azb"])
    assert (known.ids.tolist(), known.unknown) == (tokenizer.encode("a<a>b").ids, [])
    assert unknown.unknown == [(1, "z")]
