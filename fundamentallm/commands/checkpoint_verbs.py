"""The verbs of `fundamentallm checkpoints`. Checkpoints may come from strangers: what they say is escaped."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import textwrap
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fundamentallm.checkpoint.manager import HIDDEN, CheckpointManager, checkpoints_folder
from fundamentallm.checkpoint.manifest import MANIFEST, NAME, read_manifest, verify
from fundamentallm.checkpoint.reading import export_weights, is_ours, load_parts
from fundamentallm.checkpoint.snapshot import MODEL_KEY
from fundamentallm.checkpoint.state_json import MALFORMED
from fundamentallm.checkpoint.tensor_files import TensorFiles
from fundamentallm.commands.output import WIDTH, printable, say, say_table, shortened
from fundamentallm.config.units import size_text
from fundamentallm.config.yaml_format import to_yaml
from fundamentallm.errors import CheckpointError, CheckpointNotFoundError, ConfigError, Problem
from fundamentallm.run.step_samples import samples_of_step, text_of_step, texts, why_no_text

MOST_MODULES = 16
"""Modules whose parameters are listed."""


def list_command(options: argparse.Namespace) -> int:
    """`checkpoints list`: print a line for each checkpoint, from its manifest and its history of metrics."""
    if is_ours(_existing(options.folder).resolve()):
        raise CheckpointError(f"{options.folder} is a checkpoint; give the folder that contains it, or use show.")
    folder = checkpoints_folder(options.folder)
    manager, rows, others = CheckpointManager(folder), [], []
    best, newest = manager.get_best(), manager.get_latest()
    for path in _subfolders(folder):
        if reason := _why_not_checkpoint(path):
            others.append((path.name, reason))
            continue
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            others.append((path.name, _reason(error, path)))
            continue
        marks = ["best"] * (path == best) + ["newest"] * (path == newest)
        marks += ["weights not finite"] * (not manifest["is_finite"])
        history = {}
        try:
            history = _series(load_parts(path, ["metrics_state_dict"]).get("metrics_state_dict"))
        except CheckpointError as error:
            marks.append(_reason(error, path))
        losses = dict(zip(history.get("val_step", ()), history.get("val_loss", ()), strict=False))
        step, loss = manifest["step"], losses.get(manifest["step"])
        row = path.name, "-" if step is None else f"{step:,}", "-" if loss is None else f"{loss:.4f}"
        rows.append((manifest["sequence"], (*row, size_text(_num_bytes(manifest)), _saved_at(path), ", ".join(marks))))
    if not rows and not any(is_ours(folder / name) or HIDDEN.fullmatch(name) for name, _ in others):
        raise _nothing_in(options.folder)
    if rows:
        table = [row for _, row in sorted(rows, key=lambda item: item[0])]
        say_table([("checkpoint", "step", "val_loss", "size", "saved", ""), *table], "<>>>><")
    if others:
        say("\nnot complete checkpoints:" if rows else "not complete checkpoints:")
        say_table([(f"  {name}", reason) for name, reason in others], "<<")
    return 0


def verify_command(options: argparse.Namespace) -> int:
    """`checkpoints verify`: print a line for each checkpoint."""
    folder = _existing(options.folder)
    paths = [folder]
    if not is_ours(folder.resolve()):
        paths = [path for path in _subfolders(checkpoints_folder(folder)) if _why_not_checkpoint(path) is None]
    if not paths:
        raise _nothing_in(folder)
    damaged = 0
    for path in paths:
        try:
            manifest = verify(path)
        except CheckpointError as error:
            damaged += 1
            say(f"{path.name}  {_reason(error, path)}")
            continue
        extra = sorted({entry.name for entry in path.iterdir()} - {*manifest["files"], MANIFEST})
        note = f"; not in the manifest: {printable(', '.join(extra))}" if extra else ""
        say(f"{path.name}  ok, {len(manifest['files']) + 1} files, {size_text(_num_bytes(manifest))}{note}")
    if damaged and len(paths) > 1:
        say(f"{damaged} of {len(paths)} are damaged")
    return 1 if damaged else 0


def show_command(options: argparse.Namespace) -> int:
    """`checkpoints show`."""
    _show(_checkpoint(options.folder), options.verify)
    return 0


def samples_command(options: argparse.Namespace) -> int:
    """`checkpoints samples`: print indices, and the text if it is available."""
    path = _checkpoint(options.folder)
    found = samples_of_step(path, options.step)
    no_text = "--indices_only" if options.indices_only else why_no_text(path, found)
    dataset = None if no_text else text_of_step(path, found, options.source)
    count = len(found.indices)
    say(f"{path}: step {options.step:,} is in epoch {found.epoch:,} (from 0), after {found.samples_before:,} samples")
    if options.step > found.steps_done:
        say(f"not trained yet: the checkpoint has {found.steps_done:,} steps; these samples come if the run resumes")
    if dataset is None:
        say(f"no text: {no_text}\n\n{count:,} samples, by their index in the dataset:")
        say(", ".join(map(str, found.indices)))
        return 0
    say(f"{count:,} samples, by their index and their first and last token in the training text:\n")
    rows = [(f"{index:,}", tokens, text) for index, tokens, text in texts(dataset, found.indices)]
    if options.full:
        for index, tokens, text in rows:
            say(f"---- sample {index}, tokens {tokens} ----\n{text}")
        return 0
    width = WIDTH - sum(max(map(len, column)) + 2 for column in list(zip(*rows, strict=True))[:2])
    say_table([(index, tokens, shortened(text, max(width, 20))) for index, tokens, text in rows], ">><")
    return 0


def consolidate_command(options: argparse.Namespace) -> int:
    """`checkpoints consolidate`: export weights, config and tokenizer."""
    source, output = _checkpoint(options.folder), options.output
    if os.path.lexists(output):
        raise ConfigError([Problem("OUT", str(output), allowed="a new folder", reason="which exists already")])
    staging = output.with_name(f".{output.name}-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        export_weights(source, staging, options.raw)
        staging.rename(output)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            advice = "Free some space, or choose another folder."
            raise CheckpointError(f"{output} cannot be written: {error}. {advice}") from error
        raise
    say(f"{source} -> {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    return 0


def _show(path: Path, verified: bool) -> None:
    """Print what the checkpoint at `path` holds, with `verified` only after comparing every byte.

    Raises:
        CheckpointError: if damage is found.
    """
    manifest = verify(path) if verified else read_manifest(path)
    parts = load_parts(path, ("progress_state_dict", "metrics_state_dict", "config", "versions"))
    weights = _stored_weights(path, manifest)
    config, versions = _mapping(parts.get("config")), _mapping(parts.get("versions"))
    config_yaml = _yaml(config, path)

    say(f"{path}: {size_text(_num_bytes(manifest))}, saved {_saved_at(path)}")
    best = "saved as the best" if manifest["is_best"] else "not saved as the best"
    finite = "finite" if manifest["is_finite"] else "not finite"
    say(f"number {manifest['sequence']} in its folder, {best}, weights {finite}")
    if versions:
        made_with = ", ".join(f"{name}\xa0{version}" for name, version in versions.items())  # kept on one line
        say(textwrap.fill(f"made with {made_with}", WIDTH, subsequent_indent="  ").replace("\xa0", " "))
    _show_progress(manifest["step"], parts)
    _show_weights(weights)
    say(f"\nfiles ({'SHA-256 verified' if verified else 'sizes verified; --verify compares every byte'})")
    say_table([(f"  {name}", size_text(entry["size"])) for name, entry in manifest["files"].items()], "<>")
    if config:
        say("\nconfig" if "training" in config else "\nconfig (a TrainingConfig, of a run from Python)")
        for line in config_yaml.splitlines():
            say(f"  {line}")


def _show_progress(step: int | None, parts: dict[str, Any]) -> None:
    """Print the counters, and the latest value of each metric."""
    progress, metrics = _mapping(parts.get("progress_state_dict")), _series(parts.get("metrics_state_dict"))
    rows: list[tuple[str, Any]] = [] if step is None else [("step", step)]
    for name in sorted(progress.keys() & {"samples", "tokens"}):
        value: Any = progress[name]
        rows.append((name, value.item() if hasattr(value, "item") and value.numel() == 1 else value))
    rows += [(name, values[-1]) for name, values in metrics.items() if name not in ("step", "samples", "tokens")]
    losses = zip(metrics.get("val_loss", ()), metrics.get("val_step", ()), strict=False)
    best = min((pair for pair in losses if not math.isnan(pair[0])), default=None)
    if rows:
        say("\nprogress, and the latest value of each metric")
        say_table([(f"  {name}", _number(value)) for name, value in rows], "<>")
    if best is not None:
        say(f"  best val_loss {best[0]:.4f}, at step {best[1]:,}")


def _show_weights(weights: dict[str, tuple[str, int]]) -> None:
    """Print the number of parameters, in all and of the largest modules."""
    by_module: Counter[str] = Counter()
    for name, (_, elements) in weights.items():
        modules = name.split(".")[:-1]  # model.layers.3.mlp.up_proj.weight is counted in model.layers
        module = ".".join(modules[:1] + [part for part in modules[1:2] if not part.isdecimal()])
        by_module[module or name] += elements
    dtypes = ", ".join(sorted({dtype for dtype, _ in weights.values()}))
    say(f"\nweights: {by_module.total():,} parameters (and buffers) in {len(weights):,} tensors, {dtypes}")
    say_table([(f"  {name}", f"{elements:,}") for name, elements in by_module.most_common(MOST_MODULES)], "<>")
    if len(by_module) > MOST_MODULES:
        say(f"  and {len(by_module) - MOST_MODULES:,} smaller modules")


def _series(metrics: Any) -> dict[str, list[float]]:
    """Returns the history of each metric, without anything that is not a list of numbers."""
    found = {}
    for name, values in _mapping(metrics).items():
        numbers = values.tolist() if hasattr(values, "tolist") else None
        if isinstance(numbers, list) and numbers and all(isinstance(number, (int, float)) for number in numbers):
            found[name] = numbers
    return found


def _stored_weights(path: Path, manifest: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """Returns {name: (dtype, elements)} of the weights, from the headers of their files.

    Raises:
        CheckpointError: if a header is damaged.
    """
    prefix = f"{MODEL_KEY}/"
    try:
        with ExitStack() as stack:
            files = TensorFiles(path, manifest["files"], prefix, stack)
            shapes = {name: shape for name, shape in files.shapes.items() if name.startswith(prefix)}
            return {
                name.removeprefix(prefix): (files.dtype(name).lower(), math.prod(shape))
                for name, shape in shapes.items()
            }
    except (OSError, SafetensorError, *MALFORMED) as error:
        raise CheckpointError(f"{path}: its tensors cannot be opened: {error}.") from error


def _num_bytes(manifest: dict[str, Any]) -> int:
    """Returns the size of all files in a manifest."""
    return sum(entry["size"] for entry in manifest["files"].values())


def _saved_at(path: Path) -> str:
    """Returns the local time at which the checkpoint was written or copied."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime((path / MANIFEST).stat().st_mtime))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.5g}" if isinstance(value, float) else shortened(str(value), 40)


