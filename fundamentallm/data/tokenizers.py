"""Tokenizers of the `tokenizers` library: one JSON file each, which any program can open."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from fundamentallm.config.schema import DataConfig
from fundamentallm.errors import ConfigError, Problem

UNKNOWN = "<unk>"
"""Token for characters that a `char` vocabulary lacks. Without it BPE would drop them silently."""
Complete = tuple[Tokenizer, int | None]  # what `with_unknown` returns
SPLIT = "split_special_tokens"
"""Setting of a tokenizer_config.json: special tokens in a text are read as text."""
MISSING = "\ue000missing\ue000"
"""Name, in private-use characters, of the unknown token that `with_unknown` gives to a vocabulary without one."""


def create_tokenizer(spec: str, text: str | Iterable[str] = (), end_of_text: str | None = None) -> Tokenizer:
    """Create the tokenizer that `spec` names (see `DataConfig.tokenizer`).

    Args:
        spec: 'char', 'byte', 'bpe:<vocabulary size>', or the path of a tokenizer.json.
        text: a text or an iterable of its pieces, which is read once. 'char' takes its set of characters, so give it
            all the text. 'bpe' learns its merges, so give it the training text only. The others ignore it.
        end_of_text: special token that ends a document. It counts towards the size of 'bpe:<size>'. None: no token.

    Raises:
        ConfigError: if `spec` is none of these, a tokenizer.json cannot be read, or `end_of_text` does not fit it.

    Examples:
        >>> from fundamentallm import create_tokenizer
        >>> tokenizer = create_tokenizer("char", "to be or not to be")
        >>> ids = tokenizer.encode("not to be").ids
        >>> tokenizer.decode(ids), len(ids), tokenizer.get_vocab_size()  # its characters, and <unk>
        ('not to be', 9, 8)
    """
    DataConfig(tokenizer=spec)  # raises if spec is wrong
    pieces = [text] if isinstance(text, str) else text
    if spec == "char":
        characters = sorted({character for piece in pieces for character in piece})
        vocabulary = {character: index for index, character in enumerate([*characters, UNKNOWN])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
        tokenizer.decoder = decoders.Fuse()
    elif spec == "byte":
        tokenizer = _byte_tokenizer(splits_words=False)
    elif spec.startswith("bpe:"):
        tokenizer = _byte_tokenizer(splits_words=True)
        size = int(spec.removeprefix("bpe:")) - (end_of_text is not None)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(pieces, trainer)
    else:
        tokenizer = read_tokenizer(spec)
    if end_of_text is None:
        return tokenizer
    is_file, is_known = spec.endswith(".json"), tokenizer.token_to_id(end_of_text) is not None
    if is_file != is_known:
        allowed = f"a token of {spec!r}" if is_file else "a name that is not a token of the text"
        raise ConfigError(Problem("data.end_of_text", end_of_text, allowed))
    if not is_file:
        tokenizer.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    return tokenizer


def _byte_tokenizer(splits_words: bool) -> Tokenizer:
    """Create a tokenizer of 256 bytes, for 'byte' as it is and for 'bpe' to be trained."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    # GPT-2's split into words costs time and only serves to keep merges within words.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits_words)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer.json and switch its truncation and padding off, so that it returns every token of a text.

    A tokenizer_config.json beside it says whether special tokens in a text are read as text, as in transformers.

    Raises:
        ConfigError: if it cannot be read.
    """
    file = Path(os.path.expanduser(path))
    config = file.with_name("tokenizer_config.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
        if config.is_file():
            tokenizer.encode_special_tokens = json.loads(config.read_text("utf-8")).get(SPLIT) is True
    except Exception as error:  # the library raises bare Exception
        reason = f"which cannot be read: {error}"
        raise ConfigError(Problem("data.tokenizer", str(path), "a tokenizer.json", reason=reason)) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def num_ids(tokenizer: Tokenizer) -> int:
    """Returns the largest id plus one. (`get_vocab_size` counts tokens, which are fewer if the ids have gaps.)"""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _saved(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.to_str()) | {"truncation": None, "padding": None}  # type: ignore[no-any-return]


def same_tokenizer(one: Tokenizer, other: Tokenizer) -> bool:
    """Returns whether two tokenizers are the same, apart from truncation and padding."""
    return _saved(one) == _saved(other)


def with_unknown(tokenizer: Tokenizer) -> Complete:
    """Returns a copy that encodes all of a text, and the id of what the vocabulary lacks.

    A vocabulary without an unknown token gets one, with the id `num_ids(tokenizer)`: BPE would drop what it lacks.
    """
    saved = _saved(tokenizer)
    model, vocabulary = saved["model"], saved["model"]["vocab"]
    name = model.get("unk_token") or MISSING
    if model["type"] == "Unigram":
        unknown = model["unk_id"]
    elif name in vocabulary:
        unknown = vocabulary[name]
    else:
        known = tokenizer.token_to_id(name)
        unknown = num_ids(tokenizer) if known is None else known
        # Added tokens that the model does not know would get new ids in the copy.
        for index, token in tokenizer.get_added_tokens_decoder().items():
            if not (token.special and tokenizer.encode_special_tokens):
                vocabulary[token.content] = index
        vocabulary[name], model["unk_token"] = unknown, name
    copy = Tokenizer.from_str(json.dumps(saved))
    copy.encode_special_tokens = tokenizer.encode_special_tokens  # not part of the JSON
    return copy, unknown


def find_unknown(tokenizer: Tokenizer, unknown: int | None, text: str) -> list[tuple[int, str]]:
    """Lists position and text of what is encoded as unknown. A text that names the unknown token is not listed."""
    name = None if unknown is None else tokenizer.id_to_token(unknown)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    spans = [span for index, span in zip(encoding.ids, encoding.offsets, strict=True) if index == unknown]
    return [(start, text[start:end]) for start, end in spans if text[start:end].strip() != name]


def num_bytes(tokenizer: Tokenizer, tokens: NDArray[np.integer], end_of_text: int | None = None) -> int:
    """Count the UTF-8 bytes of the text of `tokens`, without the `end_of_text` tokens among them.

    The tokens may begin or end within a character.
    """
    if end_of_text is not None:
        tokens = tokens[tokens != end_of_text]
    if len(tokens) == 0:
        return 0
    if isinstance(tokenizer.decoder, decoders.ByteLevel):  # one character of a token's name stands for one byte
        sizes = np.zeros(num_ids(tokenizer), np.int64)
        for name, index in tokenizer.get_vocab().items():
            sizes[index] = len(name)
        return int(sizes[tokens].sum())
    return len(tokenizer.decode(tokens.tolist(), skip_special_tokens=False).encode())


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Encode a prompt.

    Raises:
        ConfigError: if it is not valid text, or the vocabulary lacks some of it.
    """
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # from invalid bytes on the command line
        raise ConfigError(Problem("prompt", prompt[:40], "UTF-8 text"))
    if lacking := sorted({part for _, part in find_unknown(*with_unknown(tokenizer), prompt)}):
        reason = f"which has {', '.join(map(repr, lacking))}"
        raise ConfigError(Problem("prompt", prompt[:40], "characters of the model's vocabulary", reason=reason))
    return list(tokenizer.encode(prompt, add_special_tokens=False).ids)
