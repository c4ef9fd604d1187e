"""A mirror has complete copies or none, the folder keeps what it lacks, and what is lost comes back from it."""

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from fundamentallm import CheckpointManager
from fundamentallm.checkpoint.manifest import write_manifest
from fundamentallm.errors import CheckpointError
from tests.conftest import problem_of
from tests.unit.checkpoint_files import change_manifest, empty, flip_middle_bit, truncate

LONG = 60.0


class Unreliable(MemoryFileSystem):
    """Files in memory behind a gate. While `error` is set, each access raises it; `calls` lists what was written."""

    protocol = "unreliable"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    gate, asked, error, error_at = threading.Event(), threading.Event(), None, ""
    unreadable = "nothing"
    calls: list[str] = []  # noqa: RUF012

    def ls(self, *arguments: Any, **options: Any) -> Any:
        self._access()
        return super().ls(*arguments, **options)

    def put_file(self, source: str, target: str, **options: Any) -> None:
        self._access()
        self.calls.append(target.rpartition("/")[2])
        if self.error_at and target.endswith(self.error_at):
            raise OSError(5, "lost")
        super().put_file(source, target, **options)

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> Any:
        if path.endswith(self.unreadable):
            raise OSError(5, "unreadable")
        return super().cat_file(path, *arguments, **options)

    def _access(self) -> None:
        Unreliable.asked.set()
        assert Unreliable.gate.wait(LONG)
        if Unreliable.error is not None:
            raise Unreliable.error


@pytest.fixture
def store() -> Iterator[type[Unreliable]]:
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    Unreliable.gate.set()
    yield Unreliable
    Unreliable.gate.set()
    Unreliable.store.clear()
    Unreliable.pseudo_dirs[:] = [""]
    Unreliable.calls.clear()
    Unreliable.error, Unreliable.error_at, Unreliable.unreadable = None, "", "nothing"
    Unreliable.asked.clear()


def mirrored(folder: Path, url: str, keep: int = 3, logs: set[Path] | None = None) -> CheckpointManager:
    manager = CheckpointManager(folder, keep)
    manager.mirror.set_url(url, logs or set())
    return manager


def save(manager: CheckpointManager, *steps: int, value: float = 0.0) -> None:
    for step in steps:
        state = {"model_state_dict": {"w": torch.full((300,), step + value)}, "step": step}
        manager.save(state, f"step_{step}", is_best=step == 1)


def copied(manager: CheckpointManager) -> list[str]:
    """Waits for the copies. Returns what the mirror says of them."""
    news: list[str] = []
    assert manager.mirror.has_ended(LONG)
    manager.mirror.say_news(news.append)
    return news


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fetch(manager: CheckpointManager) -> tuple[Path | None, list[str]]:
    return manager.newest_anywhere(lambda text: None)


# ---- copying to the mirror -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file", "memory"])
def test_mirror_gets_each_checkpoint_and_gives_it_back(tmp_path: Path, kind: str) -> None:
    url = {"folder": f"{tmp_path}/far/", "file": f"file://{tmp_path}/far", "memory": f"memory:/{tmp_path}/far"}[kind]
    manager = mirrored(tmp_path / "here", url)
    save(manager, 0, 1, 2, 3)
    assert copied(manager) == []
    before = contents(tmp_path / "here/step_3") | contents(tmp_path / "here/step_1")
    shutil.rmtree(tmp_path / "here")
    assert fetch(mirrored(tmp_path / "here", url)) == (tmp_path / "here/step_3", [])
    assert names(tmp_path / "here") == ["step_1", "step_3"]  # the best too
    assert contents(tmp_path / "here/step_3") | contents(tmp_path / "here/step_1") == before


def test_mirror_gets_the_manifest_last_and_a_killed_copy_is_completed(tmp_path: Path, store: type[Unreliable]) -> None:
    manager = mirrored(tmp_path / "here", "unreliable://far")
    save(manager, 0)
    assert copied(manager) == []
    assert store.calls[0] == "training.safetensors"
    assert store.calls[-1] == "manifest.json"
    assert len(store.calls) == len(names(tmp_path / "here/step_0"))
    kept = "training.safetensors", "state.json"
    for path in [path for path in store.store if not path.endswith(kept)]:
        del store.store[path]
    store.calls.clear()
    assert fetch(mirrored(tmp_path / "empty", "unreliable://far")) == (None, [])  # it is not complete
    again = mirrored(tmp_path / "here", "unreliable://far")
    again.mirror.request()
    assert copied(again) == []
    assert store.calls == ["model.safetensors", "manifest.json"]
    store.calls.clear()
    again = mirrored(tmp_path / "here", "unreliable://far")
    again.mirror.request()
    assert copied(again) == []
    assert store.calls == []  # nothing twice


