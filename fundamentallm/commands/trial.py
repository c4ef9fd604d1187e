"""Short runs of a config in folders of their own, here and in child processes: what `doctor` examines.

`python -m fundamentallm.commands.trial FOLDER` is such a child: it makes the run that FOLDER/trial.json
describes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader, Subset

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.config.registry import resolve
from fundamentallm.config.schema import Config
from fundamentallm.config.validation import from_dict
from fundamentallm.data.loaders import device_batches, step_sampler
from fundamentallm.errors import ConfigError, FundamentaLLMError, report
from fundamentallm.training.callbacks.base import Callback, RunView
from fundamentallm.training.callbacks.console import LoggingCallback, ProgressCallback
from fundamentallm.training.callbacks.curves import VisualizationCallback
from fundamentallm.training.trainer import Trainer

OWN_SETTINGS = ("checkpoint_dir", "micro_batch_size", "log_every_n_steps", "eval_every_n_steps", "save_every_n_steps")
"""Training settings that trials depend on, so that a function behind --trainer has to heed them."""
CHECKPOINT_SECONDS = 60.0
"""How long a run that is to be killed waits for its first checkpoint."""


def trial_config(config: Config, folder: Path, dropout: bool = True, **training: Any) -> Config:
    """The run of `config` in `folder`: same horizon and schedule, logged at every step, nothing by epoch."""
    settings: dict[str, Any] = {
        "checkpoint_dir": str(folder / "run" / "checkpoints"),
        "resume": "auto",
        "log_every_n_steps": 1,
        "early_stopping_patience": None,
        "compile": None,  # for a few steps, each trial would take a minute
        **dict.fromkeys(("eval_every_n_steps", "eval_every_n_epochs", "save_every_n_steps", "save_every_n_epochs")),
        **training,
    }
    return dataclasses.replace(
        config,
        output_dir=str(folder / "run"),
        trackers=[],
        tracker_options={},
        model=config.model if dropout else dataclasses.replace(config.model, dropout=0.0),
        training=dataclasses.replace(config.training, **settings),
    )


def make_trainer(name: str, config: Config) -> Trainer:
    """The Trainer that the function `name` (--trainer) makes of a trial's config.

    Raises:
        ConfigError: if it makes something else, or a Trainer that would not stay in the trial's folder.
    """
    trainer = resolve("--trainer", name, {})(config)
    if not isinstance(trainer, Trainer):
        raise ConfigError(
            f"--trainer is {name!r}, which made a {type(trainer).__name__}; allowed: a function from a Config to a "
            "fundamentallm.Trainer."
        )
    pairs = [
        (setting, getattr(trainer.config.training, setting), getattr(config.training, setting))
        for setting in OWN_SETTINGS
    ]
    if trainer.output_dir is not None:
        pairs.append(("output_dir", trainer.config.output_dir, config.output_dir))
    if wrong := [f"{setting} {made!r} for {given!r}" for setting, made, given in pairs if made != given]:
        raise ConfigError(
            f"--trainer is {name!r}, whose Trainer has {', '.join(wrong)}; hand the config it is given on to the "
            "Trainer, so that trials stay in their own folder."
        )
    return trainer


class Until(Callback):
    """Records a run and stops it when `enough` says so."""

    def __init__(self, enough: Callable[[Until], bool]) -> None:
        self.enough = enough
        self.started_at = 0  # step the run went on from
        self.losses: list[float] = []  # of each step
        self.times: list[float] = []  # of the beginning and of each step's end
        self.lines: list[dict[str, float]] = []

    def on_train_begin(self, trainer: RunView) -> None:
        """Start the clock."""
        self.started_at, self.times = trainer.global_step, [time.perf_counter()]

    def on_step_end(self, trainer: RunView, loss: float) -> None:
        """Record the step; stop if it was enough."""
        self.losses.append(loss)
        self.times.append(time.perf_counter())
        if self.enough(self):
            trainer.request_stop("the trial has seen enough")

    def on_log(self, trainer: RunView, metrics: dict[str, float]) -> None:
        """Record the line."""
        self.lines.append(dict(metrics))


class KillOnce(Callback):
    """Ends the process with SIGKILL at a step, as soon as there is a checkpoint; not again after the restart."""

    def __init__(self, step: int, marker: Path) -> None:
        self.step, self.marker = step, marker

    def on_step_end(self, trainer: RunView, loss: float) -> None:
        """Kill, the first time that the step is reached."""
        if trainer.global_step < self.step or self.marker.exists() or trainer.config.training.checkpoint_dir is None:
            return
        manager, deadline = (
            CheckpointManager(trainer.config.training.checkpoint_dir),
            time.monotonic() + CHECKPOINT_SECONDS,
        )
        while manager.get_latest() is None and time.monotonic() < deadline:
            time.sleep(0.01)  # it may be written beside the training
        self.marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def run_until(trainer: Trainer, enough: Callable[[Until], bool]) -> Until:
    """Train without any other callback; returns the record."""
    until = Until(enough)
    trainer.callbacks.callbacks = [until]
    trainer.train()
    return until


def forward_rows(trainer: Trainer, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the first rows of the training, no more than the run computes at once.

    With a `count`, so many; fewer where the data has no more.
    """
    steps = min(trainer.samples.steps_per_epoch, count or 1)
    batches = device_batches(trainer.train_loader, trainer.samples, 0, steps, trainer.accelerator.device)
    inputs, targets, *_ = next(batches)
    while count and len(targets) < count and (batch := next(batches, None)) is not None:
        if batch[0].shape[1:] != inputs.shape[1:]:  # padded to another length
            break
        inputs, targets = torch.cat((inputs, batch[0])), torch.cat((targets, batch[1]))
    at_once = count or trainer.samples.micro_batch_size
    return inputs[:at_once], targets[:at_once]


