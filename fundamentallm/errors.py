"""What a user can get wrong, as exceptions that say what was got, what is allowed and what to do."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any


class FundamentaLLMError(Exception):
    """Base of every error this package raises on purpose.

    Examples:
        >>> from fundamentallm import CheckpointManager, FundamentaLLMError
        >>> try:
        ...     CheckpointManager("checkpoints").load("checkpoints/step_00000100")
        ... except FundamentaLLMError as error:
        ...     print(error)
        checkpoints/step_00000100: there is no checkpoint directory here.
    """


class Problem(str):
    """One mistake in a config: a sentence for people, with its facts as attributes for programs.

    Args:
        setting: dotted name, such as training.learning_rate; "" if no setting is to blame.
        value: the value given.
        allowed: the allowed values, in words.
        advice: what to do, as a sentence.
        reason: why the value does not fit, as a clause: "which has 12 bytes".

    Examples:
        >>> from fundamentallm.errors import Problem
        >>> problem = Problem("batch_size", 0, allowed="at least 1").within("training")
        >>> print(problem)
        training.batch_size is 0; allowed: at least 1.
        >>> problem.setting, problem.value
        ('training.batch_size', 0)
    """

    __slots__ = ("advice", "allowed", "reason", "setting", "value")
    setting: str
    value: Any
    allowed: str
    advice: str
    reason: str

    def __new__(cls, setting: str, value: Any = None, allowed: str = "", advice: str = "", reason: str = "") -> Problem:
        """Put the sentence together."""
        fact = (
            f"{setting} is {value!r}" + (f", {reason}" if reason else "") + (f"; allowed: {allowed}" if allowed else "")
        )
        self = super().__new__(cls, " ".join(text for text in (f"{fact}." if setting else "", advice) if text))
        self.setting, self.value, self.allowed, self.advice, self.reason = setting, value, allowed, advice, reason
        return self

    def within(self, section: str) -> Problem:
        """Returns the same problem of a setting in `section`."""
        return Problem(f"{section}.{self.setting}", self.value, self.allowed, self.advice, self.reason)


class ConfigError(FundamentaLLMError, ValueError):
    """One or more settings are wrong. `problems` lists them all; each is a `Problem` or a sentence.

    Examples:
        >>> from fundamentallm import ConfigError, TrainingConfig
        >>> try:
        ...     TrainingConfig(optimizer="adamv", learning_rate=-1.0)
        ... except ConfigError as error:
        ...     print(str(error))
        learning_rate is -1.0; allowed: greater than 0.
        optimizer is 'adamv'; allowed: ..., or 'module:name'. Did you mean 'adam'?
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class CheckpointError(FundamentaLLMError):
    """A checkpoint cannot be written, is damaged, or does not fit the run.

    Examples:
        >>> from fundamentallm import CheckpointManager
        >>> CheckpointManager("checkpoints").save({"model_state_dict": {}, "made": print})
        Traceback (most recent call last):
        fundamentallm.errors.CheckpointError: made is a builtins.builtin_function_or_method; allowed: tensors, and ...
    """


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the given path."""


class TrainingError(FundamentaLLMError):
    """Training cannot go on: the loss or the gradient stopped being finite.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from fundamentallm import Trainer, TrainingConfig
        >>> numbers = torch.arange(300).reshape(30, 10) % 2
        >>> loader = DataLoader(TensorDataset(numbers, (numbers + 1) % 2), batch_size=2)
        >>> config = TrainingConfig(max_epochs=5, max_bad_steps=3)
        >>> trainer = Trainer(nn.Embedding(2, 2), config, loader, callbacks=[], loss_fn=lambda x, _: x.sum() / 0)
        >>> trainer.train()
        Traceback (most recent call last):
        fundamentallm.errors.TrainingError: the loss or the gradient was not finite in 3 optimizer steps in a row; ...
    """


class ProcessLostError(FundamentaLLMError):
    """Processes of the run are gone, and the others cannot go on without them; `ranks` says which."""

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = list(ranks)


class RunInProgressError(FundamentaLLMError):
    """Another process runs in the same folder.

    Examples:
        >>> from fundamentallm import FundamentaLLMError, RunInProgressError
        >>> issubclass(RunInProgressError, FundamentaLLMError)
        True
    """


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
