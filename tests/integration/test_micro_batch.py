"""micro_batch_size: auto. What is found is the largest that fits on every process, and finding it leaves no trace."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fundamentallm import ConfigError, LoggingCallback, Trainer, TrainingConfig, create_accelerator
from fundamentallm.data.loaders import device_batches
from tests.integration.runs import (
    PartlyIgnored,
    StopAt,
    assert_same_weights,
    lines,
    make_config,
    make_trainer,
    on_processes,
    sharded_accelerator,
    timeless,
    weights,
)


@pytest.fixture(autouse=True)
def _little_to_collect() -> Iterator[None]:
    """A collection after each failure would look through all that pytest has, for a third of a second."""
    gc.freeze()
    yield
    gc.unfreeze()


class Memory(nn.Module):
    """Room for so many sequences at once, and fewer where a gradient is there already: torch's own error beyond.

    Counts the forward passes in a buffer that each one replaces, and draws random numbers, as some models do.
    """

    def __init__(self, room: int, room_to_validate: int = 99) -> None:
        super().__init__()
        self.room, self.room_to_validate = room, room_to_validate
        self.embedding, self.norm = nn.Embedding(20, 12), nn.BatchNorm1d(12)
        self.head, self.dropout = nn.Linear(12, 20), nn.Dropout(0.2)
        self.register_buffer("passes", torch.zeros(()))
        self.tried: list[int] = []
        self.trained: set[int] = set()

    def forward(self, ids: Tensor) -> Tensor:
        has_gradient = self.head.weight.grad is not None
        room = self.room - has_gradient if self.training else self.room_to_validate
        self.tried.append(len(ids))
        self.passes = self.passes + 1
        self.trained |= {len(ids)} if self.training else set()
        if len(ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.head(self.norm(self.dropout(self.embedding(ids)).mT).mT)


def made(folder: Path, room: int = 6, room_to_validate: int = 99, rows: int = 16, **arguments: Any) -> Trainer:
    training = {"max_steps": 5, "checkpoint_dir": str(folder / "checkpoints"), "log_every_n_steps": 1}
    torch.manual_seed(0)
    model = Memory(room, room_to_validate)
    loaders = [torch.utils.data.DataLoader(PartlyIgnored(size), batch_size=rows, shuffle=True) for size in (44, 9)]
    arguments.setdefault("callbacks", [LoggingCallback(folder / "metrics.jsonl")])
    options = {key: arguments.pop(key) for key in ("callbacks", "accelerator") if key in arguments}
    return Trainer(model, TrainingConfig(**{**training, "micro_batch_size": "auto", **arguments}), *loaders, **options)


@pytest.mark.parametrize(
    ("room", "room_to_validate", "size"),
    [(16, 99, 16), (8, 99, 6), (2, 99, 1), (99, 4, 4)],
)
def test_training_with_gradients_there_and_validation_both_fit(
    tmp_path: Path, room: int, room_to_validate: int, size: int
) -> None:
    trainer = made(tmp_path, room, room_to_validate)
    batches = device_batches(trainer.train_loader, trainer.samples, 0, 1, trainer.accelerator.device)
    assert trainer.micro_batch is not None
    assert trainer.micro_batch.settle(trainer.optimizer_step, batches, 16, trainer.group, has_metrics=False) == size
    assert trainer.model.trained == set(trainer.model.tried)


def test_check_of_the_first_batch_fits_too(tmp_path: Path) -> None:
    trainer = made(tmp_path, room_to_validate=2)
    trainer.train()
    assert (trainer.global_step, trainer.samples.micro_batch_size) == (5, 2)


def test_nothing_fits_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, room=0).train()
    assert caught.value.problems[0].setting == "training.micro_batch_size"


def test_another_error_is_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    def fail(model: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if len(inputs[0]) > 4:  # the search, not the check of the first batch
            raise RuntimeError("planted")

    trainer = made(tmp_path)
    trainer.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        trainer.train()


def test_the_run_is_the_one_that_is_given_the_number(tmp_path: Path) -> None:
    found = made(tmp_path / "found", ema_decay=0.5)
    found.train()
    told = made(tmp_path / "told", ema_decay=0.5, micro_batch_size=4)
    told.train()
    assert found.samples.micro_batch_size == 4
    assert len(found.model.tried) > len(told.model.tried)
    assert_same_weights(weights(found), weights(told))
    assert repr(found.state.optimizer.state_dict()) == repr(told.state.optimizer.state_dict())
    assert timeless(lines(tmp_path / "found")) == timeless(lines(tmp_path / "told"))


def test_a_resumed_run_goes_on_with_what_was_found(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole")
    whole.train()
    made(tmp_path / "parts", callbacks=[StopAt(2)]).train()
    again = made(tmp_path / "parts", room=99)  # there is more room by now, and the sums would round otherwise
    again.train()
    assert again.samples.micro_batch_size == 4
    assert max(again.model.tried) == 4
    assert_same_weights(weights(again), weights(whole))


def test_elsewhere_it_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, callbacks=[StopAt(2)]).train()
    monkeypatch.setattr("platform.machine", lambda: "another")
    again = made(tmp_path, room=3)
    again.train()
    assert (again.global_step, again.samples.micro_batch_size) == (5, 2)


def test_it_may_be_told_or_left_to_be_found_from_a_restart_on(tmp_path: Path) -> None:
    for step, size in ((2, "auto"), (3, 3), (4, "auto")):
        trainer = made(tmp_path, callbacks=[StopAt(step)], micro_batch_size=size)
        trainer.train()
        assert (trainer.global_step, trainer.samples.micro_batch_size) == (step, {3: 3}.get(step, 4))


def _agreeing(count: int, folder: Path) -> None:
    accelerator = create_accelerator()
    room = (5, 3)[accelerator.process_index]  # of 8 sequences each: 4 would fit on the first
    found = made(folder / "found", room, accelerator=accelerator)
    found.train()
    assert (found.accelerator.num_processes, found.samples.micro_batch_size) == (count, 2)
    told = made(folder / "told", room=99, micro_batch_size=2)
    told.train()
    assert_same_weights(weights(found), weights(told))


def test_all_processes_agree_and_none_waits_for_one_that_ran_out(tmp_path: Path) -> None:
    on_processes(2, _agreeing, tmp_path)
    assert timeless(lines(tmp_path / "found")) == timeless(lines(tmp_path / "told"))


def _refused(count: int, folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_trainer(make_config(folder, micro_batch_size="auto"), accelerator=sharded_accelerator())
    assert caught.value.problems[0].setting == "training.micro_batch_size"


def test_sharded_it_is_refused(tmp_path: Path) -> None:
    on_processes(2, _refused, tmp_path)
