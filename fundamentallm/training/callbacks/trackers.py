"""Hands log lines to experiment trackers, through accelerate."""

import dataclasses
import json
import logging
import uuid
from operator import attrgetter
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from fundamentallm.atomic import write_text
from fundamentallm.config.saved import flat_settings
from fundamentallm.errors import FundamentaLLMError, writing
from fundamentallm.training.callbacks.base import Callback, RunView
from fundamentallm.training.metrics import CLOCKS

logger = logging.getLogger(__name__)

RUN_ID = {"mlflow": attrgetter("info.run_id"), "wandb": attrgetter("id"), "trackio": attrgetter("name")}
"""Returns from a tracker's own run what a later launch resumes it by."""


def tracker_names(accelerator: Accelerator) -> list[str]:
    """Returns the names of the trackers that the Accelerator was made with."""
    return [t.name if isinstance(t, GeneralTracker) else str(t) for t in accelerator.log_with]


class TrackerCallback(Callback):
    """Hands the lines of metrics.jsonl to the Accelerator's trackers, on the main process.

    `trackers.json` in the output folder holds the ids of the tracker runs, and the steps of the last training and
    validation lines. A resumed run continues those runs and skips lines that they have. A run from scratch or from an
    older checkpoint begins new ones. Trackers started before the training are used and left open.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._runs: dict[str, dict[str, Any]] = {}  # id and last steps, by the tracker's name; of the main process only
        self._owns = False

    def on_train_begin(self, trainer: RunView) -> None:
        if not trainer.is_main_process:
            return
        self._path = None if trainer.output_dir is None else trainer.output_dir / "trackers.json"
        runs: dict[str, dict[str, Any]] = {}
        if trainer.global_step > 0 and not trainer.was_rewound and self._path is not None and self._path.exists():
            runs = json.loads(self._path.read_text(encoding="utf-8"))
        self._owns = not trainer.accelerator.trackers
        if self._owns:
            _start(trainer, {name: run["id"] for name, run in runs.items()})
        logged = {clock: max((run[clock] for run in runs.values()), default=0) for clock in CLOCKS}
        for tracker in trainer.accelerator.trackers:
            self._runs[tracker.name] = {"id": RUN_ID.get(tracker.name, lambda run: None)(tracker.tracker), **logged}

    def on_log(self, trainer: RunView, metrics: dict[str, float]) -> None:
        self._log(trainer, metrics, "step")

    def on_validation_end(self, trainer: RunView, metrics: dict[str, float]) -> None:
        self._log(trainer, {"epoch": trainer.epochs_done, **metrics}, "val_step")

    def _log(self, trainer: RunView, line: dict[str, float], clock: str) -> None:
        step = trainer.global_step
        if all(step <= run[clock] for run in self._runs.values()):
            return
        for run in self._runs.values():
            run[clock] = step
        if self._path is not None:  # before the line is logged: a kill in between loses a point, and never repeats one
            with writing(self._path):
                write_text(self._path, json.dumps(self._runs, indent=1) + "\n")
        try:
            trainer.accelerator.log({name: value for name, value in line.items() if name != "step"}, step=step)
        except Exception as error:  # a server that is away for a while does not end the training
            logger.warning("the trackers did not take the line of step %d: %s", step, error)

    def on_train_end(self, trainer: RunView) -> None:
        while self._owns and trainer.accelerator.trackers:
            trainer.accelerator.trackers.pop().finish()

    on_train_abort = on_train_end


def _start(trainer: RunView, ids: dict[str, str | None]) -> None:
    """Start the trackers: new runs, or those of a former launch that `ids` has by the tracker's name."""
    accelerator, folder, new = trainer.accelerator, trainer.output_dir, uuid.uuid4().hex[:8]
    options, names = dict(trainer.config.tracker_options), tracker_names(accelerator)
    project = options.pop("project", "fundamentallm")
    # purge_step hides the events that another run in the same folder logged for later steps.
    known: dict[str, Any] = {"tensorboard": {} if "tensorboard" in ids else {"purge_step": trainer.global_step + 1}}
    if folder is not None:
        known["mlflow"] = {"run_id": ids.get("mlflow"), "run_name": folder.name}
        known["wandb"] = {"id": ids.get("wandb", new), "resume": "allow", "name": folder.name, "dir": str(folder)}
        known["trackio"] = {"name": ids.get("trackio", f"{folder.name}-{new}"), "resume": "allow"}
    # Only for a new run: MLflow refuses settings that changed, and TensorBoard would list each launch as a run.
    settings = {} if ids else flat_settings(dataclasses.asdict(trainer.config))
    settings = {key: v if isinstance(v, (str, int, float)) else json.dumps(v) for key, v in settings.items()}
    try:
        arguments = {name: known.get(name, {}) | options.get(name, {}) for name in names}
        accelerator.init_trackers(project, settings or None, arguments)
    except Exception as error:  # trackers raise errors of any class
        accelerator.trackers.clear()  # one that did not start may fail to finish
        raise FundamentaLLMError(f"trackers {names} cannot be started: {error}; solve this, or remove it.") from error
