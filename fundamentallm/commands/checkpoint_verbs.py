"""The verbs of `fundamentallm checkpoints`. Checkpoints may come from strangers: what they say is escaped."""

import argparse
import dataclasses
import math
import os
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from safetensors import SafetensorError

from fundamentallm.atomic import sync
from fundamentallm.checkpoint.manager import CheckpointManager, checkpoints_folder
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

T = TypeVar("T")


def list_command(options: argparse.Namespace) -> int:
    """`checkpoints list`: print a line for each checkpoint, from its manifest and its validation loss."""
    manager = CheckpointManager(checkpoints_folder(options.checkpoint))
    best, newest, rows = manager.get_best(), manager.get_latest(), []
    for path, found, why in _read_each(options.checkpoint, _facts):
        if found is None:
            rows.append((math.inf, path.name, *"----", why))
            continue
        manifest, *cells = found
        marks = ["best"] * (path == best) + ["newest"] * (path == newest)
        marks += ["weights not finite"] * (not manifest["is_finite"])
        rows.append((manifest["sequence"], path.name, *cells, ", ".join(marks)))
    say_table([("checkpoint", "step", "val_loss", "size", "saved", ""), *(row[1:] for row in sorted(rows))], "<>>>><")
    say("\nonly sizes were checked; `fundamentallm checkpoints verify` compares every byte")
    return 0


def verify_command(options: argparse.Namespace) -> int:
    """`checkpoints verify`: print a line for each checkpoint."""
    count = damaged = 0
    for path, found, why in _read_each(options.checkpoint, _verified):
        count += 1
        damaged += found is None
        say(f"{path.name}  {found or why}")
    if damaged and count > 1:
        say(f"{damaged} of {count} are damaged")
    return 1 if damaged else 0


def _verified(path: Path) -> str:
    manifest = verify(path)
    extra = sorted({entry.name for entry in path.iterdir()} - {*manifest["files"], MANIFEST})
    note = f"; not in the manifest: {printable(', '.join(extra), keep='')}" if extra else ""
    return f"ok, {len(manifest['files']) + 1} files, {_size(manifest)}{note}"


def show_command(options: argparse.Namespace) -> int:
    """`checkpoints show`: print what a checkpoint holds, with --verify only after comparing every byte."""
    path = _checkpoint(options.checkpoint)
    if options.verify:
        verify(path)
    manifest, step, loss, size, saved_at = _facts(path)
    parts = load_parts(path, ("config", "versions"))
    config, versions = parts.get("config") or {}, parts.get("versions") or {}
    defaults = flat_settings(dataclasses.asdict(Config(output_dir=str(config.get("output_dir") or ".")).resolved()))
    changed = {name: value for name, value in flat_settings(config).items() if value != defaults.get(name, value)}
    of_python = "" if "training" in config else " (a TrainingConfig, of a run from Python)"
    best = "saved as the best" if manifest["is_best"] else "not saved as the best"
    finite = "finite" if manifest["is_finite"] else "not finite"
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        f"{path}: {size}, saved {saved_at}",
        f"number {manifest['sequence']} in its folder, {best}, weights {finite}",
        f"step {step}, val_loss {loss}",
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
    count = f"{len(found.indices):,}"
    say(f"{path}: step {options.step:,} is in epoch {found.epoch:,} (from 0), after {found.samples_before:,} samples")
    if options.step > found.steps_done:
        say(f"not trained yet: the checkpoint has {found.steps_done:,} steps; these samples come if the run resumes")
    if dataset is None:
        reason = "--indices_only" if options.indices_only else "the run has no text of its own, or no tokenizer"
        say(f"no text: {reason}\n\n{count} samples, by their index in the dataset:")
        say(", ".join(map(str, found.indices)))
        return 0
    say(f"{count} samples, by their index and their first and last token in the training text:\n")
    assert dataset.tokenizer is not None
    rows = []
    for index in found.indices:
        tokens, inputs = dataset.locate(index)
        text = dataset.tokenizer.decode(inputs.tolist(), skip_special_tokens=False)
        if options.full:
            say(f"---- sample {index:,}, tokens {tokens} ----\n{text}")
        else:
            rows.append((f"{index:,}", tokens, shortened(text, WIDTH // 2)))
    say_table(rows, ">><")
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


def _facts(path: Path) -> tuple[dict[str, Any], str, str, str, str]:
    """Returns the manifest, and as text: step, validation loss of this step, size, and when it was written."""
    manifest = read_manifest(path)
    with explained(path):
        metrics = load_parts(path, ["metrics_state_dict"]).get("metrics_state_dict") or {}
        latest = metrics.get("latest")
        if latest is None:  # without a log, the checkpoint has all values
            latest = {name: values[-1] for name, values in metrics.items()}
        has_loss = "val_loss" in latest and latest.get("val_step") == manifest["step"]
        loss = f"{float(latest['val_loss']):.4f}" if has_loss else "-"
    step = "-" if manifest["step"] is None else f"{manifest['step']:,}"
    saved_at = time.strftime("%Y-%m-%d %H:%M", time.localtime((path / MANIFEST).stat().st_mtime))
    return manifest, step, loss, _size(manifest), saved_at


def _size(manifest: dict[str, Any]) -> str:
    return size_text(sum(entry["size"] for entry in manifest["files"].values()))


def _checkpoint(folder: Path) -> Path:
    """Returns the checkpoint at `folder`, or the newest one in it."""
    found = folder if is_ours(folder) else CheckpointManager(checkpoints_folder(folder)).get_latest()
    return found or _none_in(folder)


def _none_in(folder: Path) -> NoReturn:
    raise CheckpointNotFoundError(f"there is no checkpoint in {folder}; give one, or the output_dir of a run.")


def _read_each(folder: Path, read: Callable[[Path], T]) -> Iterator[tuple[Path, T | None, str]]:
    """Yields a checkpoint, or each one in a folder, and what `read` returns of it, or None and why it cannot."""
    paths = [folder]
    if not is_ours(folder):  # links are not followed
        below = checkpoints_folder(folder)
        entries = sorted(below.iterdir()) if below.is_dir() else []
        paths = [path for path in entries if NAME.fullmatch(path.name) and is_ours(path) and not path.is_symlink()]
    for path in paths or _none_in(folder):
        try:
            yield path, read(path), ""
        except (CheckpointError, OSError) as error:
            if path.exists():  # otherwise the run has just deleted it
                yield path, None, str(error).removeprefix(f"{path}: ").removesuffix(".")
