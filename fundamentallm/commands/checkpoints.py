"""List, verify, show and consolidate checkpoints; show the samples of a step."""

import argparse
import dataclasses
import math
import os
import shutil
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fundamentallm.atomic import sync
from fundamentallm.checkpoint.manager import CheckpointManager, checkpoints_folder
from fundamentallm.checkpoint.manifest import MANIFEST, NAME, is_ours, read_manifest, total_size, verify
from fundamentallm.checkpoint.reading import explained, export_weights, load_parts
from fundamentallm.commands.common import BASE_HELP, add_checkpoint, say, say_table
from fundamentallm.config.saved import flat_settings
from fundamentallm.config.schema import Config, DataConfig
from fundamentallm.config.units import size_text
from fundamentallm.config.yaml_format import to_yaml
from fundamentallm.errors import CheckpointError, ConfigError, Problem
from fundamentallm.inference.loading import find_checkpoint, load_model
from fundamentallm.models.transformers_format import ADAPTER_CONFIG, KEPT
from fundamentallm.run.progress import samples_of_step, text_of_step


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    run = "output_dir of a run, or a folder of checkpoints"

    def add(
        name: str, call: Callable[[Any], None], text: str, folder: str = f"a checkpoint, {run} (its newest)"
    ) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".", allow_abbrev=False)
        verb.set_defaults(call=call)
        add_checkpoint(verb, folder)
        return verb

    add("list", _list, "list checkpoints, oldest first", f"a checkpoint, {run}")
    text = "list checkpoints after comparing every byte with the manifest; exit code 1 if anything is damaged"
    add("verify", _list, text, f"a checkpoint, {run}")
    add("show", _show, "show what a checkpoint holds")
    samples = add("samples", _samples, "show which samples an optimizer step was trained on")
    step = "step, counted from 1 as in metrics.jsonl"
    samples.add_argument("--step", required=True, type=int, metavar="INT", help=step)
    samples.add_argument("--indices_only", action="store_true", help="print no text, so that the data is not needed")
    samples.add_argument("--source", metavar="TEXT", help="where the data is now, as in data.source")
    text = "merge the weights into one file for transformers, also those of a sharded run"
    consolidate = add("consolidate", _consolidate, text)
    consolidate.add_argument("output", metavar="OUT", type=Path, help="a new folder, for from_pretrained")
    consolidate.add_argument("--merge", action="store_true", help="merge an adapter into its base model")
    consolidate.add_argument("--base", metavar="DIR", help=BASE_HELP)
    options = parser.parse_args(arguments)
    options.checkpoint = Path(options.checkpoint)
    with explained(options.checkpoint):
        options.call(options)
    return 0


def _list(options: argparse.Namespace) -> None:
    """`list` and `verify`: print a line for each checkpoint, from its manifest and its validation loss."""
    folder = checkpoints_folder(options.checkpoint)
    paths, manager = [options.checkpoint], CheckpointManager(folder)
    if not is_ours(options.checkpoint):  # links are not followed
        paths = [path for path in folder.glob("*") if NAME.fullmatch(path.name) and not path.is_symlink()]
        paths = list(filter(is_ours, paths)) or [find_checkpoint(options.checkpoint)]
    best, newest, rows, damaged = manager.get_best(), manager.get_latest(), [], 0
    for path in paths:
        try:
            if options.verb == "verify":
                verify(path)
            manifest, *cells = _facts(path)
        except (CheckpointError, OSError) as error:
            if path.exists():  # otherwise the run has just deleted it
                damaged += 1
                rows.append((math.inf, path.name, *"----", str(error).removeprefix(f"{path}: ").removesuffix(".")))
            continue
        marks = ["best"] * (path == best) + ["newest"] * (path == newest)
        marks += ["weights not finite"] * (not manifest["is_finite"])
        rows.append((manifest["sequence"], path.name, *cells, ", ".join(marks)))
    say_table([("checkpoint", "step", "val_loss", "size", "saved", ""), *(row[1:] for row in sorted(rows))], "<>>>><")
    if options.verb == "list":
        say("\nonly sizes were checked; `fundamentallm checkpoints verify` compares every byte")
    elif damaged:
        raise CheckpointError(f"{damaged} of {len(rows)} checkpoints are damaged.")


def _show(options: argparse.Namespace) -> None:
    path = find_checkpoint(options.checkpoint)
    manifest, step, loss, size, saved_at = _facts(path)
    parts = load_parts(path, ("config", "versions"))
    config, versions = parts.get("config") or {}, parts.get("versions") or {}
    defaults = flat_settings(dataclasses.asdict(Config(output_dir=str(config.get("output_dir") or ".")).resolved()))
    tokenizer = config.get("data", {}).get("tokenizer", DataConfig.tokenizer)
    defaults["data.end_of_text"] = DataConfig(tokenizer=tokenizer).resolved().end_of_text
    changed = {name: value for name, value in flat_settings(config).items() if value != defaults.get(name, value)}
    about = ", saved as the best" * bool(manifest["is_best"]) + ", weights not finite" * (not manifest["is_finite"])
    say(f"{path}: {size}, saved {saved_at}\nstep {step}, val_loss {loss}{about}")
    say(textwrap.fill(f"made with {', '.join(f'{name} {version}' for name, version in versions.items())}", 100))
    say("\nfiles")
    say_table([("", name, size_text(entry["size"])) for name, entry in manifest["files"].items()], "<<>")
    for title, settings in (("settings that differ from the defaults", changed), ("all settings", config)):
        say(f"\n{title}\n{textwrap.indent(to_yaml(settings), '  ').rstrip()}")


def _samples(options: argparse.Namespace) -> None:
    path = find_checkpoint(options.checkpoint)
    found = samples_of_step(path, options.step)
    dataset = None if options.indices_only else text_of_step(path, found, options.source)
    say(f"{path}: step {options.step:,} is in epoch {found.epoch:,} (from 0), after {found.samples_before:,} samples")
    if options.step > found.steps_done:
        say(f"not trained yet: the checkpoint has {found.steps_done:,} steps; these samples come if the run resumes")
    if dataset is None:
        reason = "--indices_only" if options.indices_only else "the run has no text of its own, or no tokenizer"
        say(f"no text: {reason}\n\n{len(found.indices):,} samples, by their index in the dataset:")
        say(", ".join(map(str, found.indices)))
        return
    assert dataset.tokenizer is not None
    for index in found.indices:
        tokens, inputs = dataset.locate(index)
        text = dataset.tokenizer.decode(inputs.tolist(), skip_special_tokens=False)
        say(f"---- sample {index:,}, tokens {tokens} ----\n{text}")


def _consolidate(options: argparse.Namespace) -> None:
    source, output = find_checkpoint(options.checkpoint), options.output
    if os.path.lexists(output):
        raise ConfigError(Problem("OUT", str(output), allowed="a new folder", reason="which exists already"))
    if options.merge and not (source / ADAPTER_CONFIG).exists():
        raise ConfigError(Problem("--merge", True, "with the checkpoint of an adapter"))
    staging = output.with_name(f".{output.name}-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        if options.merge:  # in float32
            model: Any = load_model(source, options.base).model
            model.merge_and_unload().cpu().save_pretrained(staging)
            for name in {*KEPT} & {path.name for path in source.iterdir()}:
                shutil.copyfile(source / name, staging / name)
        else:
            export_weights(source, staging)
        for file in (*staging.iterdir(), staging):
            sync(file)
        staging.rename(output)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{output} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    say(f"{source} -> {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


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
    return manifest, step, loss, size_text(total_size(manifest)), saved_at
