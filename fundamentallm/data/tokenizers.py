"""Tokenizers, all from the `tokenizers` library: one JSON file each, which opens everywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from fundamentallm.config.schema import DataConfig
from fundamentallm.errors import ConfigError

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What decoding gives for part of a character."""

UNKNOWN = "<unk>"
"""Token of a character that a `char` vocabulary lacks; without it BPE would drop the character in silence."""


def create_tokenizer(
    spec: str,
    text: Callable[[], Iterable[str]],
    training_text: Callable[[], Iterable[str]],
    end_of_text: str | None = None,
) -> Tokenizer:
    """The tokenizer that `spec` names (see `DataConfig.tokenizer`).

    Args:
        spec: 'char', 'byte', 'bpe:<vocabulary size>', or the path of a tokenizer.json.
        text: gives all the text, in pieces; 'char' takes its set of characters.
        training_text: gives the part that is trained on; 'bpe' learns its merges from that part only.
        end_of_text: a token that stands for the end of a document, and for no text; null: there is none.

    Raises:
        ConfigError: if `spec` is none of these, or a tokenizer.json cannot be read, or has no such token.

    Examples:
        >>> from fundamentallm import create_tokenizer
        >>> text = "to be or not to be"
        >>> tokenizer = create_tokenizer("char", lambda: [text], lambda: [text])
        >>> ids = tokenizer.encode("not to be").ids
        >>> tokenizer.decode(ids), len(ids), tokenizer.get_vocab_size()  # its characters, and <unk>
        ('not to be', 9, 8)
    """
    DataConfig(tokenizer=spec)  # which refuses what is none
    if end_of_text is not None:
        return _with_end(spec, text, training_text, end_of_text)
    return _made(spec, text, training_text)


def _made(spec: str, text: Callable[[], Iterable[str]], training_text: Callable[[], Iterable[str]]) -> Tokenizer:
    if spec == "char":
        characters = sorted(set().union(*text()))
        vocabulary = {character: index for index, character in enumerate([*characters, UNKNOWN])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
        tokenizer.decoder = decoders.Fuse()
        return tokenizer
    if spec == "byte" or spec.startswith("bpe:"):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
        # GPT-2's split into words is only of use where merges must not cross them.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=spec != "byte")
        tokenizer.decoder = decoders.ByteLevel()
        if spec != "byte":
            size = int(spec.removeprefix("bpe:"))
            trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
            tokenizer.train_from_iterator(training_text(), trainer)
        return tokenizer
    return read_tokenizer(spec)


def _with_end(
    spec: str, text: Callable[[], Iterable[str]], training_text: Callable[[], Iterable[str]], end_of_text: str
) -> Tokenizer:
    """As `create_tokenizer`, with the token added to the vocabularies made here (of whose size it is a part)."""
    kind, _, size = spec.partition(":")
    tokenizer = _made(f"bpe:{int(size) - 1}" if kind == "bpe" else spec, text, training_text)
    if tokenizer.token_to_id(end_of_text) is None:
        if spec.endswith(".json"):
            raise ConfigError(f"end_of_text is {end_of_text!r}, which {spec!r} does not have; give a token it has.")
        tokenizer.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    elif not spec.endswith(".json"):  # as a character, or a merge, of the text
        raise ConfigError(f"end_of_text is {end_of_text!r}, which stands for text too; give it another name.")
    return tokenizer


def read_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer.json, set to return every token of a text.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        tokenizer = Tokenizer.from_file(os.path.expanduser(path))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"tokenizer is {str(path)!r}, which is no tokenizer.json: {error}.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def unknown_token(tokenizer: Tokenizer) -> int | None:
    """The token of what a vocabulary lacks, if there is one; from the JSON, which takes a large vocabulary 60 ms."""
    model = json.loads(tokenizer.to_str())["model"]
    index: int | None = model.get("unk_id")
    return tokenizer.token_to_id(model["unk_token"]) if index is None and model.get("unk_token") else index


def lacking_characters(tokenizer: Tokenizer, text: str, known: set[str], unknown: int | None) -> list[str]:
    """Characters of `text` that the vocabulary lacks: they become its unknown token, part of themselves, or nothing.

    White space that becomes nothing is not among them: some tokenizers mean it.

    Args:
        tokenizer: the tokenizer.
        text: the text.
        known: characters that are known to be there; those found to be are added.
        unknown: the `unknown_token`.
    """
    lacking, known_in_words = [], set()
    for character in set(text) - known:
        ids = tokenizer.encode(character, add_special_tokens=False).ids
        if character != BROKEN and BROKEN in tokenizer.decode(ids, skip_special_tokens=False):
            lacking.append(character)
        elif unknown in ids or not (ids or character.isspace()):
            known_in_words.add(character)
        else:
            known.add(character)
    if known_in_words:  # at most: each has to come back out of the tokens (offsets do not show what was dropped)
        ids = [index for index in tokenizer.encode(text, add_special_tokens=False).ids if index != unknown]
        back = tokenizer.decode(ids, skip_special_tokens=False).casefold()
        folded = text.casefold()
        lacking += [c for c in known_in_words if back.count(c.casefold()) < folded.count(c.casefold())]
    return sorted(lacking)


def num_bytes(tokenizer: Tokenizer, tokens: NDArray[np.integer], end_of_text: int | None = None) -> int:
    """UTF-8 bytes of the text of `tokens`, also where it begins or ends within a character.

    `end_of_text`, if it is among them, is no text.
    """
    if end_of_text is not None:
        tokens = tokens[tokens != end_of_text]
    if len(tokens) == 0:
        return 0
    if isinstance(tokenizer.decoder, decoders.ByteLevel):  # each character of such a token stands for a byte
        sizes = [len(tokenizer.id_to_token(index) or "") for index in range(tokenizer.get_vocab_size())]
        return int(np.array(sizes)[tokens].sum())
    return len(tokenizer.decode(tokens.tolist(), skip_special_tokens=False).encode())


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt.

    Raises:
        ConfigError: if it is no text, or the vocabulary lacks some of its characters.
    """
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # as a command line's bytes become
        raise ConfigError(f"the prompt {prompt[:40]!r} is no UTF-8 text; give another prompt.")
    if lacking := lacking_characters(tokenizer, prompt, set(), unknown_token(tokenizer)):
        raise ConfigError(
            f"the prompt {prompt[:40]!r} has {', '.join(map(repr, lacking))}, which the model's vocabulary lacks; give "
            "another prompt."
        )
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids
    return ids
