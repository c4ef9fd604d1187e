"""Look at checkpoints: what there is, whether it is intact, what is in it, and what a step was trained on."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fundamentallm.commands.output import WIDTH, printable, say, say_table, shortened, size_text
from fundamentallm.errors import CheckpointError, CheckpointNotFoundError, ConfigError, FundamentaLLMError


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line; returns the exit code.

    Raises:
        FundamentaLLMError: if there is no checkpoint, it is damaged, or an argument is wrong.
    """
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    a_run = "a run's output_dir, or a folder of checkpoints"

    def add(name: str, text: str, allowed: str, command: Any) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".", allow_abbrev=False)
        verb.add_argument("folder", metavar="DIR", type=Path, help=allowed)
        verb.set_defaults(command=command)
        return verb

    add("list", "what checkpoints there are, oldest first, and what is none", a_run, list_all)
    add("verify", "compare every byte with the manifest; exit code 1 unless all is intact",
        f"a checkpoint, {a_run}", verify_all)  # fmt: skip
    show = add(
        "show", "what a checkpoint holds and where it comes from", f"a checkpoint, {a_run} (its newest)", show_one
    )
    show.add_argument("--verify", action="store_true", help="compare every byte with the manifest first")
    samples = add("samples", "which samples, and which text, an optimizer step was trained on",
                  f"{a_run} (its newest checkpoint), or a checkpoint", show_samples)  # fmt: skip
    samples.add_argument("--step", required=True, type=int, metavar="N", help="the step, from 1, as in metrics.jsonl")
    samples.add_argument("--full", action="store_true", help="all of each text, instead of one line")
    samples.add_argument("--indices_only", action="store_true", help="no text, so that it need not be there")
    samples.add_argument("--source", metavar="TEXT", help="where the text is now, if it has moved; as data.source")
    merge = add("consolidate", "put the weights, whole, into one file for transformers, whoever holds them in slices",
                f"a checkpoint, {a_run} (its newest)", consolidate_one)  # fmt: skip
    merge.add_argument("output", metavar="OUT", type=Path, help="a new folder, for from_pretrained")
    merge.add_argument("--raw", action="store_true", help="the weights as trained, instead of their moving average")
    options = parser.parse_args(arguments)
    try:
        code: int = options.command(options)
    except BrokenPipeError:  # an OSError, and none of the folder's
        raise
    except ConfigError as error:  # which may quote what a stranger wrote, as any error here may
        raise ConfigError([printable(problem) for problem in error.problems]) from error
    except FundamentaLLMError as error:
        raise type(error)(printable(str(error))) from error
    except OSError as error:
        raise CheckpointError(f"{options.folder} cannot be read: {error}.") from error
    return code


# Below, torch is imported where it is needed, so that --help need not wait for it.


def list_all(options: argparse.Namespace) -> int:
    """`checkpoints list`: from manifests, sizes and the recorded history alone."""
    from fundamentallm.checkpoint.manager import HIDDEN, CheckpointManager, checkpoints_folder
    from fundamentallm.checkpoint.manifest import read_manifest
    from fundamentallm.checkpoint.reading import is_ours, load_parts
    from fundamentallm.commands.checkpoint_contents import num_bytes, saved_at, series

    if is_ours(_existing(options.folder).resolve()):
        raise CheckpointError(f"{options.folder} is a checkpoint; give the folder it is in, or use show or verify.")
    folder = checkpoints_folder(options.folder)
    manager, rows, others = CheckpointManager(folder), [], []
    best, newest = manager.get_best(), manager.get_latest()
    for path in _entries(folder):
        if reason := _why_none(path):
            others.append((path.name, reason))
            continue
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            others.append((path.name, _reason(error, path)))
            continue
        marks = [text for text, is_so in [("best", path == best), ("newest", path == newest)] if is_so]
        marks += ["weights not finite"] * (not manifest["is_finite"])
        history = {}
        try:
            history = series(load_parts(path, ["metrics_state_dict"]).get("metrics_state_dict"))
        except CheckpointError as error:
            marks.append(_reason(error, path))
        losses = dict(zip(history.get("val_step", ()), history.get("val_loss", ()), strict=False))
        step, loss = manifest["step"], losses.get(manifest["step"])
        row = path.name, "-" if step is None else f"{step:,}", "-" if loss is None else f"{loss:.4f}"
        rows.append((manifest["sequence"], (*row, size_text(num_bytes(manifest)), saved_at(path), ", ".join(marks))))
    if not rows and not any(is_ours(folder / name) or HIDDEN.fullmatch(name) for name, _ in others):
        raise _nothing_in(options.folder)  # nor are a stranger's folders listed
    table = [row for _, row in sorted(rows, key=lambda item: item[0])]
    if table:
        say_table([("checkpoint", "step", "val_loss", "size", "saved", ""), *table], "<>>>><")
    if others:
        say("\nno whole checkpoints:" if table else "no whole checkpoints:")
        say_table([(f"  {name}", reason) for name, reason in others], "<<")
    return 0


