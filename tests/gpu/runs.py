"""Real runs by real command lines, each once, however many checks look at it."""

from __future__ import annotations

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
"""Model, sequence length and batch of a run on each kind of device."""


class Skipped(Exception):
    """A check has no meaning here; says why."""


class Runs:
    """Runs in a folder.

    Args:
        folder: of all of them.
        device: cuda or cpu, where everything is small and shows only that the checks themselves work.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self._made: dict[str, Path] = {}

    @property
    def on_gpu(self) -> bool:
        """Whether the numbers mean something."""
        return self.device == "cuda"

    def config(self, name: str, model: Mapping[str, Any] | None = None, **training: Any) -> Config:
        """Of a run on the built-in text; without `model`, of the small one. `sequence_length` counts as training."""
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
        """The output_dir of a run that has ended with exit code `code`; through `accelerate launch` with options."""
        folder = Path(config.output_dir)
        key = f"{folder} {environment}"
        if key in self._made:
            return folder
        settings = folder.with_suffix(".yaml")
        settings.write_text(to_yaml(config))
        launcher = ["accelerate.commands.launch", *launch, "-m"] if launch else []
        command = [sys.executable, "-m", *launcher, module, "--config", str(settings)]
        place = {"PYTHONPATH": str(ROOT)} | ({} if self.on_gpu else {"ACCELERATE_USE_CPU": "true"})
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **place, **(environment or {})}, capture_output=True, text=True
        )
        if done.returncode != code:
            said = re.split(r"[\r\n]+", done.stderr.strip())[-3:]  # lines, or states of a progress bar
            raise AssertionError(f"{' '.join(command)} answered {done.returncode}: {' | '.join(said)}")
        self._made[key] = folder
        return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    """The training lines of a run's log."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """Training losses of a run, by log line."""
    return [line["train_loss"] for line in lines(folder)]


def seen(folder: Path, hook: str) -> dict[str, Any]:
    """What a hook has written."""
    return json.loads((folder / f"{hook}.json").read_text())  # type: ignore[no-any-return]


def state(folder: Path) -> dict[str, Tensor]:
    """Weights and optimizer state of a run's last checkpoint; its log has the time in it."""
    last = max((folder / "checkpoints").glob("step_*"))
    found = {}
    for path in sorted(last.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if path.name.startswith("model") or name.startswith("optimizer_state_dict/"):
                    found[name] = file.get_tensor(name)
    return found
