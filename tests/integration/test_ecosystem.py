"""Optimizers and schedules of the ecosystem train, and resume to the bit."""

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import get_scheduler

from fundamentallm import Callback, CheckpointManager, ConfigError, Trainer, TrainingConfig
from fundamentallm.errors import CheckpointError
from tests.conftest import reset_accelerate
from tests.integration.runs import PartlyIgnored, StopAt, assert_same_weights, weights
from tests.integration.test_training_loop import Bigram

STEPS, STOP_AT = 12, 5
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "torch.optim:NAdam": {"lr": 1e-2},
    "transformers.optimization:Adafactor": {"lr": 1e-2, "relative_step": False, "scale_parameter": False},
    "schedulefree:AdamWScheduleFree": {"lr": 1e-2, "warmup_steps": 4},
    "pytorch_optimizer:SOAP": {"lr": 1e-2},
    "pytorch_optimizer:AdEMAMix": {"lr": 1e-2},
    "pytorch_optimizer:Prodigy": {"lr": 1.0},
}
torch_schedules = torch.optim.lr_scheduler
SCHEDULES: dict[str, Any] = {
    "MultiStepLR": lambda optimizer: torch_schedules.MultiStepLR(optimizer, [3, 7, 7]),
    "OneCycleLR": lambda optimizer: torch_schedules.OneCycleLR(optimizer, 1e-2, total_steps=STEPS + 1),
    "SequentialLR": lambda optimizer: torch_schedules.SequentialLR(
        optimizer,
        [torch_schedules.LinearLR(optimizer, total_iters=3), torch_schedules.ExponentialLR(optimizer, 0.9)],
        [6],
    ),
    "ReduceLROnPlateau": lambda optimizer: torch_schedules.ReduceLROnPlateau(
        optimizer, patience=0, threshold=0.5, factor=0.5
    ),
    "cosine": lambda optimizer: get_scheduler("cosine", optimizer, 3, STEPS),
}


def make_optimizer(name: str, model: torch.nn.Module) -> Optimizer:
    module, _, kind = name.partition(":")
    pytest.importorskip(module)
    made: Optimizer = getattr(importlib.import_module(module), kind)(model.parameters(), **OPTIMIZERS[name])
    return made


def trainer(folder: Path, optimizer: str, schedule: str | None, stop_at: int | None = None) -> Trainer:
    reset_accelerate()
    torch.manual_seed(0)
    # NAdam keeps a float32 product for parameters of any type.
    model = Bigram().to(torch.float64 if optimizer.endswith("NAdam") else torch.float32)
    given = make_optimizer(optimizer, model)
    scheduler: LRScheduler | None = SCHEDULES[schedule](given) if schedule else None
    config = TrainingConfig(max_steps=STEPS, eval_every_n_steps=3, checkpoint_dir=str(folder), learning_rate=1e-2)
    loaders = [DataLoader(PartlyIgnored(), batch_size=8, shuffle=shuffle) for shuffle in (True, False)]
    callbacks: list[Callback] = [StopAt(stop_at)] if stop_at else []
    return Trainer(model, config, *loaders, callbacks, optimizer=given, scheduler=scheduler)


CASES = [(name, None) for name in OPTIMIZERS] + [("torch.optim:NAdam", name) for name in SCHEDULES]


@pytest.mark.parametrize(("optimizer", "schedule"), CASES)
def test_resume_of_ecosystem_parts_is_bit_exact(tmp_path: Path, optimizer: str, schedule: str | None) -> None:
    whole, stopped = (
        trainer(tmp_path / "whole", optimizer, schedule),
        trainer(tmp_path / "b", optimizer, schedule, STOP_AT),
    )
    history = whole.train()
    stopped.train()
    resumed = trainer(tmp_path / "b", optimizer, schedule)
    resumed.train()
    assert resumed.global_step == STEPS
    assert history["val_loss"][-1] < history["val_loss"][0]
    assert_same_weights(weights(resumed), weights(whole))
    assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
    assert resumed.metrics.get_history() == whole.metrics.get_history() | {
        "tokens_per_second": resumed.metrics.get_history()["tokens_per_second"]
    }


def test_plateau_schedule_follows_the_early_stopping_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, "torch.optim:NAdam", "ReduceLROnPlateau")
    seen: list[float] = []
    monkeypatch.setattr(torch.optim.lr_scheduler.ReduceLROnPlateau, "step", lambda self, metric: seen.append(metric))
    history = run.train()
    assert seen == [value for value in history["val_loss"] if value == value]


class Switching(torch.optim.SGD):
    """Averages weights as schedulefree does: train() and eval() switch them, with rounding."""

    is_training = False

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.5)

    def train(self) -> None:
        self._switch(True, 3.0)

    def eval(self) -> None:
        self._switch(False, 1 / 3.0)

    @torch.no_grad()
    def _switch(self, to_training: bool, factor: float) -> None:
        if self.is_training != to_training:
            self.is_training = to_training
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(factor)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self.is_training
        super().step(closure)


def test_optimizer_that_switches_weights_is_evaluated_by_its_average(tmp_path: Path) -> None:
    """Validations and checkpoints change no weight, and hold the average, as with ema_decay."""

    def run(folder: str, **settings: Any) -> Trainer:
        reset_accelerate()
        torch.manual_seed(0)
        model, loader = Bigram(), DataLoader(PartlyIgnored(), batch_size=8)
        config = TrainingConfig(max_steps=6, checkpoint_dir=str(tmp_path / folder), **settings)
        made = Trainer(model, config, loader, loader, [], optimizer=Switching(model.parameters()))
        made.train()
        return made

    seldom, often = run("a"), run("b", eval_every_n_steps=1, save_every_n_steps=1)
    assert_same_weights(weights(seldom), weights(often))
    saved = CheckpointManager(tmp_path / "a").load(tmp_path / "a" / "step_00000006")
    with often.averaged_weights():
        assert_same_weights(saved["model_state_dict"], weights(often))
    assert_same_weights(saved["average_state_dict"]["weights"], dict(often.model.named_parameters()))
    with pytest.raises(ConfigError) as error:
        run("c", ema_decay=0.9)
    assert error.value.problems[0].setting == "training.ema_decay"


class Unsaved(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.state[self.param_groups[0]["params"][0]]["helper"] = object()


def test_state_that_cannot_be_saved_ends_the_run_at_once(tmp_path: Path) -> None:
    """What exists before the first step is found before it, and what the first step makes right after it."""
    steps: Counter[str] = Counter()

    class Count(Callback):
        def __init__(self, name: str, state: dict[str, Any]) -> None:
            self.name, self.state = name, state

        def on_step_begin(self, trainer: Any) -> None:
            steps[self.name] += 1

        def state_dict(self) -> dict[str, Any]:
            return self.state

    for name, kind, state in (("state", torch.optim.SGD, {"helper": object()}), ("optimizer", Unsaved, {})):
        reset_accelerate()
        model = Bigram()
        config = TrainingConfig(max_steps=9, checkpoint_dir=str(tmp_path / name))
        optimizer = kind(model.parameters(), lr=0.1)
        run = Trainer(model, config, DataLoader(PartlyIgnored(), 8), None, [Count(name, state)], optimizer=optimizer)
        with pytest.raises(CheckpointError, match="helper"):
            run.train()
    assert steps == {"optimizer": 1}
