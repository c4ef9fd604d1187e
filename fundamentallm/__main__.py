"""`fundamentallm VERB ...`, also as `python -m fundamentallm VERB ...`."""

from __future__ import annotations

import importlib
import os
import sys

from fundamentallm.config.registry import did_you_mean
from fundamentallm.errors import FundamentaLLMError, exit_code, report

VERBS = {
    "train": ("fundamentallm.train", "train a language model from a config"),
    "prepare": (
        "fundamentallm.commands.prepare",
        "tokenize the data of a config once, on all cores; goes on where it was stopped",
    ),
    "generate": ("fundamentallm.commands.generate", "write text with a trained model"),
    "evaluate": ("fundamentallm.commands.evaluate", "measure a trained model on text"),
    "checkpoints": ("fundamentallm.commands.checkpoints", "list, verify and show checkpoints; what a step trained on"),
    "report": ("fundamentallm.commands.report", "compare runs on one page: curves, settings, samples, environment"),
    "estimate": (
        "fundamentallm.commands.estimate.main",
        "work out memory, operations and bytes sent, for any size, at once",
    ),
    "find_lr": ("fundamentallm.commands.find_lr", "find a learning rate by short training at a growing one"),
    "doctor": (
        "fundamentallm.commands.doctor.main",
        "prove on your config, data and machine that one config is one run",
    ),
}


def main() -> int:
    """Run the verb that the command line names; returns the exit code."""
    verb, *arguments = sys.argv[1:] or ["--help"]
    try:
        code = _run(verb, arguments)
        sys.stdout.flush()
    except FundamentaLLMError as error:
        return report(error)
    except BrokenPipeError:  # whoever reads, such as `head`, has seen enough; nothing is left to flush at the exit
        if verb == "train":  # which had more to do than to write
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as interrupt:
        print("\nstopped", file=sys.stderr)
        return exit_code(interrupt)
    return code


def _run(verb: str, arguments: list[str]) -> int:
    if verb in ("-h", "--help"):
        print("usage: fundamentallm VERB [--help] ...\n")
        print("\n".join(f"  {name:<12} {text}" for name, (_, text) in VERBS.items()))
        return 0
    if verb not in VERBS:
        print(f"verb is {verb!r}; allowed: {', '.join(VERBS)}.{did_you_mean(verb, VERBS)}", file=sys.stderr)
        return 2
    return importlib.import_module(VERBS[verb][0]).main(arguments, f"fundamentallm {verb}")  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())
