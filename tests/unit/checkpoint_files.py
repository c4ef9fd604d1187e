"""Checkpoints changed as somebody would who knows the format: what their manifests say is true again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

MANIFEST = "manifest.json"


def write_manifest(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest whose own checksum is right, whatever it says."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps({**rest, "sha256": digest}))


def make_true(checkpoint: Path, **changes: Any) -> None:
    """Let the manifest list the files that are there, as they are; `changes` are what else it is to say."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    contents = {path.name: path.read_bytes() for path in sorted(checkpoint.iterdir()) if path.name != MANIFEST}
    files = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    write_manifest(checkpoint, {**manifest, "files": files, **changes})


def rewrite(checkpoint: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Let `edit` change what state.json holds, and the tensors by name (as in training.safetensors)."""
    saved = json.loads((checkpoint / "state.json").read_text())
    tensors = load_file(checkpoint / "training.safetensors")
    edit(saved["state"], tensors)
    (checkpoint / "state.json").write_text(json.dumps(saved))
    save_file(tensors, checkpoint / "training.safetensors")
    make_true(checkpoint)