def _yaml(config: dict[str, Any], path: Path) -> str:
    try:
        return to_yaml(config)
    except Exception as error:  # a stranger's config may hold anything
        raise CheckpointError(f"{path}: its config cannot be shown ({type(error).__name__}: {error}).") from error


def _existing(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    what = "is a file" if folder.exists() else "does not exist"
    raise CheckpointNotFoundError(
        f"{folder} {what}; give a checkpoint, a folder of checkpoints, or the output_dir of a run."
    )


def _nothing_in(folder: Path) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(f"there is no checkpoint in {folder}; give a checkpoint or the output_dir of a run.")


def _checkpoint(folder: Path) -> Path:
    """Returns the checkpoint at `folder`, or the newest one in it."""
    if is_ours(_existing(folder).resolve()):
        return folder
    newest = CheckpointManager(checkpoints_folder(folder)).get_latest()
    if newest is None:
        raise _nothing_in(folder)
    return newest


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _why_not_checkpoint(path: Path) -> str | None:
    """Returns why a folder is not even a damaged checkpoint, or None if it is a checkpoint."""
    if match := HIDDEN.fullmatch(path.name):
        purpose, name = match.groups()
        what = {"staging": "being saved", "replaced": "being replaced", "deleting": "being deleted"}[purpose]
        return f"{name}, {what}, or left by a run that ended"
    if path.is_symlink():
        return "a link, which is not followed"
    if not is_ours(path):
        return "has none of the files of a checkpoint"
    if not NAME.fullmatch(path.name):
        return "does not have the name of a checkpoint"
    return None


def _reason(error: CheckpointError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ").removesuffix(".")