def use_validation(trainer: Trainer, loader: DataLoader[Any], rows: int, batch_size: int) -> None:
    """Let `trainer` validate on the first rows of a loader's data."""
    subset: Subset[Any] = Subset(loader.dataset, range(rows))
    trainer.val_loader = DataLoader(subset, batch_size=batch_size, collate_fn=loader.collate_fn)
    place = trainer.accelerator.process_index, trainer.accelerator.num_processes, trainer.samples.micro_batch_size
    trainer.val_samples = step_sampler("val_loader", trainer.val_loader, 0, *place)


def few_rows(loader: DataLoader[Any]) -> int:
    """Rows that make a few batches."""
    return min(len(loader.dataset), 2 * (loader.batch_size or 1) + 1, 48)  # type: ignore[arg-type]


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """No dropout meanwhile: neither modules of torch nor probabilities that modules keep as `...dropout...`."""
    probabilities = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and ("dropout" in name or (isinstance(module, _DropoutNd) and name == "p"))
    ]
    try:
        for module, name, _ in probabilities:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in probabilities:
            setattr(module, name, value)


# ---- children --------------------------------------------------------------------------------------------


class Ended(NamedTuple):
    """How children ended: the exit code of the first that failed (0: none did) and the end of its output."""

    code: int
    output: str


def write_trial(
    folder: Path, trainer: str, config: Config, stop_at: int, kill_at: int | None = None, dropout: bool = True
) -> None:
    """Describe a child's run: its config, the step it stops at, and the step it kills itself at, once."""
    trial = {
        "trainer": trainer,
        "config": dataclasses.asdict(config),
        "stop_at": stop_at,
        "kill_at": kill_at,
        "dropout": dropout,
    }
    (folder / "trial.json").write_text(json.dumps(trial), encoding="utf-8")


def run_children(folder: Path, environments: list[Mapping[str, str]], timeout: float) -> Ended:
    """Make the run that `folder` describes, in one process for each environment.

    Raises:
        TimeoutError: if they have not ended after `timeout` seconds; none is left running.
    """
    command = [sys.executable, "-m", "fundamentallm.commands.trial", str(folder)]
    outputs = [folder / f"output_{rank}.txt" for rank in range(len(environments))]
    children: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + timeout
    try:
        for environment, output in zip(environments, outputs, strict=True):
            with output.open("wb") as file:
                stdin, stderr = subprocess.DEVNULL, subprocess.STDOUT
                children.append(subprocess.Popen(command, env=environment, stdin=stdin, stdout=file, stderr=stderr))
        while time.monotonic() < deadline:
            codes = [child.poll() for child in children]
            for code, output in zip(codes, outputs, strict=True):
                if code:
                    return Ended(code, _last_lines(output))
            if None not in codes:
                return Ended(0, "")
            time.sleep(0.02)
        raise TimeoutError(f"a trial run had not ended after {timeout:.0f} s")
    finally:
        for child in children:
            child.kill()
            child.wait()


def _last_lines(output: Path, lines: int = 2, characters: int = 400) -> str:
    text = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " ".join(line.strip() for line in text[-lines:])[-characters:]


def main(arguments: list[str]) -> int:
    """Make the run that a folder describes; returns the exit code."""
    folder = Path(arguments[0])
    trial = json.loads((folder / "trial.json").read_text(encoding="utf-8"))
    try:
        trainer = make_trainer(trial["trainer"], from_dict(Config, trial["config"]))
        if trainer.val_loader is not None:
            batch_size = trainer.val_loader.batch_size or 1
            use_validation(trainer, trainer.val_loader, few_rows(trainer.val_loader), batch_size)
        until = Until(lambda run: run.started_at + len(run.losses) >= trial["stop_at"])
        # The run's own callbacks take part, since their state has to survive; the bar and the curves have none.
        kept = [c for c in trainer.callbacks.callbacks if not isinstance(c, (ProgressCallback, VisualizationCallback))]
        kept = [c for c in kept if not isinstance(c, LoggingCallback)]
        kept += [LoggingCallback(folder / "run" / "metrics.jsonl"), until]
        if trial["kill_at"] is not None:
            kept.append(KillOnce(trial["kill_at"], folder / "killed"))
        trainer.callbacks.callbacks = kept
        if trial["dropout"]:
            trainer.train()
        else:
            with without_dropout(trainer.model):
                trainer.train()
    except FundamentaLLMError as error:
        return report(error)
    if trainer.is_main_process:
        (folder / "outcome.json").write_text(json.dumps({"started_at": until.started_at}), encoding="utf-8")
    trainer.leave_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
