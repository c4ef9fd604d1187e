"""What a user can get wrong, as exceptions that say what was got, what is allowed and what to do."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Sequence


class FundamentaLLMError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(FundamentaLLMError, ValueError):
    """One or more settings are wrong; `problems` lists them all, one sentence each."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class CheckpointError(FundamentaLLMError):
    """A checkpoint cannot be written, is damaged, or does not fit the run."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the given path."""


class TrainingError(FundamentaLLMError):
    """Training cannot go on: the loss or the gradient stopped being finite."""


class ProcessLostError(FundamentaLLMError):
    """Processes of the run are gone, and the others cannot go on without them; `ranks` says which."""

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = list(ranks)


class RunInProgressError(FundamentaLLMError):
    """Another process runs in the same folder."""


@contextlib.contextmanager
def writing(path: object) -> Iterator[None]:
    """Meanwhile, what the file system refuses is an error that names the file (a full disk's own names none).

    Raises:
        FundamentaLLMError: with the file system's words.
    """
    try:
        yield
    except OSError as error:
        raise FundamentaLLMError(f"{path} cannot be written: {error}.") from error


FAILED, WRONG_CONFIG, DIVERGED, START_AGAIN, INTERRUPTED = 1, 2, 3, 75, 130
"""Exit codes besides 0. 75 is EX_TEMPFAIL of sysexits.h, "try again later"; 130 what a shell says of a Ctrl-C."""


def exit_code(error: BaseException) -> int:
    """The exit code of a process that an error ends."""
    if isinstance(error, ConfigError):
        return WRONG_CONFIG
    if isinstance(error, TrainingError):
        return DIVERGED
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED


def report(error: FundamentaLLMError) -> int:
    """Print an error as a command line shows it and return its exit code.

    Launched processes find the same mistakes; only the first prints them, or the first that is left.
    """
    text = f"error: {error}"
    if isinstance(error, ConfigError):
        count = len(error.problems)
        title = "1 setting is wrong:" if count == 1 else f"{count} settings are wrong:"
        text = "\n".join([title, *(f"  - {problem}" for problem in error.problems)])
    lost = error.ranks if isinstance(error, ProcessLostError) else []
    first = next(rank for rank in itertools.count() if rank not in lost)
    if os.environ.get("RANK", "0") == str(first):
        print(text, file=sys.stderr)
    return exit_code(error)
