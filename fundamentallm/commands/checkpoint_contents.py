"""What a checkpoint holds, told without reading its weights, whoever made it."""

from __future__ import annotations

import math
import textwrap
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fundamentallm.checkpoint.manifest import MANIFEST, read_manifest, verify
from fundamentallm.checkpoint.reading import load_parts
from fundamentallm.checkpoint.snapshot import MODEL_KEY
from fundamentallm.checkpoint.state_json import MALFORMED
from fundamentallm.checkpoint.tensor_files import TensorFiles
from fundamentallm.commands.output import WIDTH, say, say_table, shortened, size_text
from fundamentallm.config.yaml_format import to_yaml
from fundamentallm.errors import CheckpointError

MOST_ROWS = 16
"""Modules that are counted one by one."""


def show(path: Path, verified: bool) -> None:
    """Print what the checkpoint at `path` holds; `verified`: once every byte of it has been compared.

    Raises:
        CheckpointError: if it is damaged, as far as that was looked at.
    """
    manifest = verify(path) if verified else read_manifest(path)
    parts = load_parts(path, ("progress_state_dict", "metrics_state_dict", "config", "versions"))
    tensors = tensors_of(path, manifest)
    prefix = f"{MODEL_KEY}/"
    weights = [(name.removeprefix(prefix), *about) for name, *about in tensors if name.startswith(prefix)]
    config, versions = _mapping(parts.get("config")), _mapping(parts.get("versions"))
    config_yaml = _yaml(config, path)

    say(f"{path}: {size_text(num_bytes(manifest))}, saved {saved_at(path)}")
    marks = "saved as the best" if manifest["is_best"] else "not saved as the best"
    finite = "finite" if manifest["is_finite"] else "not finite"
    say(f"number {manifest['sequence']} in its folder, {marks}, weights {finite}")
    if versions:
        made_with = ", ".join(f"{name}\xa0{version}" for name, version in versions.items())  # of one line
        say(textwrap.fill(f"made with {made_with}", WIDTH, subsequent_indent="  ").replace("\xa0", " "))
    _show_progress(manifest["step"], parts)
    _show_weights(weights)

    say("\nwhat is inside")
    inside = [(name.partition("/")[0].removesuffix("_state_dict"), size) for name, _, _, size in tensors]
    count, total = Counter(part for part, _ in inside), Counter[str]()
    for part, size in inside:
        total[part] += size
    rows = [(f"  {part}", f"{count[part]:,} tensors", size_text(size)) for part, size in total.most_common()]
    say_table(rows, "<>>")

    say(f"\nfiles ({'SHA-256 verified' if verified else 'sizes verified; --verify compares every byte'})")
    say_table([(f"  {name}", size_text(entry["size"])) for name, entry in manifest["files"].items()], "<>")
    if config:
        say("\nconfig" if "training" in config else "\nconfig (the TrainingConfig alone, of a run from Python)")
        for line in config_yaml.splitlines():
            say(f"  {line}")


def _show_progress(step: int | None, parts: dict[str, Any]) -> None:
    progress, metrics = _mapping(parts.get("progress_state_dict")), series(parts.get("metrics_state_dict"))
    rows: list[tuple[str, Any]] = [] if step is None else [("step", step)]
    for name in sorted(progress.keys() & {"samples", "tokens"}):
        value: Any = progress[name]
        rows.append((name, value.item() if hasattr(value, "item") and value.numel() == 1 else value))
    rows += [(name, values[-1]) for name, values in metrics.items() if name not in ("step", "samples", "tokens")]
    losses = zip(metrics.get("val_loss", ()), metrics.get("val_step", ()), strict=False)
    best = min((pair for pair in losses if not math.isnan(pair[0])), default=None)
    if rows:
        say("\nprogress, and the latest of each metric")
        say_table([(f"  {name}", _number(value)) for name, value in rows], "<>")
    if best is not None:
        say(f"  best val_loss {best[0]:.4f}, at step {best[1]:,}")


def _show_weights(weights: list[tuple[Any, ...]]) -> None:
    dtypes = ", ".join(sorted({dtype for _, dtype, _, _ in weights}))
    count = sum(elements for _, _, elements, _ in weights)
    say(f"\nweights: {count:,} parameters (and buffers) in {len(weights):,} tensors, {dtypes}")
    by_module: Counter[str] = Counter()
    for name, _, elements, _ in weights:
        by_module[_module(name)] += elements
    say_table([(f"  {name}", f"{elements:,}") for name, elements in by_module.most_common(MOST_ROWS)], "<>")
    if len(by_module) > MOST_ROWS:
        say(f"  and {len(by_module) - MOST_ROWS:,} smaller modules")


def series(metrics: Any) -> dict[str, list[float]]:
    """The history of each metric, as far as a stranger's checkpoint has any."""
    found = {}
    for name, values in _mapping(metrics).items():
        numbers = values.tolist() if hasattr(values, "tolist") else None
        if isinstance(numbers, list) and numbers and all(isinstance(number, (int, float)) for number in numbers):
            found[name] = numbers
    return found


def tensors_of(path: Path, manifest: dict[str, Any]) -> list[tuple[str, str, int, int]]:
    """(path in the state, dtype, elements, bytes) of each tensor of a checkpoint, from its files' headers alone.

    Raises:
        CheckpointError: if a file has no whole header.
    """
    try:
        with ExitStack() as stack:
            tensors = TensorFiles(path, manifest["files"], f"{MODEL_KEY}/", stack)
            return [
                (name, tensors.dtype(name).lower(), math.prod(tensors.shapes[name]), tensors.num_bytes(name))
                for name in tensors
            ]
    except (OSError, SafetensorError, *MALFORMED) as error:
        raise CheckpointError(f"{path}: its tensors cannot be opened: {error}.") from error


def num_bytes(manifest: dict[str, Any]) -> int:
    """Size of all files that a manifest lists."""
    return sum(entry["size"] for entry in manifest["files"].values())


def saved_at(path: Path) -> str:
    """Local time at which the checkpoint was written, or copied."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime((path / MANIFEST).stat().st_mtime))


def _module(parameter: str) -> str:
    """The part of a model that counts as one: model.layers.3.mlp.up_proj.weight is of model.layers."""
    modules = parameter.split(".")[:-1]
    return ".".join(modules[:1] + [name for name in modules[1:2] if not name.isdecimal()]) or parameter


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.5g}" if isinstance(value, float) else shortened(str(value), 40)


def _yaml(config: dict[str, Any], path: Path) -> str:
    try:
        return to_yaml(config)
    except Exception as error:  # whatever a stranger has put there
        raise CheckpointError(f"{path}: its config cannot be shown ({type(error).__name__}: {error}).") from error
