"""`fundamentallm COMMAND ...`, also as `python -m fundamentallm COMMAND ...`."""

import importlib
import os
import sys
from importlib.metadata import version

from fundamentallm import train
from fundamentallm.config.registry import did_you_mean
from fundamentallm.errors import ConfigError, FundamentaLLMError, Problem, exit_code, open_output, report
from fundamentallm.signals import ended_by_signals

VERBS = {
    "train": "train a language model from a config",
    "prepare": "tokenize a config's data ahead of training; can be resumed",
    "generate": "generate text with a trained model",
    "evaluate": "measure the loss of a trained model on a text",
    "checkpoints": "list, verify, show and consolidate checkpoints; show the samples of a step",
    "export": "write a trained model as a GGUF file, for llama.cpp",
    "report": "compare runs on one HTML page",
    "estimate": "estimate memory, FLOPs and time, for any model size",
    "find_lr": "suggest a learning rate by a range test",
    "doctor": "check that runs are reproducible with your config, data and machine",
}


def main() -> int:
    """Run the command that the command line names, and return the exit code."""
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb == "train":  # reports by itself, since it can be launched without this
        return train.main(arguments, "fundamentallm train")
    open_output()
    try:
        with ended_by_signals():
            code = _run(verb, arguments)
        sys.stdout.flush()
        return code
    except FundamentaLLMError as error:
        return report(error)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit would fail again
        return 0
    except KeyboardInterrupt as interrupt:
        print("\ninterrupted", file=sys.stderr)
        return exit_code(interrupt)


def _run(verb: str, arguments: list[str]) -> int:
    if verb in ("-h", "--help"):
        print("usage: fundamentallm COMMAND [--help] ...\n       fundamentallm --version\n")
        print("\n".join(f"  {name:<12} {text}" for name, text in VERBS.items()))
        return 0
    if verb in ("-V", "--version"):
        print(f"fundamentallm {version('fundamentallm')}")
        return 0
    if verb not in VERBS:
        text, advice = f"unknown command {verb!r}", did_you_mean(verb, VERBS)
        raise ConfigError(Problem("", verb, ", ".join(VERBS), advice, text=text))
    module = importlib.import_module(f"fundamentallm.commands.{verb}")
    return module.main(arguments, f"fundamentallm {verb}")  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())
