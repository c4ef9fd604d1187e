"""In a training process: counts what it does, and kills it at a chosen event.

An event is a forward pass, or a change in the run's folder, as Python's audit hooks see it. A file event comes before
the operation, so a kill at a rename leaves the old name.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fundamentallm import Callback, Trainer

LAST_STEP = 22
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FORWARD, VALIDATION_FORWARD = "forward", "forward in validation"


class Instant(NamedTuple):
    """When, and in which process, a start is killed.

    Attributes:
        label: of the events that count; "" for all; None: the instant is a time.
        nth: number of the event, from 1; or milliseconds after the start.
        rank: of the process.
        number: of the signal.
    """

    label: str | None
    nth: int = 1
    rank: int = 0
    number: signal.Signals = signal.SIGKILL


class Trap:
    """Counts the events of this process, and sends it a signal at the chosen one."""

    armed: Trap | None = None

    def __init__(self, folder: Path, instant: Instant | None, last: Any) -> None:
        self._counts: Counter[str] = Counter()
        self._prefix, self._instant, self._num_matching = f"{folder}{os.sep}", instant, 0
        self._last = last
        """Memory that the process shares with the harness: its last event."""

    def arm(self) -> None:
        Trap.armed = self
        sys.addaudithook(self._on_audit)

    def disarm(self, counts: Path) -> None:
        Trap.armed = None
        counts.write_text(json.dumps(self._counts))

    def hit(self, label: str) -> None:
        self._last.value = label.encode()
        self._counts[label] += 1
        if self._instant is not None and self._instant.label in ("", label):
            self._num_matching += 1
            if self._num_matching == self._instant.nth:
                os.kill(os.getpid(), self._instant.number)

    def _on_audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if Trap.armed is not self:
            return
        if event == "open":
            path, _, flags = arguments
            label, paths = ("write" if flags & WRITING else "read"), [(path, -1)]
        elif event == "os.rename":
            source, target, source_at, target_at = arguments
            label, paths = "rename", [(source, source_at), (target, target_at)]
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            label = event.partition(".")[2]
            paths = [(arguments[0], arguments[-1] if event != "shutil.rmtree" else -1)]
        else:
            return
        full = [_full_path(path, at) for path, at in paths]
        if all(path.startswith(self._prefix) for path in full):
            self.hit(f"{label} {' -> '.join(general(path.removeprefix(self._prefix)) for path in full)}")


class Marks(Callback):
    """Reports the forward passes of a run to the trap, if there is one."""

    def __init__(self) -> None:
        self._watches_model = False

    def on_epoch_begin(self, trainer: Trainer) -> None:
        if not self._watches_model:  # not earlier: the check of the first batch looks like a validation
            trainer.model.register_forward_hook(_on_forward)
            self._watches_model = True


def _on_forward(model: nn.Module, inputs: object, outputs: object) -> None:
    if Trap.armed is not None:
        Trap.armed.hit(FORWARD if model.training else VALIDATION_FORWARD)


def _full_path(path: object, folder_handle: int | None) -> str:
    if not isinstance(path, (str, bytes, os.PathLike)):  # a file that is open already
        return ""
    text = os.fsdecode(path)
    if folder_handle is not None and folder_handle >= 0:  # shutil.rmtree works relative to open folders
        text = os.path.join(os.readlink(f"/proc/self/fd/{folder_handle}"), text)
    return os.path.abspath(text)


def general(path: str) -> str:
    """Returns a path without what differs from case to case."""
    path = re.sub(r"^cache/\.staging-\w+", "cache/.staging", path)
    path = re.sub(r"^cache/[0-9a-f]{32}", "cache/KEY", path)
    path = re.sub(r"step_(\d+)", lambda m: "step_LAST" if int(m[1]) == LAST_STEP else "step_N", path)
    path = re.sub(r"before-[0-9a-f]{8}", "before-N", path)
    return re.sub(r"-[0-9a-f]{12}(?=/|$)", "", path)
