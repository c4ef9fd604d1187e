"""Write a trained model with its tokenizer as one GGUF file, for llama.cpp and programs that are built on it."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from fundamentallm.atomic import replacing, sync_pending
from fundamentallm.checkpoint.reading import explained
from fundamentallm.commands.common import BASE_HELP, MODEL_HELP, say
from fundamentallm.config.units import size_text
from fundamentallm.errors import ConfigError, Problem, writing
from fundamentallm.inference.gguf_format import DTYPES, write_gguf
from fundamentallm.inference.loading import load_model


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", metavar="DIR", help=MODEL_HELP)
    add("output", nargs="?", metavar="OUT", type=Path, help="a new file [the name of DIR with .gguf, in this folder]")
    add("--format", choices=["gguf"], default="gguf", help="[gguf]")
    add("--dtype", choices=DTYPES, default="f32", help="precision of the matrices; llama-quantize goes below [f32]")
    add("--base", metavar="DIR", help=BASE_HELP)
    options = parser.parse_intermixed_args(arguments)
    output = options.output or Path(f"{Path(options.checkpoint).expanduser().resolve().name}.gguf")
    if os.path.lexists(output):
        raise ConfigError(Problem("OUT", str(output), allowed="a new file", reason="which exists already"))
    loaded = load_model(options.checkpoint, options.base)
    with explained(loaded.folder), writing(output), replacing(output) as new:
        about = write_gguf(new, loaded, output.stem, options.dtype)
    sync_pending()
    say(f"{loaded.folder} -> {output}: {about}, {size_text(output.stat().st_size)}")
    return 0
