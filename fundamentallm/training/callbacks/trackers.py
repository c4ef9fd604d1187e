"""Experiment trackers: what `Accelerator(log_with=...)` knows gets the lines of metrics.jsonl too."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from fundamentallm.config.schema import flat_settings
from fundamentallm.errors import FundamentaLLMError, writing
from fundamentallm.training.callbacks.base import Callback

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer

logger = logging.getLogger(__name__)

PROJECT, RECORD = "fundamentallm", "trackers.json"


def tracker_names(accelerator: Accelerator) -> list[str]:
    """Of those the Accelerator was made with."""
    return [t.name if isinstance(t, GeneralTracker) else str(t) for t in accelerator.log_with]


class TrackerCallback(Callback):
    """Hands log and validation lines to the Accelerator's trackers; on the main process.

    A resumed run goes on in the trackers' runs, without a step twice. TensorBoard is told from which step on the events
    are made again. The others only ever append: `trackers.json` in the output folder holds the ids of their runs and
    the last steps they were given, and steps up to those, which come out the same when they are made again, are left
    out. Where the training begins at the beginning, or goes back to an earlier checkpoint to take another course, they
    begin new runs. What a tracker's server refuses is a warning, and the training goes on.

    Trackers that the user has started already are used as they are, and left open.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._runs: dict[str, dict[str, Any]] = {}
        self._owns = False

    def on_train_begin(self, trainer: Trainer) -> None:
        """Start the trackers, or go on with their runs."""
        if not trainer.is_main_process:
            return
        accelerator, folder = trainer.accelerator, trainer.output_dir
        options = dict(trainer.config.tracker_options)
        self._path = folder and folder / RECORD
        is_another = trainer.global_step == 0 or trainer.was_rewound
        self._runs = {} if is_another or self._path is None else _read(self._path)
        self._owns = not accelerator.trackers
        if self._owns:
            project = options.pop("project", PROJECT)
            # A validation that was broken off comes again, and the line of its step with it.
            due = trainer.validation_due
            ours: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": trainer.global_step + (not due)}}
            if folder is not None:
                ours |= self._placed(folder, tracker_names(accelerator))
            names = ours.keys() | options.keys()
            arguments = {name: {**ours.get(name, {}), **options.get(name, {})} for name in names}
            try:
                accelerator.init_trackers(project, init_kwargs=arguments)
            except Exception as error:  # whatever a tracker raises, over a login, an address or an option
                while accelerator.trackers:  # some have begun, and some cannot even end
                    with suppress(Exception):
                        accelerator.trackers.pop().finish()
                raise FundamentaLLMError(
                    f"trackers {', '.join(tracker_names(accelerator))} cannot be started: {error}; mend that, or take "
                    "it out of trackers."
                ) from error
        for tracker in accelerator.trackers:
            self._begin(tracker, dataclasses.asdict(trainer.config))
        self._write()
        if trainer.validation_due and trainer.metrics.get_latest("step") == trainer.global_step:
            history = trainer.metrics.get_history()
            line = {name: values[-1] for name, values in history.items() if not name.startswith("val_")}
            self._log(trainer, line, "step")

    def _placed(self, folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
        """What puts the trackers' files into the output folder, where nothing else was said, and names their runs."""
        arguments: dict[str, dict[str, Any]] = {}
        run = {name: self._runs.get(name, {}).get("id") or uuid.uuid4().hex[:8] for name in ("wandb", "trackio")}
        if "wandb" in names:
            arguments["wandb"] = {"id": run["wandb"], "resume": "allow", "name": folder.name}
            if "WANDB_DIR" not in os.environ:
                arguments["wandb"]["dir"] = str(folder)
        if "trackio" in names:
            os.environ.setdefault("TRACKIO_DIR", str((folder / "trackio").absolute()))
            arguments["trackio"] = {"name": f"{folder.name}-{run['trackio']}", "resume": "allow"}
        if "mlflow" in names:
            import mlflow

            arguments["mlflow"] = {"run_id": self._runs.get("mlflow", {}).get("id"), "run_name": folder.name}
            if not mlflow.is_tracking_uri_set():
                mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').absolute()}")
                arguments["mlflow"]["logging_dir"] = (folder / "mlflow").absolute().as_uri()
        return arguments

    def _begin(self, tracker: GeneralTracker, config: dict[str, Any]) -> None:
        if tracker.name == "wandb":  # whose own steps only ever go up, so that a validation could come too late
            tracker.tracker.define_metric("*", step_metric="step")
        if tracker.name in self._runs:
            return
        if self._owns:
            settings = flat_settings(config)
            tracker.store_init_configuration({name: _plain(value) for name, value in settings.items()})
        self._runs[tracker.name] = {"id": _id_of(tracker), "step": 0, "val_step": 0}

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """A training line."""
        self._log(trainer, metrics, "step")

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """A validation line."""
        self._log(trainer, {"step": trainer.global_step, "epoch": trainer.epochs_done, **metrics}, "val_step")

    def _log(self, trainer: Trainer, line: dict[str, float], kind: str) -> None:
        step, due = int(line["step"]), []
        for tracker in trainer.accelerator.trackers if trainer.is_main_process else ():
            is_rewound = tracker.name == "tensorboard" and self._owns
            if is_rewound or step > self._runs[tracker.name][kind]:
                self._runs[tracker.name][kind] = step
                due.append(tracker)
        if due:
            self._write()  # first: a kill in between costs a point, and none comes twice
        for tracker in due:
            try:
                if tracker.name == "wandb":
                    tracker.log(line)
                else:
                    tracker.log({name: value for name, value in line.items() if name != "step"}, step=step)
            except Exception as error:  # a server that is down for a while is no reason to stop
                logger.warning("%s did not take the line of step %d: %s", tracker.name, step, error)

    def _write(self) -> None:
        if self._path is None:
            return
        temporary = self._path.with_name(f"{RECORD}.new")
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._runs, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self._path)

    def on_train_end(self, trainer: Trainer) -> None:
        """Close what was started here."""
        self._close(trainer, has_failed=False)

    def on_train_abort(self, trainer: Trainer) -> None:
        """Close it as failed, where the tracker tells that apart."""
        self._close(trainer, has_failed=True)

    def _close(self, trainer: Trainer, has_failed: bool) -> None:
        while self._owns and trainer.accelerator.trackers:
            tracker = trainer.accelerator.trackers.pop()
            if has_failed and tracker.name == "wandb":
                tracker.tracker.finish(exit_code=1)
            elif has_failed and tracker.name == "mlflow":
                import mlflow

                mlflow.end_run("FAILED")
            else:
                tracker.finish()


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What `trackers.json` says; nothing where it is not there, or not ours."""
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(name): {"id": run["id"], "step": int(run["step"]), "val_step": int(run["val_step"])}
            for name, run in runs.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.warning("%s cannot be read (%s); the trackers begin new runs.", path, error)
        return {}


def _id_of(tracker: GeneralTracker) -> str | None:
    """By which the tracker's run is found again."""
    if tracker.name == "mlflow":
        return str(tracker.tracker.info.run_id)
    if tracker.name == "wandb":
        return str(tracker.tracker.id)
    if tracker.name == "trackio":
        return str(tracker.tracker.name).rpartition("-")[2]
    return None


def _plain(value: Any) -> str | int | float | bool:
    """A setting as every tracker takes it."""
    return value if isinstance(value, (str, int, float, bool)) else json.dumps(value)
