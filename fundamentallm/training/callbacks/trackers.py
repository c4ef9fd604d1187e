"""Hands log lines to experiment trackers, through accelerate."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from fundamentallm.config.schema import flat_settings
from fundamentallm.errors import FundamentaLLMError, writing
from fundamentallm.training.callbacks.base import Callback, RunView

logger = logging.getLogger(__name__)

PROJECT, RECORD = "fundamentallm", "trackers.json"
KINDS = ("step", "val_step")
"""Entries of the record: the last training line and the last validation line that were logged."""


def tracker_names(accelerator: Accelerator) -> list[str]:
    """Returns the names of the trackers that the Accelerator was made with."""
    return [t.name if isinstance(t, GeneralTracker) else str(t) for t in accelerator.log_with]


class TrackerCallback(Callback):
    """Hands the lines of metrics.jsonl to the Accelerator's trackers, on the main process.

    `trackers.json` in the output folder holds the ids of the tracker runs and the last steps logged. A resumed run
    continues those runs and skips lines that they already have, because a repeated step gives the same numbers. A run
    that starts from scratch or from an older checkpoint begins new ones. If a tracker refuses a line, it is a warning.
    Trackers that were started before the training are used and left open.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._runs: dict[str, dict[str, Any]] = {}
        self._owns = False

    def on_train_begin(self, trainer: RunView) -> None:
        """Start the trackers, or resume their runs."""
        if not trainer.is_main_process:
            return
        self._path = None if trainer.output_dir is None else trainer.output_dir / RECORD
        is_resumed = trainer.global_step > 0 and not trainer.was_rewound
        runs = _read(self._path) if is_resumed and self._path is not None else {}
        self._owns = not trainer.accelerator.trackers
        if self._owns:
            self._start(trainer, runs)
        logged = {kind: max((run[kind] for run in runs.values()), default=0) for kind in KINDS}
        self._runs = {tracker.name: {"id": _id_of(tracker), **logged} for tracker in trainer.accelerator.trackers}
        self._write()

    def _start(self, trainer: RunView, runs: dict[str, dict[str, Any]]) -> None:
        accelerator, options = trainer.accelerator, dict(trainer.config.tracker_options)
        project, names = options.pop("project", PROJECT), tracker_names(trainer.accelerator)
        # Only for a new run: MLflow refuses settings that changed, and TensorBoard would list each launch as a run.
        settings = {} if runs else flat_settings(dataclasses.asdict(trainer.config))
        settings |= {
            name: json.dumps(value) for name, value in settings.items() if not isinstance(value, (str, int, float))
        }
        try:
            arguments = {name: _arguments(name, trainer, runs.get(name)) | options.get(name, {}) for name in names}
            accelerator.init_trackers(project, settings or None, arguments)
        except Exception as error:  # trackers raise errors of any class
            while accelerator.trackers:
                with suppress(Exception):  # a tracker that did not start may fail to finish
                    accelerator.trackers.pop().finish()
            raise FundamentaLLMError(
                f"trackers {', '.join(names)} cannot be started: {error}; solve this, or remove it from trackers."
            ) from error

    def on_log(self, trainer: RunView, metrics: dict[str, float]) -> None:
        """Log a training line."""
        self._log(trainer, metrics, "step")

    def on_validation_end(self, trainer: RunView, metrics: dict[str, float]) -> None:
        """Log a validation line."""
        self._log(trainer, {"epoch": trainer.epochs_done, **metrics}, "val_step")

    def _log(self, trainer: RunView, line: dict[str, float], kind: str) -> None:
        step = trainer.global_step
        if not any(run[kind] < step for run in self._runs.values()):
            return
        for run in self._runs.values():
            run[kind] = step
        self._write()  # before the line is logged: a kill in between loses a point, and never repeats one
        try:
            trainer.accelerator.log({name: value for name, value in line.items() if name != "step"}, step=step)
        except Exception as error:  # a server that is away for a while does not end the training
            logger.warning("the trackers did not take the line of step %d: %s", step, error)

    def _write(self) -> None:
        if self._path is None:
            return
        temporary = self._path.with_name(f"{RECORD}.new")
        with writing(self._path):
            temporary.write_text(json.dumps(self._runs, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self._path)

    def on_train_end(self, trainer: RunView) -> None:
        """Close the trackers that were started here."""
        self._close(trainer, has_failed=False)

    def on_train_abort(self, trainer: RunView) -> None:
        """Close the trackers, with the run marked as failed in those that have such a mark."""
        self._close(trainer, has_failed=True)

    def _close(self, trainer: RunView, has_failed: bool) -> None:
        while self._owns and trainer.accelerator.trackers:
            tracker = trainer.accelerator.trackers.pop()
            if has_failed and tracker.name == "wandb":
                tracker.tracker.finish(exit_code=1)
            elif has_failed and tracker.name == "mlflow":
                import mlflow

                mlflow.end_run("FAILED")
            else:
                tracker.finish()


def _arguments(name: str, trainer: RunView, run: dict[str, Any] | None) -> dict[str, Any]:
    """Returns arguments for a tracker that resume `run`, if it is given, and put files into the output folder."""
    folder, run_id = trainer.output_dir, None if run is None else run["id"]
    if name == "tensorboard":  # hides the events that another run in the same folder logged for later steps
        return {"purge_step": trainer.global_step + 1} if run is None else {}
    if folder is None:
        return {}
    if name == "wandb":
        place = {} if "WANDB_DIR" in os.environ else {"dir": str(folder)}
        return {"id": run_id or uuid.uuid4().hex[:8], "resume": "allow", "name": folder.name, **place}
    if name == "trackio":
        os.environ.setdefault("TRACKIO_DIR", str((folder / "trackio").absolute()))
        return {"name": f"{folder.name}-{run_id or uuid.uuid4().hex[:8]}", "resume": "allow"}
    if name == "mlflow":
        import mlflow

        place = {}
        if not mlflow.is_tracking_uri_set():
            mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').absolute()}")
            place = {"logging_dir": (folder / "mlflow").absolute().as_uri()}
        return {"run_id": run_id, "run_name": folder.name, **place}
    return {}


def _id_of(tracker: GeneralTracker) -> str | None:
    """Returns the id by which a later launch resumes the tracker's run, or None if there is none."""
    if tracker.name == "mlflow":
        return str(tracker.tracker.info.run_id)
    if tracker.name == "wandb":
        return str(tracker.tracker.id)
    if tracker.name == "trackio":
        return str(tracker.tracker.name).rpartition("-")[2]
    return None


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the runs recorded in `trackers.json`; {} if it is missing or damaged."""
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))
        return {name: {key: run[key] for key in ("id", *KINDS)} for name, run in runs.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s cannot be read (%s); the trackers begin new runs.", path, error)
        return {}
