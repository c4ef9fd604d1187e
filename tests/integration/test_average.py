"""The moving average of the weights: what it is, where it is used, how it is saved, on one process and sharded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fundamentallm import Callback, Config, Trainer
from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.checkpoint.reading import load_checkpoint
from fundamentallm.checkpoint.snapshot import MODEL_KEY
from fundamentallm.commands import checkpoints
from fundamentallm.distributed.dtensor import local
from fundamentallm.errors import CheckpointError
from tests.integration.runs import (
    StopAt,
    assert_same_weights,
    make_config,
    make_trainer,
    on_processes,
    sharded_accelerator,
    weights,
)

BAD_STEP = 5
RUN: dict[str, Any] = {"ema_decay": 0.6, "eval_every_n_steps": 4, "max_steps": 8}


class Watch(Callback):
    """Plants a NaN into one step, and notes the weights after each."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_begin(self, trainer: Trainer) -> None:
        self.weights.append(weights(trainer))
        first = next(trainer.model.parameters())
        first.register_hook(lambda g: g * torch.nan if trainer.global_step == BAD_STEP - 1 else g)

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        self.weights.append(weights(trainer))


def averages(trainer: Trainer) -> dict[str, Tensor]:
    assert trainer.average is not None
    return {name: tensor.clone() for name, tensor in trainer.average.state_dict()["weights"].items()}


def of(folder: Path | str, **training: Any) -> Config:
    return make_config(folder, dropout=0.1, **{**RUN, **training})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = make_trainer(of(tmp_path_factory.mktemp("whole")))
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["adamw", "torch.optim:Adagrad"])  # which cannot skip a step itself
def test_it_averages_the_weights_after_each_step_that_was_taken(kind: str, tmp_path: Path) -> None:
    watch = Watch()
    trainer = make_trainer(of(tmp_path, optimizer=kind), callbacks=[watch])
    trainer.train()
    assert_same_weights(watch.weights[BAD_STEP], watch.weights[BAD_STEP - 1])
    taken = [w for step, w in enumerate(watch.weights) if step not in (0, BAD_STEP)]
    expected = {name: tensor.double() for name, tensor in watch.weights[0].items()}
    for n, after in enumerate(taken):
        decay = min(0.6, (1 + n) / (10 + n))
        expected = {name: decay * tensor + (1 - decay) * after[name].double() for name, tensor in expected.items()}
    for name, tensor in averages(trainer).items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_validation_is_of_the_average(tmp_path: Path) -> None:
    trainer = make_trainer(of(tmp_path, max_steps=3))
    trainer.train()
    before, averaged = weights(trainer), averages(trainer)
    loss = trainer.validate()["val_loss"]
    assert loss == trainer.metrics.get_latest("val_loss")
    with trainer.averaged_weights():
        assert trainer.validate()["val_loss"] == loss
        assert_same_weights(weights(trainer), averaged)
        with pytest.raises(CheckpointError, match=r"averaged_weights"):
            trainer.save_checkpoint("inside")
    assert_same_weights(weights(trainer), before)
    plain = make_trainer(of("unused", ema_decay=None))
    plain.model.load_state_dict(averaged)
    assert plain.validate()["val_loss"] == loss


def test_a_checkpoint_opens_and_is_exported_as_the_average(whole: Trainer, tmp_path: Path) -> None:
    newest = CheckpointManager(whole.config.training.checkpoint_dir or "").get_latest()
    assert_same_weights(dict(AutoModelForCausalLM.from_pretrained(newest).state_dict()), averages(whole))
    assert checkpoints.main(["consolidate", str(newest), str(tmp_path / "out")], "checkpoints") == 0
    assert_same_weights(dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()), averages(whole))


def test_a_stopped_run_goes_on_to_the_bit(whole: Trainer, tmp_path: Path) -> None:
    make_trainer(of(tmp_path), callbacks=[StopAt(5)]).train()
    again = make_trainer(of(tmp_path))
    again.train()
    assert_same_weights(weights(again), weights(whole))
    assert_same_weights(averages(again), averages(whole))
    assert again.metrics.get_history()["val_loss"] == whole.metrics.get_history()["val_loss"]


def test_an_average_of_another_shape_is_refused(tmp_path: Path) -> None:
    average = make_trainer(of(tmp_path)).average
    assert average is not None
    state = average.state_dict()
    state["weights"] |= {name: average[:1] for name, average in state["weights"].items()}  # `copy_` would broadcast it
    with pytest.raises(RuntimeError):
        average.load_state_dict(state)


def test_it_can_be_given_up_and_begun_in_the_middle(tmp_path: Path) -> None:
    first = make_trainer(of(tmp_path), callbacks=[StopAt(3)])
    first.train()
    allowed = {"resume_changes": ["training.ema_decay"]}
    second = make_trainer(of(tmp_path, ema_decay=None, **allowed), callbacks=[Watch(), StopAt(5)])
    second.train()
    assert_same_weights(second.callbacks.callbacks[0].weights[0], weights(first))  # type: ignore[attr-defined]
    third = make_trainer(of(tmp_path, max_steps=6, resume_changes=["training"]), callbacks=[])
    third.train()
    expected = {name: 0.1 * old + 0.9 * third.model.state_dict()[name] for name, old in weights(second).items()}
    for name, tensor in averages(third).items():
        torch.testing.assert_close(tensor, expected[name])


def shards(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: local(tensor) for name, tensor in tensors.items()}


GROUPS = [{"pattern": "*.embed_tokens.*", "frozen": True}, {"pattern": "*.mlp.*", "learning_rate_scale": 0.3}]


def _sharded(count: int, folder: Path) -> None:
    def start(name: str, stop_at: int | None = None, **training: Any) -> Trainer:
        config = make_config(folder / name, **{"parameter_groups": GROUPS, **RUN, **training})
        trainer = make_trainer(config, accelerator=sharded_accelerator(), callbacks=[StopAt(stop_at or 99)])
        trainer.train()
        return trainer

    run, without = start("run"), start("without", ema_decay=None)
    assert run.accelerator.num_processes == count
    assert_same_weights(shards(weights(run)), shards(weights(without)))  # nothing stale was trained with
    start("parts", stop_at=5)
    parts = start("parts")
    assert_same_weights(shards(averages(parts)), shards(averages(run)))
    assert parts.metrics.get_history()["val_loss"] == run.metrics.get_history()["val_loss"]


def test_sharded_it_is_the_same_also_with_groups_of_parameters(tmp_path: Path) -> None:
    on_processes(2, _sharded, tmp_path)
    single = make_trainer(make_config(tmp_path / "single", parameter_groups=GROUPS, **RUN))
    single.train()
    saved = load_checkpoint(CheckpointManager(tmp_path / "run" / "checkpoints").get_latest() or Path())
    for name, tensor in averages(single).items():
        torch.testing.assert_close(saved[MODEL_KEY][name], tensor, rtol=1e-4, atol=1e-5)
    assert saved["metrics_state_dict"]["val_loss"].tolist() == pytest.approx(single.metrics.get_history()["val_loss"])
