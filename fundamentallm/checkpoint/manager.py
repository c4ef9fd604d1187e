"""Save, find, load and delete checkpoints. docs/checkpoint-format.md describes their files."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from fundamentallm.atomic import sync, sync_pending
from fundamentallm.checkpoint.manifest import (
    MANIFEST,
    NAME,
    describe,
    is_ours,
    read_manifest,
    total_size,
    verify,
    write_manifest,
)
from fundamentallm.checkpoint.mirror import NEWNESS, Mirror
from fundamentallm.checkpoint.reading import explained, load_checkpoint
from fundamentallm.checkpoint.snapshot import Snapshot, write_tensors
from fundamentallm.config.schema import TrainingConfig
from fundamentallm.config.units import size_text
from fundamentallm.config.validation import range_problems
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import CheckpointError, FundamentaLLMError, raise_all

logger = logging.getLogger(__name__)

ADVICE = "Free some space, or choose another training.checkpoint_dir (on several machines, a folder that they share)."
HIDDEN = re.compile(r"\.(staging|replaced|deleting)-(.+)-[0-9a-f]{12}")
"""Names of the folders that a save uses for a moment."""


class CheckpointManager:
    """Saves, finds, loads and deletes the checkpoints of one directory.

    Args:
        checkpoint_dir: the directory; created by the first save.
        keep_last_n: number of newest checkpoints to keep, at least 1. Older ones are deleted after each save, except
            the best, the last with finite weights, and any folder that contains other files.
        group: the processes that save a sharded state together. Each of them calls every method that saves. None: this
            process saves alone.

    Examples:
        >>> import torch
        >>> from fundamentallm import CheckpointManager
        >>> manager = CheckpointManager("checkpoints", keep_last_n=2)
        >>> state = {"model_state_dict": {"weight": torch.ones(2)}, "note": "anything that JSON can hold"}
        >>> for step in (1, 2, 3):
        ...     _ = manager.save(state, f"step_{step}", is_best=step == 1)
        >>> sorted(path.name for path in manager.checkpoint_dir.iterdir())  # the best is kept too
        ['step_1', 'step_2', 'step_3']
        >>> manager.load(manager.get_latest())["note"]
        'anything that JSON can hold'
    """

    def __init__(
        self, checkpoint_dir: Path | str, keep_last_n: int = TrainingConfig.keep_last_n, group: HostGroup | None = None
    ) -> None:
        raise_all(range_problems(keep_last_n=keep_last_n))
        self.checkpoint_dir, self.keep_last_n = Path(checkpoint_dir), keep_last_n
        self.group = group or HostGroup(alone=True)
        self.seconds = 0.0  # that the last save took to write
        self._writer: threading.Thread | None = None
        self.error: BaseException | None = None  # of the last save in the background, which `wait` raises
        self._buffers: Mapping[str, Tensor] = {}
        self.mirror = Mirror(self.checkpoint_dir, self._found)  # without a URL

    # ---- saving ------------------------------------------------------------------------------------------

    def save(
        self,
        checkpoint: Mapping[str, Any],
        name: str = "checkpoint",
        is_best: bool = False,
        files: Mapping[str, str] | None = None,
    ) -> Path:
        """Write a checkpoint, then delete old ones. Returns its directory.

        Args:
            checkpoint: nested dicts, lists and tuples of tensors, numbers, text and None. The flat dict of tensors
                under 'model_state_dict' is stored in model.safetensors.
            name: of its directory; an existing checkpoint of this name is replaced.
            is_best: whether it is the best so far.
            files: further text files, by name.

        Raises:
            CheckpointError: if the name would leave the directory, a value is neither a tensor nor JSON, or the files
                cannot be written. Existing checkpoints are unchanged then.
        """
        self.save_in_background(checkpoint, name, is_best, files)
        self.wait()
        return self.checkpoint_dir / name

    def save_in_background(
        self, checkpoint: Mapping[str, Any], name: str, is_best: bool = False, files: Mapping[str, str] | None = None
    ) -> None:
        """Copy the state to memory, and write it as `save` does in a thread. Waits for the previous save first."""
        self.wait()
        with self.group.barrier_with_errors():
            snapshot = Snapshot(checkpoint, name, is_best, files or {}, self.group, self._buffers)
        self._buffers = snapshot.copies
        # A daemon does not keep a process alive that is to end at once. What it leaves unfinished costs no checkpoint.
        self._writer = threading.Thread(target=self._try_to_write, args=(snapshot,), name="checkpoint", daemon=True)
        self._writer.start()

    def wait(self) -> None:
        """Wait for the save in the background. Raises CheckpointError if it failed."""
        if self._writer is not None:
            self._writer.join()
        error, self.error = self.error, None
        if error is not None:
            raise error

    def check_space(self, num_bytes: int) -> None:
        """Raises CheckpointError if the disk has no room for a checkpoint of this size."""
        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.checkpoint_dir).free
        if free < num_bytes:
            sizes = f"needs room for {size_text(num_bytes)}, and {size_text(free)} are free"
            raise CheckpointError(f"{self.checkpoint_dir} {sizes}. {ADVICE}")

    def _try_to_write(self, snapshot: Snapshot) -> None:
        started = time.monotonic()
        try:
            self._write(snapshot)
            if self.group.rank == 0:
                self.rotate()
                self.mirror.request()
        except BaseException as error:  # raised again by `wait` in the training thread
            self.error = error
            if isinstance(error, (OSError, SafetensorError)) or type(error) is FundamentaLLMError:  # another process's
                text = f"cannot write checkpoint {snapshot.name!r} in {self.checkpoint_dir}: {error}. {ADVICE}"
                self.error = CheckpointError(text)
                self.error.__cause__ = error
            if self.group.rank == 0:
                with contextlib.suppress(OSError):
                    self.recover()
        self.seconds = time.monotonic() - started

    def _write(self, snapshot: Snapshot) -> None:
        """Stage, sync and publish a checkpoint, on all processes that save together."""
        staging = self.group.from_main(lambda: _hidden("staging", self.checkpoint_dir / snapshot.name))
        # tempfile.mkdtemp would make the checkpoint unreadable for other users.
        self.group.from_main(lambda: staging.mkdir(parents=True))
        with self.group.barrier_with_errors():
            for file, tensors in snapshot.tensors.items():
                write_tensors(staging / file, tensors, snapshot.info)
            for name, text in snapshot.texts.items():
                (staging / name).write_text(text, encoding="utf-8")
            mine = describe(staging, [*snapshot.tensors, *snapshot.texts]), snapshot.is_finite
        written = self.group.all_gather(mine)
        self.group.from_main(lambda: self._publish(snapshot, staging, written))

    def _publish(self, snapshot: Snapshot, staging: Path, written: list[tuple[dict[str, Any], bool]]) -> None:
        """Complete a staged checkpoint and rename it. `written`: of each process, manifest entries and finiteness."""
        files = {name: entry for entries, _ in written for name, entry in entries.items()}
        sequence = max((manifest["sequence"] for _, manifest in self._found()), default=0) + 1
        sync_pending()  # the run's log and other files that the checkpoint counts on
        about = {"run": self.mirror.run() or uuid.uuid4().hex, "is_finite": all(finite for _, finite in written)}
        write_manifest(staging, files, sequence=sequence, **about, **snapshot.about)
        self._put_in_place(staging, self.checkpoint_dir / snapshot.name)

    def _put_in_place(self, staging: Path, path: Path) -> None:
        """Rename a complete checkpoint to `path`, in place of one that is there."""
        aside = _hidden("replaced", path)
        if os.path.lexists(path):
            if path.is_symlink() or not is_ours(path):
                raise CheckpointError(f"{path} is in the way, and is not a checkpoint to replace; move it away.")
            path.rename(aside)  # an error or a kill here: see `recover`
        staging.rename(path)
        sync(self.checkpoint_dir)
        if aside.exists():
            shutil.rmtree(aside)

    # ---- deleting and recovering ---------------------------------------------------------------------------

    def rotate(self) -> None:
        """Delete old checkpoints. Call it only if the newest one is known to be intact."""
        found = self._found()
        last_finite = [path for path, manifest in found if manifest["is_finite"]][-1:]
        keep = {path for path, _ in found[-self.keep_last_n :]} | {self.get_best(), *last_finite}
        waiting = {path for path, _ in self.mirror.missing()}
        for path, manifest in sorted(found, key=lambda one: one[0] in waiting):
            try:
                others = {entry.name for entry in path.iterdir()} - {*manifest["files"], MANIFEST}
                if path in waiting - keep:  # kept too, unless the next checkpoint would have no room
                    room = 1.5 * total_size(found[-1][1])  # files take whole blocks
                    if shutil.disk_usage(self.checkpoint_dir).free > room:
                        continue
                    logger.warning("the disk is almost full: %s goes, which is not at the mirror yet", path)
                if path not in keep and not others:
                    # Renamed first, so that a kill while it is deleted leaves no incomplete checkpoint under its name.
                    shutil.rmtree(path.rename(_hidden("deleting", path)))
                elif path not in keep:
                    logger.warning("%s is kept: it holds files that are not the checkpoint's: %r", path, min(others))
            except OSError as error:  # the new checkpoint is there all the same
                logger.warning("the old checkpoint %s cannot be deleted: %s", path, error)

    def recover(self) -> list[str]:
        """Clean up after processes that were killed while they saved, and no longer are; returns messages."""
        messages = []
        for folder in sorted(self.checkpoint_dir.glob("*")):
            match = HIDDEN.fullmatch(folder.name)
            if match is None or folder.is_symlink() or not folder.is_dir():
                continue
            purpose, name = match.groups()
            if purpose == "replaced" and not (self.checkpoint_dir / name).exists():
                folder.rename(self.checkpoint_dir / name)
                messages.append(f"restored {name}, which a killed process was replacing")
            else:
                shutil.rmtree(folder)
                messages.append(f"removed {folder.name}, left by a killed process")
        return messages

    # ---- finding and loading -----------------------------------------------------------------------------

    def _found(self, skipped: list[str] | None = None) -> list[tuple[Path, dict[str, Any]]]:
        """Returns checkpoints and their manifests, oldest first; adds to `skipped` why some have no good manifest."""
        found = []
        for path in sorted(self.checkpoint_dir.glob("*")):
            if NAME.fullmatch(path.name) and not path.is_symlink() and is_ours(path):
                try:
                    found.append((path, read_manifest(path)))
                except CheckpointError as error:
                    if skipped is not None:
                        skipped.append(str(error))
        return sorted(found, key=lambda item: item[1]["sequence"])

    def get_latest(self) -> Path | None:
        """Returns the checkpoint that was saved last, or None."""
        return next((path for path, _ in reversed(self._found())), None)

    def get_best(self) -> Path | None:
        """Returns the last checkpoint that was saved as the best, or None."""
        return next((path for path, manifest in reversed(self._found()) if manifest["is_best"]), None)

    def newest_intact(self) -> tuple[Path | None, list[str]]:
        """Returns (the newest checkpoint whose every byte verifies or None, why others were skipped).

        A checkpoint whose weights are not finite is taken only if no other is intact.
        """
        skipped: list[str] = []
        found = sorted(self._found(skipped), key=lambda item: bool(item[1]["is_finite"]))
        for path, manifest in reversed(found):
            try:
                verify(path)
            except CheckpointError as error:
                skipped.append(str(error))
                continue
            if manifest["is_finite"]:
                skipped += [f"{other}: its weights are not finite." for other, about in found if not about["is_finite"]]
            return path, skipped
        return None, skipped

    def newest_anywhere(self, say: Callable[[str], None]) -> tuple[Path | None, list[str]]:
        """Returns the same after copying the mirror's newest and best. Raises CheckpointError if there is none."""
        mirror, best, (newest, skipped) = self.mirror, self.get_best(), self.newest_intact()
        try:
            with explained(mirror.url, "the mirror cannot be read"):
                for name, manifest in mirror.newest_first(skipped, say) if mirror.url else []:
                    is_newer = newest is None or NEWNESS(manifest) > NEWNESS(read_manifest(newest))
                    is_best = best is None or manifest["sequence"] > read_manifest(best)["sequence"]
                    if not is_newer and not (is_best and manifest["is_best"]):
                        continue
                    self.check_space(size := total_size(manifest))
                    say(f"copying {name} ({size_text(size)}) from {mirror.url}")
                    path, staging = self.checkpoint_dir / name, _hidden("staging", self.checkpoint_dir / name)
                    mirror.fetch(name, manifest, staging)
                    try:
                        verify(staging)
                    except CheckpointError as error:
                        shutil.rmtree(staging)
                        skipped.append(str(error).replace(str(staging), f"{mirror.url}/{name}"))
                        continue
                    if is_newer:
                        mirror.restore_logs(name)  # first, so that no kill leaves the checkpoint without them
                    self._put_in_place(staging, path)
                    newest, best = path if is_newer else newest, path if manifest["is_best"] else best
        except CheckpointError as error:
            if newest is None:
                raise CheckpointError(f"{error} It may hold this run. training.mirror: null begins without.") from error
            say(f"warning: {error} Continuing from {newest}, although the mirror may hold a newer checkpoint.")
        return newest, skipped

    def load(self, path: Path | str) -> dict[str, Any]:
        """Load what was saved at `path`, after every byte of it is verified. Tensors are on the CPU.

        Raises CheckpointNotFoundError if there is no directory, and CheckpointError with the name of a damaged file.
        """
        return load_checkpoint(Path(path))


def _hidden(purpose: str, path: Path) -> Path:
    return path.with_name(f".{purpose}-{path.name}-{uuid.uuid4().hex[:12]}")


def checkpoints_folder(path: Path) -> Path:
    """Returns the folder of checkpoints below a run's output_dir; if there is none, `path` itself."""
    below = path / "checkpoints"
    return below if below.is_dir() and CheckpointManager(path).get_latest() is None else path
