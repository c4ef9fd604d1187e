"""Sweep over learning rates and optimizers. It can be killed and run again: finished runs are left alone.

    python examples/sweep.py                        on text bundled with Python
    python examples/sweep.py --data.source my.txt   arguments apply to every run
    python examples/sweep.py --smoke                seconds

A run that fails prints its error, and the next one starts. Under Slurm, an array of jobs distributes the runs over
machines: sbatch --array=0-5 --wrap 'python examples/sweep.py'
"""

import itertools
import json
import os
import sys
from pathlib import Path

from fundamentallm import train

FOLDER = Path("runs/sweep")
GRID = {"training.optimizer": ["adamw", "muon"], "training.learning_rate": ["2e-3", "5e-3", "1e-2"]}
BASE = {
    **{"model.d_model": "128", "model.num_layers": "4", "model.num_heads": "4", "data.sequence_length": "128"},
    **{"training.batch_size": "16", "training.max_steps": "200", "training.warmup_steps": "20", "sample_tokens": "0"},
}

common = sys.argv[1:]
if "--smoke" in common:
    common.remove("--smoke")
    FOLDER, GRID["training.learning_rate"] = Path("runs/sweep_smoke"), ["5e-3"]
    BASE |= {"model.d_model": "32", "model.num_layers": "1", "training.max_steps": "10", "training.warmup_steps": "2"}

runs = {}
for values in itertools.product(*GRID.values()):
    settings = dict(zip(GRID, values, strict=True))
    runs[FOLDER / "_".join(values)] = {**BASE, **settings}

task, tasks = (int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default)) for name, default in (("ID", 0), ("COUNT", 1)))
for output_dir, settings in list(runs.items())[task::tasks]:
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    train.main(["--output_dir", str(output_dir), *words, *common])


def best_loss(output_dir: Path) -> float:
    """Returns the smallest validation loss of a run, or infinity if there is none yet."""
    log = output_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return min((line["val_loss"] for line in lines if isinstance(line.get("val_loss"), float)), default=float("inf"))


print("\nbest val_loss")
for output_dir in sorted(runs, key=best_loss):
    print(f"{best_loss(output_dir):13.4f}  {output_dir.name}")
