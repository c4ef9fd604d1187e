"""A manifest matches its files, and nothing in it leads outside its directory."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from fundamentallm.checkpoint.manifest import describe, read_manifest, verify, write_manifest
from fundamentallm.errors import CheckpointError
from tests.unit.checkpoint_files import DAMAGES, change_manifest, pairs

ABOUT = {"sequence": 3, "is_best": False, "is_finite": True, "step": 7}
CONTENTS = {"model.safetensors": b"weights", "training.safetensors": b".", "state.json": b"{}", "config.json": b"\xff"}
ENTRY = {"size": 4, "sha256": hashlib.sha256(b"text").hexdigest()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step_7"
    folder.mkdir()
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    write_manifest(folder, describe(folder, CONTENTS), **ABOUT)
    return folder


def test_verify_returns_the_manifest_of_all_files(folder: Path) -> None:
    (folder / "notes.txt").write_text("not the checkpoint's")
    manifest = verify(folder)
    assert manifest == read_manifest(folder)
    assert {name: manifest[name] for name in ABOUT} == ABOUT
    assert manifest["files"] == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in CONTENTS.items()
    }


@pytest.mark.parametrize(("damage", "name"), pairs(DAMAGES, (*CONTENTS, "manifest.json")))
def test_verify_names_a_damaged_file(folder: Path, damage: Any, name: str) -> None:
    damage(folder / name)
    with pytest.raises(CheckpointError, match=f"step_7: .*{name}"):
        verify(folder)


def test_verify_finds_a_flipped_bit_anywhere_in_the_manifest(folder: Path) -> None:
    content = (folder / "manifest.json").read_bytes()
    unnoticed = []
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1
        (folder / "manifest.json").write_bytes(damaged)
        try:
            verify(folder)
        except CheckpointError:
            continue
        unnoticed.append(content[:index].decode().splitlines()[-1])
    assert unnoticed == []


@pytest.mark.parametrize(
    "changes",
    [{"format_version": 3}, {"format_version": [[]]}, {"sequence": "1"}, {"step": "7"}, {"files": {}}, {"files": []}],
)
def test_read_manifest_refuses_a_value_of_another_kind(folder: Path, changes: dict[str, Any]) -> None:
    change_manifest(folder, **changes)
    with pytest.raises(CheckpointError, match="step_7: "):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", ".x"])
def test_read_manifest_refuses_a_file_outside(folder: Path, name: str) -> None:
    (folder.parent / "x").write_bytes(b"text")
    change_manifest(folder, files={**read_manifest(folder)["files"], name: ENTRY})
    with pytest.raises(CheckpointError, match=r"step_7: manifest\.json"):
        read_manifest(folder)


def test_read_manifest_refuses_one_that_never_ends(folder: Path) -> None:
    files = {f"file{number}": {"size": 0, "sha256": "0" * 64} for number in range(100_000)}
    change_manifest(folder, files=read_manifest(folder)["files"] | files)
    with pytest.raises(CheckpointError, match="more than"):
        read_manifest(folder)
