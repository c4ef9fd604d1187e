"""Compare runs on one HTML page: curves, settings that differ, samples, environment. The page needs no server."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fundamentallm.commands.output import say
from fundamentallm.config.schema import flat_settings
from fundamentallm.errors import CheckpointError, FundamentaLLMError, writing

MARK = '<meta name="generator" content="fundamentallm report">'
"""Identifies a report, which may be overwritten."""
MOST_POINTS = 2000
"""Points of a curve. Screens have no more columns."""


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line and return the exit code.

    Raises:
        FundamentaLLMError: if a folder holds no run, or the page cannot be written.
    """
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="[report.html]")
    options = parser.parse_args(arguments)
    paths = list(dict.fromkeys(options.runs))
    page = make_page([read_run(path, name) for path, name in zip(paths, names_of(paths), strict=True)])
    write_page(page, options.output)
    say(f"{options.output}: {len(paths)} run{'s' * (len(paths) > 1)}")
    return 0


def names_of(paths: list[Path]) -> list[str]:
    """Returns the last parts of the paths, as many as make the names distinct."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = [os.path.join(*some[-count:]) for some in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read_run(folder: Path, name: str) -> dict[str, Any]:
    """Returns what the page shows of a run; parts that an old run lacks are None or empty.

    Raises:
        FundamentaLLMError: if the folder has no metrics.jsonl, or it cannot be read.
    """
    # Imported here, so that --help need not wait for torch.
    from fundamentallm.run.folder import SAMPLES, read_starts, restarts
    from fundamentallm.run.json_lines import numbers, read

    log = folder / "metrics.jsonl"
    try:
        if not log.is_file():
            raise FundamentaLLMError(f"{folder} has no metrics.jsonl; give the output_dir of a run.")
        lines = [numbers(line) for line in read(log)]
        samples = [
            {key: line[key] for key in ("step", "prompt", "text")}
            for line in read(folder / SAMPLES)
            if all(isinstance(line.get(key), str) for key in ("prompt", "text"))
        ]
        starts, restarted = read_starts(folder), restarts(folder)
    except OSError as error:
        raise FundamentaLLMError(f"{folder} cannot be read: {error}.") from error
    status, start = _json(folder / "status.json"), starts[-1] if starts else {}
    config, environment, total_steps = start.get("config"), start.get("environment"), status.get("total_steps")
    config = config if isinstance(config, dict) else _config_of_checkpoint(folder)
    return {
        "name": name,
        "path": str(folder),
        "state": status.get("state"),
        "total_steps": total_steps if isinstance(total_steps, int) else None,
        "curves": curves(lines),
        "restarts": restarted,
        "skipped": skipped(lines),
        "samples": samples,
        "config": flat_settings(config) if config else None,
        "environment": environment if isinstance(environment, dict) else None,
    }


def curves(lines: list[dict[str, float]]) -> dict[str, tuple[list[int], list[float | None]]]:
    """Returns {name: (steps, values)} of every number in the log; values that are not finite are None."""
    found: dict[str, list[tuple[int, float | None]]] = {}
    for line in lines:
        repeated = ("step", "epoch") if "val_loss" in line else ()  # which training lines have too
        for name, value in line.items():
            if name not in repeated:
                found.setdefault(name, []).append((int(line["step"]), value if math.isfinite(value) else None))
    kept = {name: thinned(points) for name, points in found.items()}
    return {name: ([step for step, _ in points], [value for _, value in points]) for name, points in kept.items()}


def thinned(points: list[tuple[int, float | None]], most: int = MOST_POINTS) -> list[tuple[int, float | None]]:
    """Returns about `most` points: of each interval the first, last, smallest and largest point, and the first gap."""
    if len(points) <= most:
        return points
    size, kept = -(-4 * len(points) // most), []
    for begin in range(0, len(points), size):
        interval = range(begin, min(begin + size, len(points)))
        ordered = sorted((i for i in interval if points[i][1] is not None), key=lambda i: points[i][1] or 0.0)
        gap = [i for i in interval if points[i][1] is None][:1]
        kept += sorted({interval[0], interval[-1], *ordered[:1], *ordered[-1:], *gap})
    return [points[i] for i in kept]


def skipped(lines: list[dict[str, float]]) -> list[tuple[int, str]]:
    """Returns (step, reason) of each log line before which steps were skipped."""
    marks: list[tuple[int, str]] = []
    for name, reason in (("bad_steps", "loss or gradient not finite"), ("skipped_spikes", "a spike was skipped")):
        before = 0.0
        for line in lines:
            if line.get(name, before) > before:
                marks.append((int(line["step"]), reason))
            before = line.get(name, before)
    return marks


def _config_of_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Returns the config in the newest checkpoint, for runs without starts.jsonl."""
    from fundamentallm.checkpoint.manager import CheckpointManager, checkpoints_folder
    from fundamentallm.checkpoint.reading import load_parts

    try:
        newest = CheckpointManager(checkpoints_folder(folder)).get_latest()
        config = load_parts(newest, ["config"]).get("config") if newest is not None else None
    except (CheckpointError, OSError):
        return None
    return config if isinstance(config, dict) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def make_page(runs: list[dict[str, Any]]) -> str:
    """Returns the HTML of runs from `read_run`."""
    data = {"made": datetime.now().astimezone().isoformat(" ", "minutes"), "runs": runs}
    # In <script>, HTML gives a meaning to "</script" and "<!--", and runs may contain any text.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    before, after = template.split("/*DATA*/")
    return before + text + after


def write_page(page: str, path: Path) -> None:
    """Write the page, replacing an older report but no other file.

    Raises:
        FundamentaLLMError: if another file is in the way, or the page cannot be written.
    """
    with writing(path):
        if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
            raise FundamentaLLMError(f"{path} exists and is not a report; choose another --output.")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
