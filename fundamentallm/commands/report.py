"""Compare runs on one page: curves, settings that differ, samples over time, environment. One HTML file, which opens
without a server and without the internet.
"""

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
"""By which a page of ours is known, to be written over."""
MOST_POINTS = 2000
"""Of a curve; screens have no more."""


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line; returns the exit code.

    Raises:
        FundamentaLLMError: if a folder holds no run, or the page cannot be written.
    """
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's output_dir")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="[report.html]")
    options = parser.parse_args(arguments)
    paths = list(dict.fromkeys(options.runs))
    page = make_page([read_run(path, name) for path, name in zip(paths, names_of(paths), strict=True)])
    write_page(page, options.output)
    say(f"{options.output}: {len(paths)} run{'s' * (len(paths) > 1)}")
    return 0


def names_of(paths: list[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = [os.path.join(*some[-count:]) for some in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read_run(folder: Path, name: str) -> dict[str, Any]:
    """What the page shows of a run, of any age, going on or ended.

    Raises:
        FundamentaLLMError: if the folder has no metrics.jsonl, or it cannot be read.
    """
    # Imported here, with the package of the modules that import torch, so that --help need not wait.
    from fundamentallm.run.folder import SAMPLES, read_starts, restarts
    from fundamentallm.run.json_lines import numbers, read

    log = folder / "metrics.jsonl"
    try:
        if not log.is_file():
            raise FundamentaLLMError(f"{folder} has no metrics.jsonl; give a run's output_dir.")
        lines = [numbers(line) for line in read(log)]
        samples = [
            {key: line[key] for key in ("step", "prompt", "text")}
            for line in read(folder / SAMPLES)
            if all(isinstance(line.get(key), str) for key in ("prompt", "text"))
        ]
        starts, restarted = read_starts(folder), restarts(folder)
    except OSError as error:
        raise FundamentaLLMError(f"{folder} cannot be read: {error}.") from error
    status = _json(folder / "status.json")
    start = starts[-1] if starts else {}
    config = start.get("config") if isinstance(start.get("config"), dict) else _config_of_checkpoint(folder)
    environment = start.get("environment")
    return {
        "name": name,
        "path": str(folder),
        "state": status.get("state"),
        "total_steps": total if isinstance(total := status.get("total_steps"), int) else None,
        "curves": curves(lines),
        "restarts": restarted,
        "left_out": left_out(lines),
        "samples": samples,
        "config": flat_settings(config) if config else None,
        "environment": environment if isinstance(environment, dict) else None,
    }


def curves(lines: list[dict[str, float]]) -> dict[str, tuple[list[int], list[float | None]]]:
    """{name: (steps, values)} of every number of the log, None where it is not finite."""
    found: dict[str, list[tuple[int, float | None]]] = {}
    for line in lines:
        is_validation = "val_loss" in line
        for name, value in line.items():
            if not is_validation or name not in ("step", "epoch"):  # which the training lines say too
                found.setdefault(name, []).append((int(line["step"]), value if math.isfinite(value) else None))
    return {name: _columns(thinned(points)) for name, points in found.items()}


def _columns(points: list[tuple[int, float | None]]) -> tuple[list[int], list[float | None]]:
    return [step for step, _ in points], [value for _, value in points]


def thinned(points: list[tuple[int, float | None]], most: int = MOST_POINTS) -> list[tuple[int, float | None]]:
    """About `most` points at most: of each stretch the first, the smallest, the largest and the last, so that no spike
    and no gap is lost.
    """
    if len(points) <= most:
        return points
    size, kept = -(-4 * len(points) // most), []
    for begin in range(0, len(points), size):
        stretch = range(begin, min(begin + size, len(points)))
        finite = [i for i in stretch if points[i][1] is not None]
        ordered = sorted(finite, key=lambda i: points[i][1] or 0.0)
        gap = [i for i in stretch if points[i][1] is None][:1]
        kept += sorted({stretch[0], stretch[-1], *ordered[:1], *ordered[-1:], *gap})
    return [points[i] for i in kept]


def left_out(lines: list[dict[str, float]]) -> list[tuple[int, str]]:
    """(step, what) of each log line before which steps were left out."""
    marks: list[tuple[int, str]] = []
    for name, what in (("bad_steps", "loss or gradient not finite"), ("skipped_spikes", "a spike left out")):
        before = 0.0
        for line in lines:
            if line.get(name, before) > before:
                marks.append((int(line["step"]), what))
            before = line.get(name, before)
    return marks


def _config_of_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The settings that the newest checkpoint holds, for runs that have not written down their starts."""
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
    """The HTML of runs as `read_run` gives them."""
    data = {"made": datetime.now().astimezone().isoformat(" ", "minutes"), "runs": runs}
    # Within <script>, HTML ends at "</script" and changes its rules at "<!--": no "<" gets in, whatever runs say.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    before, after = template.split("/*DATA*/")
    return before + text + after


def write_page(page: str, path: Path) -> None:
    """Write it, over an older page of ours at most.

    Raises:
        FundamentaLLMError: if there is something else, or it cannot be written.
    """
    with writing(path):
        if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
            raise FundamentaLLMError(f"{path} is there and no report of ours; choose another --output.")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