def test_mirror_copies_a_replaced_checkpoint_again(tmp_path: Path) -> None:
    manager = mirrored(tmp_path / "here", f"{tmp_path}/far")
    for value in (0.0, 0.5):
        save(manager, 2, value=value)
        assert copied(manager) == []
        assert contents(tmp_path / "far/step_2") == contents(tmp_path / "here/step_2")


def test_mirror_that_fails_while_it_replaces_has_none(tmp_path: Path, store: type[Unreliable]) -> None:
    manager = mirrored(tmp_path / "here", "unreliable://far")
    save(manager, 2)
    assert copied(manager) == []
    store.error_at = "model.safetensors"
    save(manager, 2, value=0.5)
    assert len(copied(manager)) == 1
    assert fetch(mirrored(tmp_path / "empty", "unreliable://far")) == (None, [])  # not one with files of both


@pytest.mark.parametrize(("steps", "first"), [((2, 3), "step_3"), ((1, 2, 3), "step_1")])
def test_mirror_copies_the_best_and_then_the_newest_first(
    tmp_path: Path, store: type[Unreliable], steps: tuple[int, ...], first: str
) -> None:
    save(CheckpointManager(tmp_path / "here"), *steps)
    store.error_at = "state.json"
    manager = mirrored(tmp_path / "here", "unreliable://far")
    manager.mirror.request()
    assert len(copied(manager)) == 1
    assert {path.split("/")[-2] for path in store.store} == {first}


def test_mirror_leaves_files_of_others_and_copies_the_rest(tmp_path: Path) -> None:
    (tmp_path / "far/step_2").mkdir(parents=True)
    (tmp_path / "far/step_2/model.safetensors").write_text("mine")
    manager = mirrored(tmp_path / "here", f"{tmp_path}/far")
    save(manager, 0, 2)
    assert len(copied(manager)) == 1
    assert contents(tmp_path / "far/step_2") == {"model.safetensors": b"mine"}
    assert contents(tmp_path / "far/step_0") == contents(tmp_path / "here/step_0")
    assert [path.name for path, _ in manager.mirror.missing()] == ["step_2"]


def test_mirror_does_not_complete_a_damaged_copy(tmp_path: Path) -> None:
    manager = mirrored(tmp_path / "here", f"{tmp_path}/far")
    CheckpointManager(tmp_path / "here").save({"model_state_dict": {"w": torch.ones(300)}}, "step_0")
    flip_middle_bit(tmp_path / "here/step_0/model.safetensors")
    manager.mirror.request()
    assert len(copied(manager)) == 1
    assert "manifest.json" not in names(tmp_path / "far/step_0")


def test_mirror_that_fails_is_reported_once_until_it_works(tmp_path: Path, store: type[Unreliable]) -> None:
    manager = mirrored(tmp_path / "here", "unreliable://far")
    news = []
    for error in (OSError(5, "one"), OSError(5, "the same"), PermissionError(13, "another"), None, None):
        store.error = error
        save(manager, len(news))
        news.append(len(copied(manager)))
    assert news == [1, 0, 1, 1, 0]
    assert manager.mirror.missing() == []
    assert len(list(filter(lambda path: path.endswith("manifest.json"), store.store))) == 5  # none was left out


def test_has_ended_second_interrupt_ends_the_wait(
    tmp_path: Path, store: type[Unreliable], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    manager = mirrored(tmp_path / "here", "unreliable://far")
    store.gate.clear()
    save(manager, 2)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupted)
        assert manager.mirror.has_ended(LONG)
    store.gate.set()
    assert copied(manager) == []


# ---- rotation ----------------------------------------------------------------------------------------------


