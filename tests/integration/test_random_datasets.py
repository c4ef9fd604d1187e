"""What a dataset draws at random follows from the seed, the rank and the step."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from fundamentallm import Callback, Trainer, TrainingConfig
from tests.integration.runs import PartlyIgnored, StopAt, on_processes
from tests.integration.test_training_loop import Bigram


class Drawing(PartlyIgnored):
    """Replaces three tokens of each sample by random ones, one by each generator."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        ids, targets = super().__getitem__(index)
        ids[0], ids[1] = torch.randint(20, ()), int(np.random.randint(20))
        ids[2] = random.randrange(20)
        return ids, targets


def collate_with_noise(samples: list[Any]) -> Any:
    ids, targets = default_collate(samples)
    ids[:, 3] = torch.randint(20, (len(ids),))
    return ids, targets


class Inputs(Callback):
    """Keeps the first tokens of each step's inputs, which are the random ones."""

    def __init__(self) -> None:
        self.seen: dict[int, list[list[int]]] = {}

    def on_train_begin(self, trainer: Trainer) -> None:
        def keep(_: object, inputs: tuple[Tensor]) -> None:
            self.seen[trainer.global_step] = inputs[0][:, :4].tolist()

        trainer.model.register_forward_pre_hook(keep)


def draws(folder: Path, workers: int, *callbacks: Callback, **training: Any) -> dict[int, list[list[int]]]:
    torch.manual_seed(0)
    inputs = Inputs()
    config = TrainingConfig(**{"max_steps": 6, "checkpoint_dir": str(folder), **training})
    loader = DataLoader(Drawing(), batch_size=8, num_workers=workers, collate_fn=collate_with_noise)
    Trainer(Bigram(), config, loader, None, [inputs, *callbacks]).train()
    return inputs.seen


@pytest.mark.parametrize("workers", [0, 2])
def test_random_dataset_after_a_resume_draws_the_same(tmp_path: Path, workers: int) -> None:
    whole = draws(tmp_path / "whole", 0)
    assert len({str(batch) for batch in whole.values()}) == 6
    first = draws(tmp_path / "parts", workers, StopAt(3))
    torch.manual_seed(9), np.random.seed(9), random.seed(9)
    assert first | draws(tmp_path / "parts", workers) == whole


def test_random_dataset_draws_otherwise_with_another_seed(tmp_path: Path) -> None:
    assert draws(tmp_path / "a", 0) != draws(tmp_path / "b", 0, seed=1)


def draws_of_rank(processes: int, folder: str) -> None:
    seen = draws(Path(folder), 0)
    assert torch.distributed.get_world_size() == processes
    gathered: list[Any] = [None] * processes
    torch.distributed.all_gather_object(gathered, [row for batch in seen.values() for row in batch])
    assert gathered[0] != gathered[1]


def test_random_dataset_draws_otherwise_on_each_rank(tmp_path: Path) -> None:
    on_processes(2, draws_of_rank, str(tmp_path))
