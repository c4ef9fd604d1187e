"""Tokenizers of the `tokenizers` library: one JSON file each, which any program can open."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from fundamentallm.config.schema import DataConfig
from fundamentallm.errors import ConfigError, Problem

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What decoding gives for an incomplete character."""

UNKNOWN = "<unk>"
"""Token for characters that a `char` vocabulary lacks. Without it BPE would drop them silently."""


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
        tokenizer = _char_tokenizer(pieces)
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
    if end_of_text is not None:
        is_known = tokenizer.token_to_id(end_of_text) is not None
        if spec.endswith(".json"):
            if not is_known:
                raise ConfigError(Problem("data.end_of_text", end_of_text, f"a token of {spec!r}"))
        elif is_known:
            reason = "which is also a token of the text"
            raise ConfigError(Problem("data.end_of_text", end_of_text, "a name that is not in the text", "", reason))
        else:
            tokenizer.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    return tokenizer


def _char_tokenizer(pieces: Iterable[str]) -> Tokenizer:
    characters: set[str] = set()
    for piece in pieces:
        characters.update(piece)
    vocabulary = {character: index for index, character in enumerate([*sorted(characters), UNKNOWN])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
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

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        tokenizer = Tokenizer.from_file(os.path.expanduser(path))
    except Exception as error:  # the library raises bare Exception
        reason = f"which cannot be read: {error}"
        raise ConfigError(Problem("data.tokenizer", str(path), "a tokenizer.json", reason=reason)) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def unknown_token(tokenizer: Tokenizer) -> int | None:
    """Returns the token for unknown characters, or None if there is none. Costs 60 ms with a large vocabulary."""
    model = json.loads(tokenizer.to_str())["model"]
    index: int | None = model.get("unk_id")
    return tokenizer.token_to_id(model["unk_token"]) if index is None and model.get("unk_token") else index


def lacking_characters(tokenizer: Tokenizer, text: str, known: set[str], unknown: int | None) -> list[str]:
    """List the characters of `text` that the vocabulary lacks: they encode to the unknown token, to part of a
    character, or to nothing. Those in `known` are not checked again, and those found in the vocabulary are added to it.

    White space that encodes to nothing is not listed, since some tokenizers drop it on purpose.
    """
    lacking, only_in_words = [], set()
    for character in set(text) - known:
        ids = tokenizer.encode(character, add_special_tokens=False).ids
        if character != BROKEN and BROKEN in tokenizer.decode(ids, skip_special_tokens=False):
            lacking.append(character)
        elif unknown in ids or not (ids or character.isspace()):
            only_in_words.add(character)
        else:
            known.add(character)
    if only_in_words:  # decode and compare counts: offsets do not show what was dropped
        ids = [index for index in tokenizer.encode(text, add_special_tokens=False).ids if index != unknown]
        back = tokenizer.decode(ids, skip_special_tokens=False).casefold()
        folded = text.casefold()
        lacking += [c for c in only_in_words if back.count(c.casefold()) < folded.count(c.casefold())]
    return sorted(lacking)


def num_bytes(tokenizer: Tokenizer, tokens: NDArray[np.integer], end_of_text: int | None = None) -> int:
    """Count the UTF-8 bytes of the text of `tokens`, without the `end_of_text` tokens among them.

    The tokens may begin or end within a character.
    """
    if end_of_text is not None:
        tokens = tokens[tokens != end_of_text]
    if len(tokens) == 0:
        return 0
    if isinstance(tokenizer.decoder, decoders.ByteLevel):  # one character of a token's name stands for one byte
        sizes = [len(tokenizer.id_to_token(index) or "") for index in range(tokenizer.get_vocab_size())]
        return int(np.array(sizes)[tokens].sum())
    return len(tokenizer.decode(tokens.tolist(), skip_special_tokens=False).encode())


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Encode a prompt.

    Raises:
        ConfigError: if it is not valid text, or the vocabulary lacks some of its characters.
    """
    shown = prompt[:40]
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # from invalid bytes on the command line
        raise ConfigError(Problem("prompt", shown, "UTF-8 text"))
    if lacking := lacking_characters(tokenizer, prompt, set(), unknown_token(tokenizer)):
        reason = f"which has {', '.join(map(repr, lacking))}"
        raise ConfigError(Problem("prompt", shown, "characters of the model's vocabulary", reason=reason))
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids
    return ids