def test_rotate_keeps_what_a_hanging_mirror_lacks(tmp_path: Path, store: type[Unreliable]) -> None:
    store.gate.clear()
    manager = mirrored(tmp_path / "here", "unreliable://far", keep=1)
    save(manager, 2, 3, 4)  # each returns although nothing is copied
    assert store.asked.wait(LONG)
    assert not manager.mirror.has_ended(0.0)
    assert names(tmp_path / "here") == ["step_2", "step_3", "step_4"]
    shutil.rmtree(tmp_path / "here/step_2")  # the one that is being copied
    store.gate.set()
    assert copied(manager) == []
    manager.rotate()
    assert names(tmp_path / "here") == ["step_4"]


def test_rotate_without_room_deletes_the_oldest_uncopied(
    tmp_path: Path, store: type[Unreliable], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = mirrored(tmp_path / "here", "unreliable://far", keep=1)
    save(manager, 2)
    assert copied(manager) == []
    store.error = OSError(5, "gone")
    save(manager, 3, 4, 5)
    assert names(tmp_path / "here") == ["step_3", "step_4", "step_5"]  # step_2 is at the mirror
    room = iter([0, 10**9, 10**9])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=next(room)))
    save(manager, 6)
    assert names(tmp_path / "here") == ["step_4", "step_5", "step_6"]
    copied(manager)  # so that the next test finds no files of this one


# ---- reading from the mirror ---------------------------------------------------------------------------------


@pytest.fixture
def far(tmp_path: Path) -> Path:
    """A mirror with the checkpoints of steps 2 and 3, of a folder that is lost."""
    manager = mirrored(tmp_path / "lost", f"{tmp_path}/far")
    save(manager, 2, 3)
    assert copied(manager) == []
    shutil.rmtree(tmp_path / "lost")
    return tmp_path / "far"


