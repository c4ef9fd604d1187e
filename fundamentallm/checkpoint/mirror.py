"""Copies of a folder's checkpoints at a URL that fsspec opens. A complete one has a manifest.json, written last."""

import contextlib
import functools
import hashlib
import threading
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import fsspec

from fundamentallm.atomic import copy_name, replacing
from fundamentallm.checkpoint.manifest import MANIFEST, NAME, TENSORS, parse_manifest, sha256_of
from fundamentallm.errors import CheckpointError, ConfigError, Problem

LOCAL = fsspec.get_filesystem_class("file")
LOGS, RUN = ".logs", ".run"  # at the mirror: logs, by the name of the checkpoint they were copied with; id of its run
NEWNESS = itemgetter("is_finite", "sequence")  # of a manifest: finite weights are preferred, then later ones


class Mirror:
    """Copies the checkpoints of a folder to a URL in a thread, and reads them there. Without a URL it does nothing.

    `found` returns the folder's checkpoints with their manifests, oldest first. Only one process may copy.
    """

    def __init__(self, folder: Path, found: Callable[[], list[tuple[Path, dict[str, Any]]]]) -> None:
        self._folder, self._found, self.url, self._logs = folder, found, "", set[Path]()
        self._copied, self._news, self._failure = set[str](), list[str](), ""  # copied: SHA-256 of manifests
        self._lock, self._thread, self._is_copying = threading.Lock(), threading.Thread(), False

    def set_url(self, url: str, logs: set[Path]) -> None:
        """Set the URL, and the logs whose lines checkpoints count on. Raises ConfigError; does not connect."""
        self.url, self._logs, own = url, logs, self._folder.resolve()
        protocol = url.partition("://")[0].partition("::")[0] if "://" in url else "file"  # fsspec chains them by ::
        allowed = f"a URL that fsspec opens, such as s3://bucket/run, or a folder outside of {own}"
        try:
            is_local = fsspec.get_filesystem_class(protocol) is LOCAL
        except (ImportError, ValueError) as error:
            raise ConfigError(Problem("training.mirror", url, allowed, f"{error}.")) from error
        path = Path(fsspec.url_to_fs(url)[1]).resolve() if is_local else None
        if not url or (path is not None and own in (path, *path.parents)):
            raise ConfigError(Problem("training.mirror", url, allowed))

    @functools.cached_property
    def _store(self) -> tuple[Any, str]:  # opened when it is used: some file systems connect at once
        files, root = fsspec.url_to_fs(self.url, skip_instance_cache=True)
        if isinstance(files, LOCAL):
            files.auto_mkdir = True  # others need no folders, or `put_file` makes them
        return files, root.rstrip("/")

    def run(self) -> str:
        """Returns the id of the run that the folder holds, or "": the manifests of earlier versions have none."""
        return next((str(manifest["run"]) for _, manifest in reversed(self._found()) if "run" in manifest), "")

    def _check_run(self) -> None:
        """Raises ConfigError if the mirror holds another run than the folder."""
        run = self.run().encode()
        if self._found() and (self._read(f"{self._store[1]}/{RUN}") or run) != run:
            raise ConfigError(Problem("training.mirror", self.url, "its own URL", reason="and it holds another run"))

    def missing(self) -> list[tuple[Path, dict[str, Any]]]:
        """Returns the folder's checkpoints that are not known to be at the mirror, oldest first."""
        return [one for one in self._found() if one[1]["sha256"] not in self._copied] if self.url else []

    def say_news(self, say: Callable[[str], None]) -> None:
        """Says which copies have failed, or work again, since the last call."""
        while self._news:
            say(self._news.pop(0))

    def request(self) -> None:
        """Copy what the mirror lacks, in a thread. A copy that failed is tried again."""
        with self._lock:
            if self.url and not self._is_copying:
                self._is_copying = True
                # A daemon does not keep a process alive that is to end at once. The next launch copies the rest.
                self._thread = threading.Thread(target=self._copy_missing, name="mirror", daemon=True)
                self._thread.start()

    def has_ended(self, seconds: float) -> bool:
        """Waits for the copies for some time. Returns whether they have ended, or a second Ctrl-C ends the wait."""
        with contextlib.suppress(KeyboardInterrupt):
            if self._thread.is_alive():
                self._thread.join(seconds)
            return not self._thread.is_alive()
        return True

    def _copy_missing(self) -> None:
        tried = set[str]()
        while True:
            with self._lock:  # so that no request comes between the last look and the end
                self._is_copying = False  # if this raises
                missing = [one for one in self.missing() if one[1]["sha256"] not in tried]
                best = [one for one in self._found() if one[1]["is_best"]][-1:]
                self._is_copying = bool(missing)
            if not missing:
                return
            # The newest first, since its loss would cost most; but not without the best so far, which the run keeps.
            path, manifest = next((one for one in best if one in missing), missing[-1])
            tried.add(manifest["sha256"])
            failure, text = "", f"{path.name} is copied to {self.url}, which works again"
            try:
                self._copy(path)
                self._copied.add(manifest["sha256"])
            except Exception as error:
                if not (path / MANIFEST).exists():  # deleted while it was copied
                    continue
                failure = f"{type(error)} {getattr(error, 'errno', '')}"  # not the text, which may name the file
                text = f"warning: {path.name} is not copied to {self.url} yet: {type(error).__name__}: {error}"
                if not isinstance(error, CheckpointError):
                    tried |= {one[1]["sha256"] for one in missing}  # which would fail too
            if failure != self._failure:
                self._news.append(text)
            self._failure = failure

    def _copy(self, path: Path) -> None:
        files, root = self._store
        files.invalidate_cache()
        self._check_run()
        content, there = (path / MANIFEST).read_bytes(), f"{root}/{path.name}"
        theirs, names = self._read(f"{there}/{MANIFEST}"), self._names(there)
        if theirs == content:
            return
        if names and not any(name.startswith("training") and TENSORS.fullmatch(name) for name in names):
            raise CheckpointError(f"{self.url}/{path.name} holds files that are not a checkpoint's; move them away.")
        if theirs is not None:
            files.rm(f"{there}/{MANIFEST}")  # of a checkpoint that is being replaced
        for log in filter(Path.is_file, self._logs):
            files.put_file(str(log), f"{root}/{LOGS}/{path.name}/{log.name}")
        entries = parse_manifest(content, path)["files"]
        own = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        # First what shows it as ours, unless a killed process has copied it.
        for name, entry in [*sorted(entries.items(), key=lambda one: "training" not in one[0]), (MANIFEST, own)]:
            if not self._holds(f"{there}/{name}", entry):
                files.put_file(str(path / name), f"{there}/{name}")
                if not self._holds(f"{there}/{name}", entry):
                    raise CheckpointError(f"{path / name} or its copy is damaged: they differ from the manifest.")
        files.pipe_file(f"{root}/{RUN}", self.run().encode())  # last: a run lost in its first copy blocks no other

    def _holds(self, path: str, entry: dict[str, Any]) -> bool:
        files, _ = self._store
        with contextlib.suppress(FileNotFoundError):
            return bool(files.size(path) == entry["size"]) and sha256_of(files.open(path, "rb")) == entry["sha256"]
        return False

    def _read(self, path: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return bytes(self._store[0].cat_file(path))
        return None

    def _names(self, folder: str) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return [name.rstrip("/").split("/")[-1] for name in self._store[0].ls(folder, detail=False)]
        return []

    def newest_first(self, skipped: list[str], say: Callable[[str], None]) -> list[tuple[str, dict[str, Any]]]:
        """Returns names and manifests of the complete checkpoints. Adds to `skipped` which manifests are damaged."""
        (files, root), found = self._store, list[tuple[str, dict[str, Any]]]()
        say(f"looking for checkpoints at {self.url}")  # a server that does not answer may take minutes
        files.invalidate_cache()
        self._check_run()
        paths = [f"{root}/{name}/{MANIFEST}" for name in self._names(root) if NAME.fullmatch(name)]
        for path, content in (files.cat(paths, on_error="return") if paths else {}).items():
            name = path.split("/")[-2]
            if isinstance(content, bytes):
                try:
                    found.append((name, parse_manifest(content, f"{self.url}/{name}")))
                except CheckpointError as error:
                    skipped.append(str(error))
            elif not isinstance(content, (FileNotFoundError, NotADirectoryError)):
                raise content
        say(f"found {len(found)} there")  # none, if the URL is mistyped
        return sorted(found, key=lambda one: NEWNESS(one[1]), reverse=True)

    def fetch(self, name: str, manifest: dict[str, Any], folder: Path) -> None:
        """Copy a checkpoint to a new folder, without the files that it lacks."""
        files, root = self._store
        folder.mkdir(parents=True)
        for file in (MANIFEST, *manifest["files"]):
            with contextlib.suppress(FileNotFoundError):
                files.get_file(f"{root}/{name}/{file}", str(folder / file))

    def restore_logs(self, name: str) -> None:
        """Write the logs that were copied with a checkpoint. Own lines that they lack are kept in files beside them."""
        for log in self._logs:
            lines = self._read(f"{self._store[1]}/{LOGS}/{name}/{log.name}")
            own = log.read_bytes() if log.is_file() else b""
            if lines is not None and not own.startswith(lines):
                if not lines.startswith(own):
                    log.rename(copy_name(log))
                with replacing(log) as new:
                    new.write_bytes(lines)
