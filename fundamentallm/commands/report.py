"""Compare runs on one HTML page: curves, settings that differ, samples, environment. It needs no server."""

import argparse
import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fundamentallm.atomic import write_text
from fundamentallm.commands.common import say
from fundamentallm.config.saved import flat_settings
from fundamentallm.errors import FundamentaLLMError, writing

MOST_POINTS = 2000  # of a curve; screens have no more columns


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="[report.html]")
    options = parser.parse_args(arguments)
    runs = [read_run(path) for path in dict.fromkeys(options.runs)]
    data = {"made": datetime.now().astimezone().isoformat(" ", "minutes"), "runs": runs}
    # In <script>, HTML gives a meaning to "</script" and "<!--", and runs may contain any text.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    with writing(options.output):
        write_text(options.output, template.replace("/*DATA*/", text))
    say(f"{options.output}: {len(runs)} run{'s' * (len(runs) > 1)}")
    return 0


def read_run(folder: Path) -> dict[str, Any]:
    """Returns what the page shows of a run; parts that the run lacks are None or empty."""
    # Imported here, so that --help need not wait for torch.
    from fundamentallm.run.folder import LOG, SAMPLES, numbers, read_log, read_starts, read_status, restarts

    if not (folder / LOG).is_file():
        raise FundamentaLLMError(f"{folder} has no {LOG}; give the output_dir of a run.")
    try:
        lines = [numbers(line) for line in read_log(folder / LOG)]
        starts, status = read_starts(folder), read_status(folder)
        count_seconds(lines, starts)
        start = starts[-1] if starts else {}
        return {
            "name": str(folder),
            "state": status.get("state"),
            "total_steps": status.get("total_steps"),
            "data": (start.get("data") or [None])[-1],  # fingerprint of the validation data
            "curves": curves(lines),
            "restarts": restarts(folder),
            "samples": [{key: line[key] for key in ("step", "prompt", "text")} for line in read_log(folder / SAMPLES)],
            "config": flat_settings(start["config"]) if start.get("config") else None,
            "environment": start.get("environment"),
        }
    except Exception as error:  # the files of a run from elsewhere may hold anything
        raise FundamentaLLMError(f"{folder} cannot be read ({type(error).__name__}: {error}).") from error


def count_seconds(lines: list[dict[str, float]], starts: list[dict[str, Any]]) -> None:
    """Replaces the time of day of each line by the seconds that the run has taken, in all launches together."""
    launches = [(start["step"], datetime.fromisoformat(start["time"]).timestamp()) for start in starts]
    seconds, before = 0.0, math.inf
    for line in lines:
        while launches and launches[0][0] < line["step"]:
            before = launches.pop(0)[1]
        if "time" in line:
            seconds += max(0.0, line["time"] - before)
            before, line["time"] = line["time"], round(seconds, 3)


def curves(lines: list[dict[str, float]]) -> dict[str, list[tuple[float | None, ...]]]:
    """Returns {name: (steps, values)} of every number in the log; values that are not finite are None."""
    found: dict[str, list[tuple[int, float | None]]] = {}
    for line in lines:
        for name, value in line.items():
            found.setdefault(name, []).append((int(line["step"]), value if math.isfinite(value) else None))
    return {name: list(zip(*thinned(points), strict=True)) for name, points in found.items()}


def thinned(points: list[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    """Returns about MOST_POINTS: the first, the last, and the smallest (or a gap) and largest of each interval."""
    if len(points) <= MOST_POINTS:
        return points
    size, kept = 2 * len(points) // MOST_POINTS + 1, {points[0], points[-1]}
    for begin in range(0, len(points), size):
        by_value = sorted(points[begin : begin + size], key=lambda point: -math.inf if point[1] is None else point[1])
        kept |= {by_value[0], by_value[-1]}
    return sorted(kept, key=lambda point: point[0])
