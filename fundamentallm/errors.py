"""Errors of the package, and how a command line reports them: what was given, what is allowed, what to do."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any


class FundamentaLLMError(Exception):
    """Base class of every error that this package raises on purpose. `exit_code` is that of a process that it ends."""

    exit_code = 1


class Problem(str):
    """One mistake in a config: a sentence for people, with its facts as attributes for programs.

    `setting` is a dotted name, or "" if none is to blame. `allowed` says in words which values are, `advice` what to
    do, and `reason` why the value does not fit: "which has 12 bytes". `text` replaces "is VALUE, REASON".
    """

    setting = allowed = advice = reason = text = ""
    value: Any = None

    def __new__(
        cls, setting: str, value: Any = None, allowed: str = "", advice: str = "", reason: str = "", text: str = ""
    ) -> Problem:
        """Put the sentence together."""
        fact = text
        if setting:
            fact = f"{setting}: {text}" if text else f"{setting} is {value!r}" + (f", {reason}" if reason else "")
        fact += f"; allowed: {allowed}" if allowed else ""
        self = super().__new__(cls, f"{fact}. {advice}".strip() if fact else advice)
        self.setting, self.value, self.allowed = setting, value, allowed
        self.advice, self.reason, self.text = advice, reason, text
        return self

    def within(self, section: str) -> Problem:
        """Returns the same problem of a setting in `section`."""
        return Problem(**vars(self) | {"setting": f"{section}.{self.setting}" if self.setting else ""})


class ConfigError(FundamentaLLMError, ValueError):
    """One or more settings are wrong. `problems` lists them all; a plain sentence becomes a `Problem` without setting.

    Examples:
        >>> from fundamentallm import TrainingConfig
        >>> TrainingConfig(optimizer="adamv")
        Traceback (most recent call last):
        fundamentallm.errors.ConfigError: optimizer is 'adamv'; allowed: ... Did you mean 'adam'?
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        listed = [problems] if isinstance(problems, str) else problems
        self.problems = [one if isinstance(one, Problem) else Problem("", advice=one) for one in listed]
        super().__init__("\n".join(self.problems))


def raise_all(problems: Sequence[str]) -> None:
    """Raise a ConfigError with the problems, if there are any."""
    if problems:
        raise ConfigError(problems)


@contextlib.contextmanager
def collected(problems: list[Problem], within: str = "") -> Iterator[None]:
    """Add the problems of a ConfigError in the block to the list, as those of a section `within`, and go on."""
    try:
        yield
    except ConfigError as error:
        problems += [problem.within(within) for problem in error.problems] if within else error.problems


class CheckpointError(FundamentaLLMError):
    """A checkpoint cannot be written, is damaged, or does not fit the run."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the given path."""


class TrainingError(FundamentaLLMError):
    """Training cannot continue: the loss or the gradient stopped being finite. The exit code is 3."""

    exit_code = 3


class ProcessLostError(FundamentaLLMError):
    """Processes of the run have died, and the others cannot continue without them; `ranks` lists the dead ones."""

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = list(ranks)


class RunInProgressError(FundamentaLLMError):
    """Another process is running in the same folder."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a command, or a launch outside of the training loop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name} received")
        self.exit_code = 128 + number  # as a shell reports it


@contextlib.contextmanager
def writing(path: object, advice: str = "") -> Iterator[None]:
    """Turn an OSError in the block into a FundamentaLLMError that names the file; a full disk's own names none."""
    try:
        yield
    except OSError as error:
        raise FundamentaLLMError(f"{path} cannot be written: {error}. {advice}".rstrip()) from error


START_AGAIN = 75  # exit code of a run that the same command resumes: EX_TEMPFAIL of sysexits.h


def exit_code(error: BaseException) -> int:
    """Returns the exit code of a process that ends with `error`."""
    return getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)


def printable(text: str, keep: str = "\n\t") -> str:
    """Returns text from outside that no terminal obeys: control characters are escaped, except those in `keep`."""
    keep += "\u200c\u200d\u00ad"  # joiners and hyphens of some scripts and emoji
    shown = {c for c in {*text} if c.isprintable() or c in keep or unicodedata.category(c) == "Zs"}  # any space
    return "".join(c if c in shown else ascii(c)[1:-1] for c in text)


class _Dropping(io.FileIO):
    """An open file that drops what it cannot take: its reader is gone, or the disk is full."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def open_output(drops: bool = False) -> None:
    """Let stdout and stderr escape what they cannot encode and, with `drops`, drop what cannot be written."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed: otherwise a file of the run would get the number, and what libraries print
            while os.open(os.devnull, os.O_RDWR) < number:  # stdin may be closed too
                pass
        elif stream is not getattr(sys, f"__{name}__"):  # a notebook's
            continue
        if drops or stream is None:
            file, encoding = _Dropping(number, "w", closefd=False), getattr(stream, "encoding", "utf-8")
            stream = io.TextIOWrapper(io.BufferedWriter(file), encoding, line_buffering=True)
            setattr(sys, name, stream)
        stream.reconfigure(errors="backslashreplace")


def report(error: FundamentaLLMError) -> int:
    """Print an error to stderr, on the lowest living rank: all find the same mistakes. Returns its exit code."""
    text = f"error: {error}"
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        text = f"{len(error.problems)} settings are wrong:" + "".join(f"\n  - {one}" for one in error.problems)
    lost = getattr(error, "ranks", [])
    if int(os.environ.get("RANK", "0")) == min({*range(len(lost) + 1)} - {*lost}):
        text = printable(text)
        print(text, file=sys.stderr)
        restarts, most = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
        if restarts == most:  # the launcher will not restart the processes
            print_last(text)
    return exit_code(error)


def is_launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process, not as a child of a notebook or a test."""
    variables = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"}
    return multiprocessing.parent_process() is None and not variables.isdisjoint(os.environ)


def print_last(text: str) -> None:
    """Prints text to stderr again after the traceback with which a launcher ends."""
    if is_launched() and hasattr(os, "pidfd_open"):  # Linux
        launcher = os.pidfd_open(os.getppid())
        wait = f"import select, sys; select.select([{launcher}], [], [], 60)[0] and print(sys.argv[1], file=sys.stderr)"
        command = [sys.executable, "-I", "-S", "-c", wait, text[:10_000].replace("\0", "")]
        subprocess.Popen(command, pass_fds=[launcher], stdout=subprocess.DEVNULL, start_new_session=True)
