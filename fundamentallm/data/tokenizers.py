"""Tokenizers, all from the `tokenizers` library: one JSON file each, which opens everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fundamentallm.errors import ConfigError

UNKNOWN = "<unk>"
"""Token of a character that a `char` vocabulary lacks; without it BPE would drop the character in silence."""


def create_tokenizer(
    spec: str, text: Callable[[], Iterable[str]], training_text: Callable[[], Iterable[str]]
) -> Tokenizer:
    """The tokenizer that `spec` names (see `DataConfig.tokenizer`).

    Args:
        spec: 'char', 'byte', 'bpe:<vocabulary size>', or the path of a tokenizer.json.
        text: gives all the text, in pieces; 'char' takes its set of characters.
        training_text: gives the part that is trained on; 'bpe' learns its merges from that part only.

    Raises:
        ConfigError: if a tokenizer.json cannot be read.
    """
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
    return read_tokenizer(Path(spec).expanduser())


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json, set to return every token of a text.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"tokenizer is {str(path)!r}, which is no tokenizer.json: {error}.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id that stands for what the vocabulary lacks, or None where nothing can be lacking."""
    unknown = getattr(tokenizer.model, "unk_token", None)
    return tokenizer.token_to_id(unknown) if unknown else None


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt.

    Raises:
        ConfigError: if the vocabulary lacks some of its characters.
    """
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids
    unknown = unknown_id(tokenizer)
    if unknown is not None and unknown in ids:
        lacking = sorted({c for c in prompt if unknown in tokenizer.encode(c, add_special_tokens=False).ids})
        raise ConfigError(f"the prompt has {lacking}, which the model's vocabulary lacks; leave them out.")
    return ids
