"""List, verify, show and export checkpoints; show the samples of a step."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fundamentallm.commands.options import BASE_HELP, add_checkpoint


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line and return the exit code."""
    options = _parser(program).parse_args(arguments)
    from fundamentallm.checkpoint.reading import explained  # imports torch, which --help need not wait for
    from fundamentallm.commands import checkpoint_verbs

    with explained(options.checkpoint):
        return getattr(checkpoint_verbs, f"{options.verb}_command")(options)  # type: ignore[no-any-return]


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    run = "output_dir of a run, or a folder of checkpoints"

    def add(name: str, text: str, folder: str = f"a checkpoint, {run} (its newest)") -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".", allow_abbrev=False)
        add_checkpoint(verb, folder)
        return verb

    add("list", "list checkpoints, oldest first", run)
    add("verify", "compare every byte with the manifest; exit code 1 if anything is damaged", f"a checkpoint, {run}")
    show = add("show", "show what a checkpoint holds")
    show.add_argument("--verify", action="store_true", help="compare every byte with the manifest first")
    samples = add("samples", "show which samples an optimizer step was trained on")
    step = "step, counted from 1 as in metrics.jsonl"
    samples.add_argument("--step", required=True, type=int, metavar="INT", help=step)
    samples.add_argument("--full", action="store_true", help="print each text in full, not one line of it")
    samples.add_argument("--indices_only", action="store_true", help="print no text, so that the data is not needed")
    samples.add_argument("--source", metavar="TEXT", help="where the data is now, as in data.source")
    merge = add("consolidate", "merge the weights into one file for transformers, also those of a sharded run")
    merge.add_argument("output", metavar="OUT", type=Path, help="a new folder, for from_pretrained")
    merge.add_argument("--merge", action="store_true", help="merge an adapter into its base model")
    merge.add_argument("--base", metavar="DIR", help=BASE_HELP)
    return parser