@pytest.mark.parametrize("damage", [truncate, flip_middle_bit, empty, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_newest_anywhere_skips_a_damaged_copy(
    tmp_path: Path, far: Path, file: str, damage: Callable[[Path], None]
) -> None:
    damage(far / "step_3" / file)
    path, skipped = fetch(mirrored(tmp_path / "here", str(far)))
    assert path == tmp_path / "here/step_2"
    assert names(tmp_path / "here") == ["step_2"]
    assert [f"{far}/step_3" in reason for reason in skipped] == [True] * (damage != Path.unlink or file[0:5] == "model")


def test_newest_anywhere_never_leaves_the_folder(tmp_path: Path, far: Path) -> None:
    entry = {"size": 4, "sha256": "0" * 64}
    (far / "outside").write_text("evil")
    shutil.copytree(far / "step_3", far / ".step_4")
    change_manifest(far / "step_3", files={"state.json": entry, "../outside": entry})
    assert fetch(mirrored(tmp_path / "here", str(far)))[0] == tmp_path / "here/step_2"
    assert not (tmp_path / "here/outside").exists()
    assert not (tmp_path / "outside").exists()


def test_newest_anywhere_prefers_the_newer_of_here_and_there(tmp_path: Path, far: Path) -> None:
    shutil.copytree(far / "step_2", tmp_path / "here/step_2")
    manager = mirrored(tmp_path / "here", str(far))
    assert fetch(manager) == (tmp_path / "here/step_3", [])
    save(manager, 1)  # saved later, although of an earlier step
    assert copied(manager) == []
    assert fetch(manager) == (tmp_path / "here/step_1", [])


def without_run(path: Path) -> None:
    """Rewrites a manifest as earlier versions wrote it."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["run"], manifest["sha256"], manifest["format_version"]
    write_manifest(path, manifest.pop("files"), **manifest)


@pytest.mark.parametrize("has_id", [True, False])
def test_mirror_of_another_run_is_refused_and_both_stay(tmp_path: Path, far: Path, has_id: bool) -> None:
    manager = CheckpointManager(tmp_path / "here")
    save(manager, 3)
    if not has_id:
        without_run(tmp_path / "here/step_3")
    before = contents(far), contents(tmp_path / "here")
    manager.mirror.set_url(str(far), set())
    assert problem_of(fetch, manager).setting == "training.mirror"
    manager.mirror.request()  # as if the mirror could not be read at the start
    assert len(copied(manager)) == 1
    assert (contents(far), contents(tmp_path / "here")) == before


def test_mirror_is_free_after_a_first_copy_that_was_lost(tmp_path: Path, store: type[Unreliable]) -> None:
    lost = mirrored(tmp_path / "lost", "unreliable://far")
    store.error_at = "manifest.json"
    save(lost, 2)
    assert len(copied(lost)) == 1
    store.error_at = ""
    manager = mirrored(tmp_path / "here", "unreliable://far")
    assert fetch(manager) == (None, [])
    save(manager, 2)
    assert copied(manager) == []


def test_mirror_takes_checkpoints_without_a_run_id(tmp_path: Path) -> None:
    save(CheckpointManager(tmp_path / "here"), 2)
    without_run(tmp_path / "here/step_2")
    manager = mirrored(tmp_path / "here", f"{tmp_path}/far")
    manager.mirror.request()
    assert copied(manager) == []
    save(manager, 3)  # which has one
    assert copied(manager) == []
    for step in ("step_2", "step_3"):
        assert contents(tmp_path / "far" / step) == contents(tmp_path / "here" / step)


def test_newest_anywhere_prefers_finite_weights(tmp_path: Path, store: type[Unreliable]) -> None:
    manager = mirrored(tmp_path / "here", "unreliable://far")
    save(manager, 2, 3)
    save(manager, 4, value=math.nan)
    assert copied(manager) == []
    assert fetch(mirrored(tmp_path / "empty", "unreliable://far"))[0] == tmp_path / "empty/step_3"


def test_newest_anywhere_skips_none_that_it_cannot_read(tmp_path: Path, store: type[Unreliable]) -> None:
    manager = mirrored(tmp_path / "here", "unreliable://far")
    save(manager, 2, 3)
    assert copied(manager) == []
    store.unreadable = "step_3/manifest.json"
    with pytest.raises(CheckpointError, match="unreadable"):
        fetch(mirrored(tmp_path / "empty", "unreliable://far"))


def test_newest_anywhere_repairs_a_damaged_checkpoint(tmp_path: Path, far: Path) -> None:
    manager = mirrored(tmp_path / "here", str(far))
    fetch(manager)
    truncate(tmp_path / "here/step_3/model.safetensors")
    path, skipped = fetch(manager)
    assert (path, len(skipped)) == (tmp_path / "here/step_3", 1)
    assert manager.newest_intact() == (path, [])


def test_newest_anywhere_unreadable_mirror_needs_one_here(tmp_path: Path, store: type[Unreliable]) -> None:
    store.error = OSError(5, "gone")
    manager = mirrored(tmp_path / "here", "unreliable://far")
    with pytest.raises(CheckpointError, match="gone"):
        fetch(manager)
    save(CheckpointManager(tmp_path / "here"), 2)
    said: list[str] = []
    assert manager.newest_anywhere(said.append) == (tmp_path / "here/step_2", [])
    assert len(said) == 2  # where it looks, and why it continues without


def test_newest_anywhere_restores_logs_and_keeps_other_lines(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    log.write_text("1\n2\n")
    manager = mirrored(tmp_path / "here", f"{tmp_path}/far", logs={log, tmp_path / "none.jsonl"})
    save(manager, 2)
    assert copied(manager) == []
    for own, kept in ((None, []), ("1\n", []), ("1\n2\n3\n", []), ("1\nx\n", ["1\nx\n"])):
        shutil.rmtree(tmp_path / "here")
        log.unlink()
        if own is not None:
            log.write_text(own)
        fetch(mirrored(tmp_path / "here", f"{tmp_path}/far", logs={log}))
        assert log.read_text() == ("1\n2\n3\n" if own == "1\n2\n3\n" else "1\n2\n")
        assert [path.read_text() for path in tmp_path.glob("run.before-*.jsonl")] == kept


# ---- the setting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["", "s4://bucket/run", "here", "here/below", "file://{}/here", "link"])
def test_set_url_refuses_what_cannot_be_a_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink("here", "link")
    problem = problem_of(mirrored, Path("here"), url.format(tmp_path))
    assert (problem.setting, problem.value) == ("training.mirror", url.format(tmp_path))


def test_set_url_names_the_package_that_is_missing(tmp_path: Path) -> None:
    fsspec.register_implementation("absent", "absent.Files", clobber=True, errtxt="Install the package absent")
    assert "Install the package absent" in problem_of(mirrored, tmp_path, "absent://bucket/run").advice
