"""The verbs of `fundamentallm checkpoints`. Checkpoints may come from strangers: what they say is escaped."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import textwrap
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fundamentallm.atomic import sync
from fundamentallm.checkpoint.manager import HIDDEN, CheckpointManager, checkpoints_folder
from fundamentallm.checkpoint.manifest import MANIFEST, NAME, is_ours, read_manifest, verify
from fundamentallm.checkpoint.reading import explained, export_weights, load_parts
from fundamentallm.commands.output import WIDTH, say, say_table, shortened
from fundamentallm.config.schema import Config, flat_settings
from fundamentallm.config.units import size_text
from fundamentallm.config.yaml_format import to_yaml
from fundamentallm.errors import CheckpointError, CheckpointNotFoundError, ConfigError, Problem, printable
from fundamentallm.inference.loading import load_model
from fundamentallm.models.transformers_format import ADAPTER_CONFIG, KEPT
from fundamentallm.run.step_samples import samples_of_step, text_of_step


def list_command(options: argparse.Namespace) -> int:
    """`checkpoints list`: print a line for each checkpoint, from its manifest and its validation loss."""
    if is_ours(options.checkpoint):
        raise CheckpointError(f"{options.checkpoint} is a checkpoint; give the folder that contains it, or use show.")
    folder = checkpoints_folder(options.checkpoint)
    manager, rows, others = CheckpointManager(folder), [], []
    best, newest = manager.get_best(), manager.get_latest()
    for path in _subfolders(folder):
        if HIDDEN.fullmatch(path.name):
            others.append((f"  {path.name}", "a save in progress, or left by a run that ended"))
        if not _is_checkpoint(path):
            continue
        try:
            manifest = read_manifest(path)
            step, loss = manifest["step"], _val_loss(path, manifest["step"])
        except (CheckpointError, OSError) as error:
            if path.exists():  # otherwise the run has just deleted it
                others.append((f"  {path.name}", _reason(error, path)))
            continue
        marks = ["best"] * (path == best) + ["newest"] * (path == newest)
        marks += ["weights not finite"] * (not manifest["is_finite"])
        row = path.name, "-" if step is None else f"{step:,}", "-" if loss is None else f"{loss:.4f}"
        about = size_text(_num_bytes(manifest)), _saved_at(path), ", ".join(marks)
        rows.append((manifest["sequence"], (*row, *about)))
    if not rows and not others:
        raise _nothing_in(options.checkpoint)
    if rows:
        header = ("checkpoint", "step", "val_loss", "size", "saved", "")
        say_table([header, *(row for _, row in sorted(rows))], "<>>>><")
        say("\nonly sizes were checked; `fundamentallm checkpoints verify` compares every byte")
    if others:
        say("\nnot complete checkpoints:")
        say_table(others, "<<")
    return 0


def verify_command(options: argparse.Namespace) -> int:
    """`checkpoints verify`: print a line for each checkpoint."""
    paths = [options.checkpoint]
    if not is_ours(options.checkpoint):
        paths = [path for path in _subfolders(checkpoints_folder(options.checkpoint)) if _is_checkpoint(path)]
    if not paths:
        raise _nothing_in(options.checkpoint)
    damaged = 0
    for path in paths:
        try:
            manifest = verify(path)
            extra = sorted({entry.name for entry in path.iterdir()} - {*manifest["files"], MANIFEST})
        except (CheckpointError, OSError) as error:
            if path.exists():  # otherwise the run has just deleted it
                damaged += 1
                say(f"{path.name}  {_reason(error, path)}")
            continue
        note = f"; not in the manifest: {printable(', '.join(extra), keep='')}" if extra else ""
        say(f"{path.name}  ok, {len(manifest['files']) + 1} files, {size_text(_num_bytes(manifest))}{note}")
    if damaged and len(paths) > 1:
        say(f"{damaged} of {len(paths)} are damaged")
    return 1 if damaged else 0


def show_command(options: argparse.Namespace) -> int:
    """`checkpoints show`: print what a checkpoint holds, with --verify only after comparing every byte."""
    path = _checkpoint(options.checkpoint)
    manifest = verify(path) if options.verify else read_manifest(path)
    step, loss = manifest["step"], _val_loss(path, manifest["step"])
    parts = load_parts(path, ("config", "versions"))
    config, versions = parts.get("config") or {}, parts.get("versions") or {}
    defaults = flat_settings(dataclasses.asdict(Config(output_dir=str(config.get("output_dir") or ".")).resolved()))
    changed = {name: value for name, value in flat_settings(config).items() if value != defaults.get(name, value)}
    of_python = "" if "training" in config else " (a TrainingConfig, of a run from Python)"
    best = "saved as the best" if manifest["is_best"] else "not saved as the best"
    finite = "finite" if manifest["is_finite"] else "not finite"
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        f"{path}: {size_text(_num_bytes(manifest))}, saved {_saved_at(path)}",
        f"number {manifest['sequence']} in its folder, {best}, weights {finite}",
        *([] if step is None else [f"step {step:,}" + ("" if loss is None else f", val_loss {loss:.4f}")]),
        textwrap.fill(f"made with {made_with}", WIDTH),
        f"\nfiles ({'SHA-256 verified' if options.verify else 'sizes verified; --verify compares every byte'})",
        *(f"  {name}  {size_text(entry['size'])}" for name, entry in manifest["files"].items()),
        f"\nsettings that differ from the defaults\n{textwrap.indent(to_yaml(changed), '  ').rstrip()}",
        f"\nall settings{of_python}\n{textwrap.indent(to_yaml(config), '  ').rstrip()}",
    ]
    say("\n".join(lines))
    return 0


def samples_command(options: argparse.Namespace) -> int:
    """`checkpoints samples`: print indices, and the text if it is available."""
    path = _checkpoint(options.checkpoint)
    found = samples_of_step(path, options.step)
    dataset = None if options.indices_only else text_of_step(path, found, options.source)
    count = len(found.indices)
    say(f"{path}: step {options.step:,} is in epoch {found.epoch:,} (from 0), after {found.samples_before:,} samples")
    if options.step > found.steps_done:
        say(f"not trained yet: the checkpoint has {found.steps_done:,} steps; these samples come if the run resumes")
    if dataset is None:
        reason = "--indices_only" if options.indices_only else "the run has no text of its own, or no tokenizer"
        say(f"no text: {reason}\n\n{count:,} samples, by their index in the dataset:")
        say(", ".join(map(str, found.indices)))
        return 0
    say(f"{count:,} samples, by their index and their first and last token in the training text:\n")
    assert dataset.tokenizer is not None
    rows = []
    for index in found.indices:
        tokens, inputs = dataset.locate(index)
        text = dataset.tokenizer.decode(inputs.tolist(), skip_special_tokens=False)
        rows.append((f"{index:,}", tokens, text))
    if options.full:
        for name, tokens, text in rows:
            say(f"---- sample {name}, tokens {tokens} ----\n{text}")
    else:
        say_table([(name, tokens, shortened(text, WIDTH // 2)) for name, tokens, text in rows], ">><")
    return 0


def consolidate_command(options: argparse.Namespace) -> int:
    """`checkpoints consolidate`: export weights, config and tokenizer."""
    source, output = _checkpoint(options.checkpoint), options.output
    if os.path.lexists(output):
        raise ConfigError(Problem("OUT", str(output), allowed="a new folder", reason="which exists already"))
    if options.merge and not (source / ADAPTER_CONFIG).exists():
        raise ConfigError(Problem("--merge", True, "with the checkpoint of an adapter"))
    staging = output.with_name(f".{output.name}-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        if options.merge:
            _export_merged(source, staging, options.base)
        else:
            export_weights(source, staging)
        staging.rename(output)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{output} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    say(f"{source} -> {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    return 0


def _export_merged(source: Path, folder: Path, base: str | None) -> None:
    """Write an adapter's base model with the adapter merged into its weights, in float32, and the text files."""
    model: Any = load_model(source, base).model
    model.merge_and_unload().cpu().save_pretrained(folder)
    for name in {*KEPT} & {path.name for path in source.iterdir()}:
        shutil.copyfile(source / name, folder / name)
    for file in (*folder.iterdir(), folder):
        sync(file)


