"""Tokenize the data of a config once, on all cores, so that runs begin at once; stopped, the same command goes on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fundamentallm.commands.output import say
from fundamentallm.config.command_line import parse_config
from fundamentallm.config.units import size_text
from fundamentallm.errors import INTERRUPTED


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line; returns the exit code.

    Raises:
        ConfigError: if the settings are wrong, or a source cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        usage="%(prog)s [--config FILE] [--SECTION.SETTING VALUE ...]",
        description=f"{__doc__} Settings are those of `fundamentallm train --help`; those of the data count. What is "
        "prepared lies in data.cache_dir, where runs find it; a folder that is named at the end can be moved to other "
        "machines, and is a data.source there.",
        allow_abbrev=False,
    )
    _, rest = parser.parse_known_args(arguments)
    config = parse_config(rest, program)
    if config.model.pretrained is not None:  # whose tokenizer is the run's
        from fundamentallm.models.transformers_format import find_pretrained
        from fundamentallm.run.initial_weights import completed

        config = completed(config, find_pretrained(config.model.pretrained))
    from fundamentallm.data.corpus import describe, load_corpus  # which takes half a second to import

    try:
        corpus = load_corpus(config.data)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    for line in describe(corpus):
        say(line)
    for source in corpus.sources:
        size = sum(path.stat().st_size for path in source.folder.iterdir())
        say(f"{source.name} is prepared in {source.folder} ({size_text(size)})")
    return 0
