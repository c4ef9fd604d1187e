"""Ways to damage the files of a checkpoint, and to change them so that the manifest still matches."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file

MANIFEST = "manifest.json"
T, U = TypeVar("T"), TypeVar("U")


def pairs(left: Sequence[T], right: Sequence[U]) -> list[tuple[T, U]]:
    """Pairs in which each item occurs at least once; with HYPOTHESIS_PROFILE=thorough, all pairs."""
    if os.environ.get("HYPOTHESIS_PROFILE") == "thorough":
        return list(product(left, right))
    return [(left[i % len(left)], right[i % len(right)]) for i in range(max(len(left), len(right)))]


# ---- damages that a manifest reveals ------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_first_bit(file: Path) -> None:
    _flip(file, 0)


def flip_middle_bit(file: Path) -> None:
    _flip(file, file.stat().st_size // 2)


def _flip(file: Path, index: int) -> None:
    content = bytearray(file.read_bytes())
    content[index] ^= 4
    file.write_bytes(content)


def move_behind_link(file: Path) -> None:
    file.symlink_to(file.rename(file.parent.parent / "elsewhere"))


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGES: tuple[Callable[[Path], None], ...] = (
    truncate, empty, flip_first_bit, flip_middle_bit, move_behind_link, make_folder, make_pipe, Path.unlink,
)  # fmt: skip


# ---- changes by an author who knows the format -----------------------------------------------------------------


def write_manifest(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with a correct SHA-256 of its own."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps({**rest, "sha256": digest}))


def change_manifest(checkpoint: Path, **changes: Any) -> None:
    """Replace fields of the manifest."""
    write_manifest(checkpoint, {**json.loads((checkpoint / MANIFEST).read_text()), **changes})


def make_true(checkpoint: Path) -> None:
    """Let the manifest list the files of the folder as they are."""
    contents = {path.name: path.read_bytes() for path in sorted(checkpoint.iterdir()) if path.name != MANIFEST}
    files = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    change_manifest(checkpoint, files=files)


def rewrite(checkpoint: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Let `edit` change the state in state.json and the tensors in training.safetensors by name."""
    saved = json.loads((checkpoint / "state.json").read_text())
    tensors = load_file(checkpoint / "training.safetensors")
    edit(saved["state"], tensors)
    (checkpoint / "state.json").write_text(json.dumps(saved))
    save_file(tensors, checkpoint / "training.safetensors")
    make_true(checkpoint)
