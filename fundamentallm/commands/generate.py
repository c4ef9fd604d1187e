"""Write text with a trained model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fundamentallm.errors import ConfigError
from fundamentallm.inference.loading import CHECKPOINT_HELP, open_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line; returns the exit code.

    Raises:
        FundamentaLLMError: if the checkpoint cannot be opened, or a value is outside its range.
    """
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help=CHECKPOINT_HELP)
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT",
        help="text to go on from [a new line]; given several times, all are continued at once",
    )  # fmt: skip
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt in each line; further ones")
    parser.add_argument("--max_new_tokens", type=int, default=200, metavar="N", help="most tokens to write [200]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable token [0.8]")
    parser.add_argument("--top_k", type=int, metavar="N", help="draw among the N most probable tokens only")
    parser.add_argument(
        "--top_p", type=float, metavar="P", help="draw among the fewest tokens that have the probability P together"
    )
    parser.add_argument(
        "--repetition_penalty", type=float, default=1.0, metavar="R",
        help="above 1: tokens that are there already become less probable [1]",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the draws; a further prompt's is one more [0]")
    parser.add_argument(
        "--ignore_end", action="store_true", help="write on where the model ends the text (its end-of-text token)"
    )
    parser.add_argument(
        "--json", action="store_true", help='write {"prompt": ..., "text": ..., "tokens": N} a line, at the end'
    )
    options = parser.parse_args(arguments)
    prompts = _prompts(options)

    # Imported here, so that --help need not wait for torch.
    from fundamentallm.data.tokenizers import encode_prompt
    from fundamentallm.inference.generation import Sampling, generate_batch

    opened = open_model(options.checkpoint)
    ids = [encode_prompt(opened.tokenizer, prompt) for prompt in prompts]
    drawn = generate_batch(
        opened.model,
        ids,
        options.max_new_tokens,
        opened.context or max(map(len, ids)) + options.max_new_tokens,
        Sampling(options.repetition_penalty, options.temperature, options.top_k, options.top_p),
        options.seed,
        () if options.ignore_end else opened.stop,
    )
    if len(prompts) == 1 and not options.json:
        _stream(opened.tokenizer, prompts[0], (row[0] for row in drawn))
    else:
        _write_all(opened.tokenizer, prompts, drawn, options.json)
    return 0


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt or [])
    if options.prompts is not None:
        try:
            lines = options.prompts.read_text(encoding="utf-8").split("\n")  # not at a U+2028, as splitlines does
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts is {str(options.prompts)!r}, which cannot be read: {error}.") from error
        prompts += [line for line in lines if line]
        if not prompts:
            raise ConfigError(f"--prompts is {str(options.prompts)!r}, which is empty; give a prompt in each line.")
    return prompts or ["\n"]


def _stream(tokenizer: Tokenizer, prompt: str, ids: Iterator[int]) -> None:
    """Print the prompt, and what continues it as it comes."""
    print(prompt, end="", flush=True)
    for piece in pieces(tokenizer, ids):
        print(piece, end="", flush=True)
    print()


def pieces(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """The text of tokens, piece by piece; a character that is made of several tokens comes whole.

    A token's text depends on those before it, so the last few are decoded together, and new is what that text has more
    than before; not all that there are, or long texts would cost the square of their length.
    """
    window: list[int] = []
    done = ""  # the text of the window that is out already
    for token in ids:
        window.append(token)
        text = tokenizer.decode(window)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue
        yield text[len(done) :]
        window, done = (window[-1:], tokenizer.decode(window[-1:])) if text[len(done) :] else (window, text)
    yield tokenizer.decode(window)[len(done) :]


def _write_all(tokenizer: Tokenizer, prompts: list[str], drawn: Iterator[dict[int, int]], as_json: bool) -> None:
    """Print all texts when they are complete."""
    written: list[list[int]] = [[] for _ in prompts]
    for row in drawn:
        for index, token in row.items():
            written[index].append(token)
    for index, (prompt, ids) in enumerate(zip(prompts, written, strict=True)):
        text = tokenizer.decode(ids)
        if as_json:
            print(json.dumps({"prompt": prompt, "text": text, "tokens": len(ids)}, ensure_ascii=False))
        else:
            print(f"{'' if index == 0 else chr(10)}---- {index} ----\n{prompt}{text}")
