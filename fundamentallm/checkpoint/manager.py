"""Checkpoints: safetensors and JSON in a directory that is whole or not there.

    step_00001000/
      model.safetensors      the entry `model_state_dict`, under transformers' parameter names
      training.safetensors   every other tensor, keyed by its path in the state (`tensor_files.py` shows how both
                             look where the tensors are sharded)
      state.json             everything that is no tensor, and where each tensor belongs
      config.json ...        further text files the caller gives (transformers' config, tokenizer.json)
      manifest.json          written last: size and SHA-256 of every file, place in the sequence, best or not

A checkpoint is staged in a hidden sibling directory, synced, and renamed. What exists, which is newest and
which is best are read from the disk, never from memory. No pickle: opening a stranger's checkpoint runs none
of their code.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from fundamentallm.checkpoint.manifest import (
    MANIFEST,
    NAME,
    STATE,
    describe,
    read_manifest,
    sync,
    verify,
    write_manifest,
)
from fundamentallm.checkpoint.reading import check_checkpoint, is_ours, load_checkpoint
from fundamentallm.checkpoint.snapshot import Snapshot, read_back, take_snapshot
from fundamentallm.checkpoint.tensor_files import write_tensors
from fundamentallm.config.schema import TrainingConfig
from fundamentallm.config.validation import range_problems
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import CheckpointError, ConfigError, FundamentaLLMError

logger = logging.getLogger(__name__)

HIDDEN = re.compile(r"\.(staging|replaced|deleting)-(.+)-[0-9a-f]{12}")
"""Folders in which checkpoints come and go; one that outlives its process is put in order by `recover`."""


class CheckpointManager:
    """Saves, finds, loads and rotates the checkpoints of one directory.

    Args:
        checkpoint_dir: the directory; created by the first save.
        keep_last_n: how many checkpoints to keep, besides the best and the last whose weights are finite. Older
            ones are deleted after each save, whatever their name; what is not a whole checkpoint of ours is never
            touched.
        group: the processes that save a sharded state together, each calling every method that saves; None: this
            process saves alone.

    Attributes:
        seconds: that the last save took to write.
        origin: a checkpoint here that is kept too, since a restart needs it; None: none.

    Raises:
        ConfigError: if keep_last_n is below 1.

    Examples:
        >>> import torch
        >>> from fundamentallm import CheckpointManager
        >>> manager = CheckpointManager("checkpoints", keep_last_n=2)
        >>> state = {"model_state_dict": {"weight": torch.ones(2)}, "note": "what JSON holds"}
        >>> for step in (1, 2, 3):
        ...     _ = manager.save(state, f"step_{step}", is_best=step == 1)
        >>> manager  # the best is kept too
        CheckpointManager('checkpoints', keep_last_n=2): step_1 (best), step_2, step_3
        >>> manager.load(manager.get_latest())["note"]
        'what JSON holds'
    """

    def __init__(
        self,
        checkpoint_dir: Path | str,
        keep_last_n: int = TrainingConfig.keep_last_n,
        group: HostGroup | None = None,
    ) -> None:
        if problems := range_problems(keep_last_n=keep_last_n):
            raise ConfigError(problems)
        self.checkpoint_dir, self.keep_last_n = Path(checkpoint_dir), keep_last_n
        self.group = group or HostGroup(alone=True)
        self.seconds = 0.0
        self.origin: Path | None = None
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._buffers: Mapping[str, Tensor] = {}

    def __repr__(self) -> str:
        best, found = self.get_best(), [path for path, _ in self._found()]
        names = ", ".join(path.name + " (best)" * (path == best) for path in found) or "none yet"
        return f"{type(self).__name__}({str(self.checkpoint_dir)!r}, keep_last_n={self.keep_last_n}): {names}"

    # ---- saving ------------------------------------------------------------------------------------------

    def save(
        self,
        checkpoint: Mapping[str, Any],
        name: str = "checkpoint",
        is_best: bool = False,
        files: Mapping[str, str] | None = None,
    ) -> Path:
        """Write a checkpoint and delete those that are neither recent nor best.

        Args:
            checkpoint: nested dicts, lists and tuples of tensors, numbers, text and None; the flat
                dict of tensors under 'model_state_dict' goes into model.safetensors.
            name: its directory; one that is there already is replaced.
            is_best: whether it is the best so far, by whatever measure the caller has.
            files: further text files, by name.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointError: if the name would leave the directory, a value is neither tensor nor JSON
                (naming its path), the disk has no room, or the files cannot be written; nothing is changed then.
        """
        self.wait()
        self._write(self._snapshot(checkpoint, name, is_best, files, copy=False))
        return self.checkpoint_dir / name

    def save_in_background(
        self,
        checkpoint: Mapping[str, Any],
        name: str,
        is_best: bool = False,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Like `save`, but returns once everything is copied to memory, which is kept for the next time; a thread does
        the rest, one at a time.

        Raises:
            CheckpointError: as `save` does, or because the save before could not be written.
        """
        self.wait()
        snapshot = self._snapshot(checkpoint, name, is_best, files, copy=True)
        # A daemon: whoever wants the process to end at once is not kept waiting, and loses no older checkpoint.
        self._writer = threading.Thread(target=self._try_to_write, args=(snapshot,), name="checkpoint", daemon=True)
        self._writer.start()

    @property
    def has_failed(self) -> bool:
        """Whether the last save in the background has failed; `wait` raises why."""
        return self._error is not None

    def wait(self) -> None:
        """Wait for the save in the background.

        Raises:
            CheckpointError: if it failed.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def check_space(self, num_bytes: int, copies: int = 1) -> None:
        """Refuse to begin what the disk has no room for.

        Raises:
            CheckpointError: with the numbers.
        """
        folder = self.checkpoint_dir.absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if free < num_bytes * copies:
            raise CheckpointError(
                f"{copies} checkpoint{'s' * (copies > 1)} of {num_bytes / 1e6:,.1f} MB need{'s' * (copies == 1)} "
                f"{num_bytes * copies / 1e6:,.1f} MB in {self.checkpoint_dir}, and {free / 1e6:,.1f} MB are free; "
                "free some, lower training.keep_last_n, or choose another training.checkpoint_dir."
            )

    def check_space_of_run(self, num_bytes: int, num_saves: int) -> None:
        """`check_space` for all checkpoints of `num_bytes` that are to be there at once, and are not yet; at most
        `num_saves` are still to come.

        Raises:
            CheckpointError: with the numbers.
        """
        at_once = self.keep_last_n + 2  # with the best, and a new one before an old one goes
        self.check_space(num_bytes, min(max(at_once - len(self._found()), 1), max(num_saves, 1)))

    def _try_to_write(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:  # kept for the thread that trains
            self._error = error

    def _snapshot(
        self, checkpoint: Mapping[str, Any], name: str, is_best: bool, files: Mapping[str, str] | None, copy: bool
    ) -> Snapshot:
        part = None if self.group.size == 1 else (self.group.rank, self.group.size)
        with self.group.barrier_with_errors():
            snapshot = take_snapshot(checkpoint, name, is_best, files or {}, copy, part, self._buffers)
        if copy:
            self._buffers = snapshot.copies
        return snapshot

    def _write(self, snapshot: Snapshot) -> None:
        """Stage, sync, read back, publish; then delete what is old."""
        started, group = time.monotonic(), self.group
        staging = self.checkpoint_dir / group.all_gather(f".staging-{snapshot.name}-{uuid.uuid4().hex[:12]}")[0]
        try:
            try:
                with group.barrier_with_errors():
                    if group.rank == 0:
                        self.check_space(snapshot.num_bytes)
                        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
                        # tempfile.mkdtemp would close the folder to everyone else, and with it the checkpoint.
                        staging.mkdir()
                with group.barrier_with_errors():
                    part = self._write_tensors(snapshot, staging), snapshot.is_finite
                parts = group.all_gather(part)
                with group.barrier_with_errors():
                    if group.rank == 0:
                        files = {name: entry for entries, _ in parts for name, entry in entries.items()}
                        self._complete(snapshot, staging, files, all(is_finite for _, is_finite in parts))
            except BaseException:
                if group.rank == 0:
                    shutil.rmtree(staging, ignore_errors=True)
                raise
        except CheckpointError:
            raise
        except (OSError, SafetensorError, FundamentaLLMError) as error:  # the last is another process's
            raise CheckpointError(
                f"cannot write checkpoint {snapshot.name!r} in {self.checkpoint_dir}: {error}."
            ) from error
        if group.rank == 0:
            self.rotate()
        self.seconds = time.monotonic() - started

    def _write_tensors(self, snapshot: Snapshot, staging: Path) -> dict[str, Any]:
        """Write, and read back, this process's tensors; what the manifest says of their files."""
        if not staging.is_dir():
            raise CheckpointError(
                f"{self.checkpoint_dir} is not the same folder on all machines; choose a training.checkpoint_dir (or "
                "output_dir) that all of them see, since each process writes what it holds of the weights."
            )
        for file, tensors in snapshot.tensors.items():
            write_tensors(staging / file, tensors, snapshot.places)
        entries = describe(staging, snapshot.tensors)
        read_back(staging, snapshot.tensors, {})
        return entries

    def _complete(self, snapshot: Snapshot, staging: Path, files: dict[str, Any], is_finite: bool) -> None:
        """Add all that is no tensor, the manifest last, and publish."""
        texts = {**snapshot.files, STATE: json.dumps(snapshot.state, indent=1, allow_nan=False)}
        for name, text in texts.items():
            (staging / name).write_text(text, encoding="utf-8")
        files = files | describe(staging, texts)
        read_back(staging, {}, texts)
        sequence = max((manifest["sequence"] for _, manifest in self._found()), default=0) + 1
        write_manifest(staging, files, sequence=sequence, is_finite=is_finite, **snapshot.about)
        self._publish(staging, snapshot.name)

    def _publish(self, staging: Path, name: str) -> None:
        """Give the staged checkpoint its name. An intact one that has the name steps aside first, and goes last."""
        path = self.checkpoint_dir / name
        aside = None
        if path.exists() or path.is_symlink():
            if not is_ours(path):
                raise CheckpointError(f"{path} is in the way, and is no checkpoint to replace; move it away.")
            try:
                verify(path)
                aside = self._hidden_folder(f"replaced-{name}") / name
                path.rename(aside)
            except CheckpointError:  # somebody may want to see what is left of it, so it is never deleted
                path.rename(self.checkpoint_dir / f"{name}~damaged-{uuid.uuid4().hex[:6]}")
        try:
            staging.rename(path)
        except BaseException:
            if aside is not None:
                aside.rename(path)
                aside.parent.rmdir()
            raise
        sync(self.checkpoint_dir)
        if aside is not None:
            shutil.rmtree(aside.parent)

    def _hidden_folder(self, purpose: str) -> Path:
        path = self.checkpoint_dir / f".{purpose}-{uuid.uuid4().hex[:12]}"
        path.mkdir()
        return path

    def rotate(self) -> None:
        """Delete what is neither among the last nor the best; for when the newest is known to be whole."""
        try:
            self._delete_old()
        except (OSError, CheckpointError) as error:  # the new one is there all the same; the next start goes on here
            logger.warning("an old checkpoint in %s cannot be deleted: %s", self.checkpoint_dir, error)

    def _delete_old(self) -> None:
        found = self._found()
        last_finite = [path for path, manifest in found if manifest["is_finite"]][-1:]
        keep = {path for path, _ in found[-self.keep_last_n :]} | {self.get_best(), *last_finite, self.origin}
        for path, manifest in found:
            if path in keep:
                continue
            if others := sorted({entry.name for entry in path.iterdir()} - {*manifest["files"], MANIFEST}):
                logger.warning("%s is kept: it holds files that are not ours, such as %s", path, others[0])
            else:
                # Renamed first, so that a kill in between leaves no half of a checkpoint under its name.
                doomed = self._hidden_folder(f"deleting-{path.name}")
                shutil.rmtree(path.rename(doomed / path.name))
                doomed.rmdir()

    def recover(self) -> list[str]:
        """Put in order what a process left that ended while it saved; says what it did.

        Only for whoever knows that no process is saving here.
        """
        done = []
        for folder in self._entries():
            match = HIDDEN.fullmatch(folder.name)
            if match is None or folder.is_symlink() or not folder.is_dir():
                continue
            purpose, name = match.groups()
            path, kept = self.checkpoint_dir / name, folder / name
            if purpose == "replaced" and kept.is_dir() and not path.exists():
                kept.rename(path)
                folder.rmdir()
                done.append(f"put {name} back, which was being replaced when its process ended")
            else:
                shutil.rmtree(folder)
                was = "an unfinished checkpoint" if purpose == "staging" else "the rest of an old checkpoint"
                done.append(f"removed {was}, {folder.name}, of a process that ended")
        return done

    # ---- finding and loading -----------------------------------------------------------------------------

    def _entries(self) -> list[Path]:
        """What is in the directory, by name; nothing where there is none.

        Raises:
            CheckpointError: if it cannot be read, which is not the same.
        """
        try:
            return sorted(self.checkpoint_dir.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(f"{self.checkpoint_dir} cannot be read: {error}.") from error

    def _found(self) -> list[tuple[Path, dict[str, Any]]]:
        """Complete checkpoints and their manifests, oldest first."""
        found = []
        for path in self._entries():
            if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                with contextlib.suppress(CheckpointError):
                    found.append((path, read_manifest(path)))
        return sorted(found, key=lambda item: item[1]["sequence"])

    def get_latest(self) -> Path | None:
        """The checkpoint saved last, or None."""
        found = self._found()
        return found[-1][0] if found else None

    def get_best(self) -> Path | None:
        """The last checkpoint that was saved as the best, or None."""
        return next((path for path, manifest in reversed(self._found()) if manifest["is_best"]), None)

    def newest_intact(self) -> tuple[Path | None, list[str]]:
        """(the newest intact checkpoint or None, why others were passed over), every byte of it verified.

        One whose weights are not finite comes after all others.
        """
        passed_over = []
        for path in self._entries():
            if NAME.fullmatch(path.name) and is_ours(path):
                try:
                    read_manifest(path)
                except CheckpointError as error:
                    passed_over.append(str(error))
        newest_first = self._found()[::-1]
        finite = [path for path, manifest in newest_first if manifest["is_finite"]]
        others = [path for path, manifest in newest_first if not manifest["is_finite"]]
        if finite:
            passed_over += [f"{path}: its weights are not finite." for path in others]
        for path in finite + others:
            try:
                check_checkpoint(path)
            except CheckpointError as error:
                passed_over.append(str(error))
            else:
                return path, passed_over
        return None, passed_over

    def load(self, path: Path | str) -> dict[str, Any]:
        """What was saved at `path`, tensors on the CPU, every byte verified.

        Raises:
            CheckpointNotFoundError: if there is no directory at the path.
            CheckpointError: if the checkpoint is incomplete or damaged, naming the file.
        """
        return load_checkpoint(Path(path))


def checkpoints_folder(path: Path) -> Path:
    """The folder of checkpoints that `path` means: itself, or the one in a run's output_dir."""
    below = path / "checkpoints"
    return below if below.is_dir() and CheckpointManager(path).get_latest() is None else path