def verify_all(options: argparse.Namespace) -> int:
    """`checkpoints verify`: a line each."""
    from fundamentallm.checkpoint.manager import checkpoints_folder
    from fundamentallm.checkpoint.manifest import MANIFEST, verify
    from fundamentallm.checkpoint.reading import is_ours
    from fundamentallm.commands.checkpoint_contents import num_bytes

    folder, paths = _existing(options.folder), []
    if is_ours(folder.resolve()):
        paths = [folder]
    else:
        paths = [path for path in _entries(checkpoints_folder(folder)) if _why_none(path) is None]
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
        besides = sorted({entry.name for entry in path.iterdir()} - {*manifest["files"], MANIFEST})
        more = f"; not in the manifest: {printable(', '.join(besides))}" if besides else ""
        say(f"{path.name}  ok, {len(manifest['files']) + 1} files, {size_text(num_bytes(manifest))}{more}")
    if damaged and len(paths) > 1:
        say(f"{damaged} of {len(paths)} are damaged")
    return 1 if damaged else 0


def show_one(options: argparse.Namespace) -> int:
    """`checkpoints show`."""
    from fundamentallm.commands.checkpoint_contents import show

    show(_checkpoint(options.folder), options.verify)
    return 0


def show_samples(options: argparse.Namespace) -> int:
    """`checkpoints samples`."""
    from fundamentallm.run.step_samples import samples_of_step, text_of_step, texts, why_no_text

    path = _checkpoint(options.folder)
    found = samples_of_step(path, options.step)
    no_text = "--indices_only" if options.indices_only else why_no_text(path, found)
    dataset = None if no_text else text_of_step(path, found, options.source)
    first, count = found.samples_before, len(found.indices)
    say(f"{path}: step {options.step:,} is in epoch {found.epoch:,} (from 0), after {first:,} samples of the run")
    if options.step > found.steps_done:
        say(f"not trained yet: the checkpoint has {found.steps_done:,} steps; this is what comes if the run goes on so")
    if dataset is None:
        say(f"no text: {no_text}\n\n{count:,} samples, by their index in the dataset:")
        say(", ".join(map(str, found.indices)))
        return 0
    say(f"{count:,} samples, by their index and their first and last token in the training text:\n")
    rows = [(f"{index:,}", where, text) for index, where, text in texts(dataset, found.indices)]
    if options.full:
        for index, place, text in rows:
            say(f"---- sample {index}, tokens {place} ----\n{text}")
    else:
        left = max(WIDTH - sum(max(map(len, column)) + 2 for column in list(zip(*rows, strict=True))[:2]), 20)
        say_table([(index, place, shortened(text, left)) for index, place, text in rows], ">><")
    return 0


def consolidate_one(options: argparse.Namespace) -> int:
    """`checkpoints consolidate`: weights, config and tokenizer; a tensor in memory at a time."""
    import shutil

    from fundamentallm.checkpoint.reading import export_weights

    source, output = _checkpoint(options.folder), options.output
    if os.path.lexists(output):
        raise ConfigError(f"OUT is {str(output)!r}, which is there already; give a new folder.")
    staging = output.with_name(f".{output.name}-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        export_weights(source, staging, options.raw)
        staging.rename(output)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{output} cannot be written: {error}; free some space, or choose another."
            ) from error
        raise
    files = sorted(path.name for path in output.iterdir())
    say(f"{source} -> {output}: {', '.join(files)}")
    return 0


# ---- finding ----------------------------------------------------------------------------------------------


def _existing(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    what = "is a file" if folder.exists() else "does not exist"
    raise CheckpointNotFoundError(
        f"{folder} {what}; give a checkpoint, a folder of checkpoints, or a run's output_dir."
    )


def _nothing_in(folder: Path) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(f"there is no checkpoint in {folder}; give a checkpoint, or a run's output_dir.")


def _checkpoint(folder: Path) -> Path:
    """The checkpoint at `folder`, or the newest in it."""
    from fundamentallm.checkpoint.manager import CheckpointManager, checkpoints_folder
    from fundamentallm.checkpoint.reading import is_ours

    if is_ours(_existing(folder).resolve()):
        return folder
    newest = CheckpointManager(checkpoints_folder(folder)).get_latest()
    if newest is None:
        raise _nothing_in(folder)
    return newest


def _entries(folder: Path) -> list[Path]:
    """Folders, and links, that are or might be checkpoints."""
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _why_none(path: Path) -> str | None:
    """Why a folder among checkpoints is not even a damaged one; None: it is one."""
    from fundamentallm.checkpoint.manager import HIDDEN
    from fundamentallm.checkpoint.manifest import NAME
    from fundamentallm.checkpoint.reading import is_ours

    if match := HIDDEN.fullmatch(path.name):
        purpose, name = match.groups()
        what = {"staging": "being saved", "replaced": "being replaced", "deleting": "being deleted"}[purpose]
        return f"{name}, {what}, or left by a run that ended"
    if path.is_symlink():
        return "a link, which is not followed"
    if not is_ours(path):
        return "has none of a checkpoint's files"
    if not NAME.fullmatch(path.name):
        return "set aside as damaged; never resumed" if "~damaged-" in path.name else "has no name of a checkpoint's"
    return None


def _reason(error: CheckpointError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ").removesuffix(".")
