"""A mirror: copies of a folder's checkpoints at a URL that fsspec opens.

A checkpoint at the mirror is complete if its manifest.json is there. It is written last, after every other file was
read back and had the size and SHA-256 that it states.
"""

import contextlib
import functools
import hashlib
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from fsspec import get_filesystem_class
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from fundamentallm.atomic import replacing, sync
from fundamentallm.checkpoint.manifest import MANIFEST, NAME, TENSORS, parse_manifest, sha256_of
from fundamentallm.errors import CheckpointError, ConfigError, Problem

LOGS = ".logs"
"""Folder at the mirror: by the name of a checkpoint, the logs as they were when it was copied."""


class Mirror:
    """Copies checkpoints to `url` in a thread, and reads them there. Only one process may copy.

    `found` returns the checkpoints of `folder` with their manifests, oldest first. They count on the lines of `logs`.
    Raises ConfigError as `check_url` does. Methods that read raise what fsspec raises.

    Attributes:
        copied: SHA-256 in the manifests of the checkpoints that are known to be at the mirror.
    """

    def __init__(
        self, url: str, folder: Path, found: Callable[[], list[tuple[Path, dict[str, Any]]]], logs: Collection[Path]
    ) -> None:
        check_url(url, folder)
        self.url, self._found, self.logs = url, found, logs
        self.copied, self._news, self._failure = set[str](), list[str](), None
        self._lock, self._thread, self._is_copying = threading.Lock(), threading.Thread(), False

    @functools.cached_property
    def _store(self) -> tuple[Any, str]:  # opened when it is used, because some file systems connect at once
        # An own instance: that in fsspec's cache may be in use with other options.
        files, root = url_to_fs(self.url, skip_instance_cache=True)
        if isinstance(files, LocalFileSystem):
            files.auto_mkdir = True  # other file systems need no folders, or make them in `put_file`
        return files, root.rstrip("/")

    def request(self) -> None:
        """Copy what the mirror lacks, in a thread. A copy that failed is tried again."""
        with self._lock:
            if not self._is_copying:
                self._is_copying = True
                # A daemon does not keep a process alive that is to end at once. The next launch copies the rest.
                self._thread = threading.Thread(target=self._copy_missing, name="mirror", daemon=True)
                self._thread.start()

    def has_ended(self, seconds: float) -> bool:
        """Waits for the copies for some time. Returns whether they have ended, or a second Ctrl-C ends the wait."""
        with contextlib.suppress(KeyboardInterrupt):
            if self._is_copying:
                self._thread.join(seconds)
            return not self._is_copying
        return True

    def say_news(self, say: Callable[[str], None]) -> None:
        """Says which copies have failed, or work again, since the last call."""
        while self._news:
            say(self._news.pop(0))

    def missing(self) -> list[tuple[Path, dict[str, Any]]]:
        """Returns the checkpoints that are not known to be at the mirror, oldest first."""
        return [(path, manifest) for path, manifest in self._found() if manifest["sha256"] not in self.copied]

    def _copy_missing(self) -> None:
        tried = set[str]()
        while True:
            with self._lock:  # so that no request comes between the last look and the end
                missing = [one for one in self.missing() if one[1]["sha256"] not in tried]
                self._is_copying = bool(missing)
            if not missing:
                return
            path, manifest = missing[-1]  # the newest first: its loss would cost most
            tried.add(manifest["sha256"])
            try:
                self._copy(path)
                self.copied.add(manifest["sha256"])
                kind = text = None
            except Exception as error:
                if not (path / MANIFEST).exists():  # deleted meanwhile
                    continue
                kind = (type(error), getattr(error, "errno", None))  # not the text, which may name the file
                text = (
                    f"{path.name} is not at {self.url} yet, and is copied again later: {type(error).__name__}: {error}"
                )
            if kind != self._failure:
                self._news.append(f"warning: {text}" if text else f"{path.name} is at {self.url}, which works again")
            self._failure = kind

    def _copy(self, path: Path) -> None:
        files, root = self._store
        files.invalidate_cache()
        content, there = (path / MANIFEST).read_bytes(), f"{root}/{path.name}"
        theirs, names = self._read(f"{there}/{MANIFEST}"), self._names(there, "file")
        if theirs == content:
            return
        if names and not any(name.startswith("training") and TENSORS.fullmatch(name) for name in names):
            raise CheckpointError(f"{self.url}/{path.name} holds files that are not a checkpoint's; move them away.")
        if theirs is not None:
            files.rm(f"{there}/{MANIFEST}")  # of a checkpoint that is being replaced
        entries = parse_manifest(content, path)["files"]
        for name in sorted(entries, key=lambda name: not name.startswith("training")):  # first what shows it as ours
            if not self._holds(f"{there}/{name}", entries[name]):  # otherwise a killed process has copied it
                files.put_file(str(path / name), f"{there}/{name}")
                if not self._holds(f"{there}/{name}", entries[name]):
                    raise CheckpointError(f"{path / name} or its copy is damaged: they differ from the manifest.")
        for log in filter(Path.is_file, self.logs):
            files.put_file(str(log), f"{root}/{LOGS}/{path.name}/{log.name}")
        files.pipe_file(f"{there}/{MANIFEST}", content)
        if self._read(f"{there}/{MANIFEST}") != content:
            raise CheckpointError(f"{self.url}/{path.name}/{MANIFEST} has other content than what was written.")

    def _holds(self, path: str, entry: dict[str, Any]) -> bool:
        files, _ = self._store
        with contextlib.suppress(FileNotFoundError):
            if files.size(path) == entry["size"]:
                with files.open(path, "rb") as file:
                    return sha256_of(file) == entry["sha256"]
        return False

    def _read(self, path: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return bytes(self._store[0].cat_file(path))
        return None

    def _names(self, folder: str, kind: str) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            found = self._store[0].ls(folder, detail=True)
            return [entry["name"].rstrip("/").split("/")[-1] for entry in found if entry["type"] == kind]
        return []

    def checkpoints(self, skipped: list[str]) -> list[tuple[str, dict[str, Any]]]:
        """Returns names and manifests of the complete checkpoints, newest first; adds the damaged ones to `skipped`."""
        (files, root), found = self._store, list[tuple[str, dict[str, Any]]]()
        files.invalidate_cache()
        names = [name for name in self._names(root, "directory") if NAME.fullmatch(name)]
        read = files.cat([f"{root}/{name}/{MANIFEST}" for name in names], on_error="return") if names else {}
        for path, content in read.items():
            where = f"{self.url}/{path.split('/')[-2]}"
            if isinstance(content, bytes):
                try:
                    found.append((path.split("/")[-2], parse_manifest(content, where)))
                except CheckpointError as error:
                    skipped.append(str(error))
            elif not isinstance(content, FileNotFoundError):
                raise content
        return sorted(found, key=lambda one: newness(one[1]), reverse=True)

    def fetch(self, name: str, manifest: dict[str, Any], folder: Path) -> None:
        """Copy a checkpoint to a new folder, without the files that it lacks."""
        files, root = self._store
        folder.mkdir(parents=True)
        for file in (MANIFEST, *manifest["files"]):
            with contextlib.suppress(FileNotFoundError):
                files.get_file(f"{root}/{name}/{file}", str(folder / file))
        for path in (*folder.iterdir(), folder):
            sync(path)

    def restore_logs(self, name: str) -> None:
        """Write the logs that were copied with a checkpoint. Own lines that they lack are kept in files beside them."""
        for log in self.logs:
            lines = self._read(f"{self._store[1]}/{LOGS}/{name}/{log.name}")
            own = log.read_bytes() if log.is_file() else b""
            if lines is not None and not own.startswith(lines):
                if not lines.startswith(own):
                    digest = hashlib.sha256(own).hexdigest()
                    log.with_name(f"{log.stem}.before-{digest[:8]}{log.suffix}").write_bytes(own)
                with replacing(log) as new:
                    new.write_bytes(lines)


def newness(manifest: dict[str, Any]) -> tuple[bool, int]:
    """Returns by what the checkpoint to resume from is chosen: finite weights come before the latest ones."""
    return bool(manifest["is_finite"]), manifest["sequence"]


def check_url(url: str, folder: Path) -> None:
    """Raises ConfigError if `url` cannot be the mirror of a folder. Connects to nothing."""
    protocol = url.partition("://")[0].partition("::")[0] if "://" in url else "file"  # or several: simplecache::s3
    allowed = "a folder, or a URL that fsspec opens, such as s3://bucket/run"
    try:
        kind = get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise ConfigError(Problem("training.mirror", url, allowed, f"{error}.")) from error
    if issubclass(kind, LocalFileSystem):
        path, own = Path(url_to_fs(url)[1]).resolve(), folder.resolve()
        if not url or own in (path, *path.parents):
            allowed += f", outside of {folder}"
            raise ConfigError(Problem("training.mirror", url, allowed, "Choose a folder on another disk."))
