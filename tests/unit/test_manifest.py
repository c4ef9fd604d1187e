"""A manifest is true of its files, and nothing it could say leads outside its directory."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from fundamentallm.checkpoint.manifest import describe, read_manifest, verify, write_manifest
from fundamentallm.errors import CheckpointError, CheckpointNotFoundError
from tests.unit import checkpoint_files

ABOUT = {"sequence": 3, "is_best": False, "is_finite": True, "step": 7}
CONTENTS = {"model.safetensors": b"weights", "training.safetensors": b"", "state.json": b"{}", "config.json": b"\0\xff"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step_7"
    folder.mkdir()
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    write_manifest(folder, describe(folder, CONTENTS), **ABOUT)
    return folder


def change(folder: Path, **changes: Any) -> None:
    """Say something else, under a checksum that is right."""
    manifest = json.loads((folder / "manifest.json").read_text())
    checkpoint_files.write_manifest(folder, {**manifest, **changes})


def test_a_manifest_lists_every_file_with_its_size_and_hash_and_what_else_is_said(folder: Path) -> None:
    manifest = verify(folder)
    assert manifest == read_manifest(folder)
    assert {name: manifest[name] for name in ABOUT} == ABOUT
    assert manifest["files"] == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in CONTENTS.items()
    }


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize(("content", "said"), [(b"other!!", "bytes|SHA-256"), (None, "is missing")])
def test_a_file_that_is_not_as_listed_is_named(folder: Path, name: str, content: bytes | None, said: str) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"step_7: {name} .*({said})"):
        verify(folder)


def test_a_file_that_is_not_listed_does_no_harm(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    verify(folder)


def test_a_folder_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        verify(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": "2"}, {"format_version": 2.0}, {"format_version": True}, {"format_version": None},
        {"format_version": [[]]}, {"sequence": 0}, {"sequence": -1}, {"sequence": 2**63}, {"sequence": 10**4000},
        {"sequence": 1.0}, {"is_finite": 1}, {"step": "7"}, {"files": {"state.json": {}}},
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_damage(folder: Path, changes: dict[str, Any]) -> None:
    change(folder, **changes)
    with pytest.raises(CheckpointError, match=r"step_7: manifest\.json is damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("entry", [None, [], {}, {"size": 4}, {"size": "4", "sha256": ""}, {"size": 4, "sha256": None}])
def test_an_entry_of_another_form_is_damage(folder: Path, entry: Any) -> None:
    change(folder, files={**read_manifest(folder)["files"], "config.json": entry})
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("size", [-1, 0, 2**80])
def test_a_size_that_no_file_has_is_told(folder: Path, size: int) -> None:
    files = read_manifest(folder)["files"]
    change(folder, files={**files, "config.json": {**files["config.json"], "size": size}})
    told = f"config.json has 2 bytes instead of {size}" if size == 0 else "manifest.json is damaged"
    with pytest.raises(CheckpointError, match=told):
        verify(folder)


def test_a_name_longer_than_file_systems_take_is_of_a_missing_file(folder: Path) -> None:
    files = read_manifest(folder)["files"]
    change(folder, files={**files, "a" * 5000: {"size": 0, "sha256": ""}})
    with pytest.raises(CheckpointError, match="a is missing"):
        verify(folder)


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_a_pipe_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=name):
        verify(folder)
