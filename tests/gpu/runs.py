"""Real runs by real command lines; checks that need the same run share it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from fundamentallm.config.schema import Config
from fundamentallm.config.validation import from_dict
from fundamentallm.config.yaml_format import to_yaml

ROOT = Path(__file__).parents[2]

SMALL = {
    "cuda": ({"d_model": 256, "num_heads": 4, "num_layers": 4}, 256, {"batch_size": 32, "micro_batch_size": 16}),
    "cpu": ({"d_model": 16, "num_heads": 2, "num_layers": 2}, 16, {"batch_size": 4, "micro_batch_size": 2}),
}
"""Model, sequence length and batch of a run, by kind of device."""


class Skipped(Exception):
    """Raised by a check that has no meaning on this device, with the reason."""


class Runs:
    """Runs in a folder.

    Args:
        folder: holds all runs.
        device: cuda or cpu; on a CPU everything is small, and shows only that the checks themselves work.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self._made: dict[str, Path] = {}

    @property
    def on_gpu(self) -> bool:
        """True if the numbers have a meaning."""
        return self.device == "cuda"

    def config(self, name: str, model: Mapping[str, Any] | None = None, **training: Any) -> Config:
        """Returns a config, with a small model by default; `training` may have the sequence_length too."""
        shape, length, batch = SMALL[self.device]
        training = (
            batch | {"log_every_n_steps": 10, "max_steps": 40, "warmup_steps": 5, "learning_rate": 1e-3} | training
        )
        data = {"sequence_length": training.pop("sequence_length", length), "tokenizer": "byte", "train_split": 1.0}
        hooks = ["Facts", *training.pop("hooks", ())]
        values = {
            "output_dir": str(self.folder / name),
            "model": {"vocab_size": 256, **(shape if model is None else model)},
            "data": {**data, "cache_dir": str(self.folder / "cache")},
            "training": {"save_every_n_epochs": None, "eval_every_n_epochs": None, **training},
            "callbacks": [f"tests.gpu.hooks:{hook}" for hook in hooks],
            "sample_tokens": 0,
        }
        return from_dict(Config, values).resolved()

    def run(
        self,
        config: Config,
        launch: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        code: int = 0,
        module: str = "fundamentallm.train",
    ) -> Path:
        """Trains, by `accelerate launch` if `launch` has options, expects exit code `code`, returns the output_dir."""
        folder = Path(config.output_dir)
        key = f"{folder} {environment}"
        if key in self._made:
            return folder
        settings = folder.with_suffix(".yaml")
        settings.write_text(to_yaml(config))
        launcher = ["accelerate.commands.launch", *launch, "-m"] if launch else []
        command = [sys.executable, "-m", *launcher, module, "--config", str(settings)]
        variables = {"PYTHONPATH": str(ROOT)} | ({} if self.on_gpu else {"ACCELERATE_USE_CPU": "true"})
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **variables, **(environment or {})}, capture_output=True, text=True
        )
        if done.returncode != code:
            printed = re.split(r"[\r\n]+", done.stderr.strip())[-3:]  # lines, or states of a progress bar
            raise AssertionError(f"{' '.join(command)} exited with {done.returncode}: {' | '.join(printed)}")
        self._made[key] = folder
        return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    """Returns the training lines of the log of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """Returns the training losses of a run, by log line."""
    return [line["train_loss"] for line in lines(folder)]


def seen(folder: Path, hook: str) -> dict[str, Any]:
    """Returns what a hook has written."""
    return json.loads((folder / f"{hook}.json").read_text())  # type: ignore[no-any-return]


def state(folder: Path) -> dict[str, Tensor]:
    """Returns weights and optimizer state of the last checkpoint of a run."""
    last = max((folder / "checkpoints").glob("step_*"))
    found = {}
    for path in sorted(last.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if path.name.startswith("model") or name.startswith("optimizer_state_dict/"):
                    found[name] = file.get_tensor(name)
    return found