def _val_loss(path: Path, step: int | None) -> float | None:
    """Returns the validation loss of a step, or None if the checkpoint has none. Raises CheckpointError if damaged."""
    with explained(path):
        metrics = load_parts(path, ["metrics_state_dict"]).get("metrics_state_dict") or {}
        latest = metrics.get("latest")
        if latest is None:  # without a log, the checkpoint has all values
            latest = {name: values[-1] for name, values in metrics.items()}
        return float(latest["val_loss"]) if "val_loss" in latest and latest.get("val_step") == step else None


def _num_bytes(manifest: dict[str, Any]) -> int:
    return sum(entry["size"] for entry in manifest["files"].values())


def _saved_at(path: Path) -> str:
    """Returns the local time at which the checkpoint was written or copied."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime((path / MANIFEST).stat().st_mtime))


def _nothing_in(folder: Path) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(f"there is no checkpoint in {folder}; give a checkpoint or the output_dir of a run.")


def _checkpoint(folder: Path) -> Path:
    """Returns the checkpoint at `folder`, or the newest one in it."""
    found = folder if is_ours(folder) else CheckpointManager(checkpoints_folder(folder)).get_latest()
    if found is None:
        raise _nothing_in(folder)
    return found


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _is_checkpoint(path: Path) -> bool:
    """Returns whether a folder is a checkpoint, damaged or not. Links are not followed."""
    return is_ours(path) and not path.is_symlink() and NAME.fullmatch(path.name) is not None


def _reason(error: Exception, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ").removesuffix(".")
