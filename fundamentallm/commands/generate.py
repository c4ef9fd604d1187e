"""Generate text with a trained model."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from fundamentallm.checkpoint.reading import explained
from fundamentallm.commands.common import BASE_HELP, add_checkpoint
from fundamentallm.data.chat import ChatTemplate
from fundamentallm.data.tokenizers import encode_prompt
from fundamentallm.errors import ConfigError, Problem, printable
from fundamentallm.inference.generation import generate
from fundamentallm.inference.loading import load_model
from fundamentallm.models.transformers_format import TOKENIZER

SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add_checkpoint(parser)
    add("--base", metavar="DIR", help=BASE_HELP)
    add("--prompt", action="append", metavar="TEXT", help="text to continue [a new line]; may be repeated")
    add("--prompts", type=Path, metavar="FILE", help="file with a prompt in each line, in addition to --prompt")
    add("--max_new_tokens", type=int, default=200, metavar="INT", help="maximum number of tokens to generate [200]")
    add("--temperature", type=float, default=0.8, help="0: always the most probable token [0.8]")
    add("--top_k", type=int, metavar="INT", help="sample among this many most probable tokens only")
    add("--top_p", type=float, metavar="FLOAT", help="sample among the fewest tokens with this total probability")
    add("--repetition_penalty", type=float, default=1.0, metavar="R", help="above 1: fewer repeated tokens [1]")
    add("--seed", type=int, default=0, help="seed of the first prompt; each further prompt adds 1 [0]")
    add("--chat", action="store_true", help="give each prompt as a user's message, by the model's chat template")
    add("--ignore_end", action="store_true", help="continue after the model's end-of-text token")
    add("--json", action="store_true", help='print {"prompt": ..., "text": ..., "tokens": N} for each prompt')
    options = parser.parse_args(arguments)
    prompts = _prompts(options)
    model, tokenizer, context, stop, folder = load_model(options.checkpoint, options.base)
    sampling = {name: getattr(options, name) for name in SAMPLING} | {"stop": () if options.ignore_end else stop}
    with explained(folder):
        template = ChatTemplate(folder / TOKENIZER) if options.chat else None
        for index, prompt in enumerate(prompts):
            text = template.text([{"role": "user", "content": prompt}], is_prompt=True) if template else prompt
            prompt_ids = encode_prompt(tokenizer, text)
            ids = generate(model, prompt_ids, context=context, seed=options.seed + index, **sampling)
            if options.json:
                drawn = list(ids)
                line = {"prompt": prompt, "text": tokenizer.decode(drawn), "tokens": len(drawn)}
                print(json.dumps(line), flush=True)
                continue
            if len(prompts) > 1:
                _print("\n" * (index > 0) + f"---- {index} ----\n")
            _print(prompt)
            for piece in pieces(tokenizer, ids):
                _print(piece)
            print()
    return 0


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt or [])
    if options.prompts is not None:
        try:
            lines = options.prompts.read_text(encoding="utf-8-sig").split("\n")  # splitlines also splits at U+2028
        except (OSError, UnicodeDecodeError) as error:
            reason = f"which cannot be read: {error}"
            raise ConfigError(Problem("--prompts", str(options.prompts), reason=reason)) from error
        prompts += [line for line in lines if line]
    return prompts or ["\n"]


def pieces(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Yield the text of tokens as they come, and a character that consists of several tokens as a whole."""
    stream, drawn, length = DecodeStream(skip_special_tokens=True), list[int](), 0
    for token in ids:
        drawn.append(token)
        if text := stream.step(tokenizer, token):
            length += len(text)
            yield text
    yield tokenizer.decode(drawn)[length:]


def _print(text: str) -> None:
    """Print text: for a terminal without control characters, otherwise exactly."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)
