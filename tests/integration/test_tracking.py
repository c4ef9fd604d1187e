"""Real trackers on local files: a run that is killed and resumed is one run there, with each step once."""

import contextlib
import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from fundamentallm import Callback, Config, ConfigError, Trainer, create_accelerator
from fundamentallm.errors import FundamentaLLMError
from fundamentallm.run.session import Stop
from tests.conftest import reset_accelerate
from tests.integration.runs import KillAfter, KilledError, StopAt, lines, make_config, make_trainer


def tracked_config(folder: Path, *trackers: str, **training: Any) -> Config:
    """Twelve steps, validated at every third, saved at every fourth."""
    settings = {"eval_every_n_steps": 3, "save_every_n_steps": 4, "eval_every_n_epochs": None} | training
    config = make_config(folder, checkpoint_dir=str(folder / "checkpoints"), **settings)
    return dataclasses.replace(config, trackers=list(trackers))


def run(config: Config, *callbacks: Callback, accelerator: Accelerator | None = None) -> Trainer:
    reset_accelerate()
    trainer = make_trainer(config, accelerator=accelerator)
    for callback in callbacks:
        trainer.callbacks.add(callback)
    trainer.train()
    return trainer


def expected(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines(folder) if name in line]


# ---- tensorboard -------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_one_run_with_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = tracked_config(tmp_path, "tensorboard")
    with pytest.raises(KilledError):
        run(config, KillAfter(7))
    (tmp_path / "trackers.json").unlink()  # so that it is not known what was logged after the checkpoint
    run(config, StopAt(10))
    run(config)
    shown = scalars(tmp_path / "tensorboard" / "fundamentallm")
    for name in ("train_loss", "val_loss", "learning_rate", "tokens"):
        assert shown[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected(tmp_path, name)]


# ---- mlflow ------------------------------------------------------------------------------------------------


def test_mlflow_has_one_run_with_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    # A folder of files, which mlflow-skinny can write.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    folder = tmp_path / "run"
    config = tracked_config(folder, "mlflow")
    with pytest.raises(KilledError):
        run(config, KillAfter(7))
    run(config)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("fundamentallm")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert mlflow.active_run() is None
    assert found.data.params["training.learning_rate"] == "0.01"
    assert found.data.params["training.max_epochs"] == "null"
    for name in ("train_loss", "val_loss"):
        history = sorted((metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name))
        assert history == expected(folder, name)


# ---- any other ---------------------------------------------------------------------------------------------


class Notebook(GeneralTracker):
    """A tracker that can only append, like wandb and trackio."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self, path: Path, refuses: int | None = None) -> None:
        super().__init__()
        self.path, self.refuses = path, refuses

    @property
    def tracker(self) -> Path:
        return self.path

    def _add(self, *what: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(what) + "\n")

    def start(self) -> None:
        self._add("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._add("config", values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if step == self.refuses:
            raise ConnectionError("the server is down")
        self._add("val" if "val_loss" in values else "train", step, values)

    def finish(self) -> None:
        self._add("finish")


def note(config: Config, *callbacks: Callback, **arguments: Any) -> dict[str, list[Any]]:
    """Launch the run once more, and return everything noted so far by kind."""
    path = Path(config.output_dir).parent / "notes.jsonl"
    reset_accelerate()
    accelerator = Accelerator(cpu=True, log_with=[Notebook(path, **arguments)])
    trainer = make_trainer(config, accelerator=accelerator)
    for callback in callbacks:
        trainer.callbacks.add(callback)
    with contextlib.suppress(KilledError):
        trainer.train()
    noted = defaultdict(list)
    for line in path.read_text().splitlines():
        kind, *what = json.loads(line)
        noted[kind].append(what)
    return noted


def test_tracker_gets_each_step_of_an_interrupted_run_once(tmp_path: Path) -> None:
    class InterruptValidation(Callback):
        def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            if trainer.global_step == 9:
                trainer.stop_switch.request(Stop.SIGNAL, "a signal")

    config = tracked_config(tmp_path / "run")
    note(config, KillAfter(7))
    note(config, InterruptValidation())
    noted = note(config)
    assert [step for step, _ in noted["train"]] == list(range(1, 13))
    assert [step for step, _ in noted["val"]] == [3, 6, 9, 12]
    assert (len(noted["start"]), len(noted["config"])) == (3, 1)
    ((settings,),) = noted["config"]
    assert settings["model.d_model"] == 16
    assert settings["training.batch_size"] == 8
    assert {type(value) for value in settings.values()} <= {str, int, float, bool}


def test_tracker_of_a_rewound_run_begins_a_new_one(tmp_path: Path) -> None:
    config = tracked_config(tmp_path / "run")
    note(config)
    back = dataclasses.replace(config.training, resume=str(tmp_path / "run" / "checkpoints" / "step_00000008"))
    noted = note(dataclasses.replace(config, training=back))
    assert [step for step, _ in noted["train"]] == [*range(1, 13), *range(9, 13)]
    assert len(noted["config"]) == 2


def test_tracker_that_refuses_a_line_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noted = note(tracked_config(tmp_path / "run"), refuses=5)
    assert [step for step, _ in noted["train"]] == [1, 2, 3, 4, *range(6, 13)]
    assert "step 5: the server is down" in caplog.text


def test_tracker_started_by_the_caller_is_left_open(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, log_with=[Notebook(tmp_path / "notes.jsonl")])
    accelerator.init_trackers("mine")
    make_trainer(tracked_config(tmp_path / "run"), accelerator=accelerator).train()
    kinds = [json.loads(line)[0] for line in (tmp_path / "notes.jsonl").read_text().splitlines()]
    assert kinds == ["start", *["train", "train", "train", "val"] * 4]
    assert [tracker.name for tracker in accelerator.trackers] == ["notebook"]


# ---- mistakes ----------------------------------------------------------------------------------------------


def test_tracker_that_does_not_start_is_the_only_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = dataclasses.replace(tracked_config(tmp_path, "tensorboard"), tracker_options={"tensorboard": {"wrong": 3}})
    with pytest.raises(FundamentaLLMError, match=r"tensorboard.*'wrong'"):
        run(config)
    assert "failed while the training was aborted" not in caplog.text


def test_accelerator_without_the_trackers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        make_trainer(tracked_config(tmp_path, "tensorboard"), accelerator=create_accelerator())
    (problem,) = error.value.problems
    assert (problem.setting, problem.value) == ("trackers", ["tensorboard"])
