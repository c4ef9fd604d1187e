"""Gradients, decisions and checkpoints are the same on any number of processes, and only one process writes."""

import json
import os
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.utils.data import DataLoader

import fundamentallm.train
from fundamentallm import Callback, ConfigError, LoggingCallback, SaveBestCallback, Trainer, TrainingConfig
from fundamentallm.checkpoint.reading import load_checkpoint
from fundamentallm.training.metrics import MEASURED
from tests.integration.runs import PartlyIgnored, on_processes, prose
from tests.integration.test_training_loop import Bigram

GROUP = 4
# 44 samples in batches of 6 or 7 make an epoch whose last batch has 2: fewer than the group has processes.
ROWS = {None: 6, 1: 7}
"""Batch size for each micro-batch size."""


def bigram_trainer(folder: Path, micro_batch_size: int | None, *callbacks: Callback, **training: Any) -> Trainer:
    torch.manual_seed(0)
    settings = {"max_epochs": 2, "learning_rate": 1e-2, "log_every_n_steps": 1, "save_every_n_epochs": None}
    config = TrainingConfig(**{**settings, "micro_batch_size": micro_batch_size, **training})
    loader = DataLoader(PartlyIgnored(), batch_size=ROWS[micro_batch_size], shuffle=True)
    validation = DataLoader(PartlyIgnored(30), batch_size=7)
    return Trainer(Bigram(), config, loader, validation, [LoggingCallback(folder / "metrics.jsonl"), *callbacks])


def distance(one: Tensor, other: Tensor) -> float:
    """Returns the norm of the difference, relative to the norm of the second tensor."""
    return ((one - other).norm() / other.norm().clamp(min=1e-12)).item()


def record_exchanges(processes: int, folder: str) -> None:
    for micro_batch_size in ROWS:
        trainer = bigram_trainer(Path(folder), micro_batch_size, max_steps=5)
        assert trainer.accelerator.num_processes == processes
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            trainer.train()
        numbers = (event.input_shapes[0] for event in profile.events() if event.name == "gloo:all_reduce")
        exchanged, rank = Counter(json.dumps(shape) for shape in numbers), trainer.accelerator.process_index
        (Path(folder) / f"{micro_batch_size}_{rank}.json").write_text(json.dumps(exchanged))


def test_gradients_are_exchanged_once_per_step(tmp_path: Path) -> None:
    on_processes(2, record_exchanges, str(tmp_path))
    one, *others = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json")))
    assert others == [one] * 3
    parameters = sum(parameter.numel() for parameter in Bigram().parameters())
    assert one[json.dumps([parameters])] == 5
    assert one.keys() == {"[]", "[1, 2]", json.dumps([parameters])}  # also counts, losses and sums of a validation


# ---- decisions and checkpoints ---------------------------------------------------------------------------------


def until_patience_runs_out(processes: int, folder: str, micro_batch_size: int | None) -> None:
    trainer = bigram_trainer(
        Path(folder), micro_batch_size, SaveBestCallback(), max_epochs=40, eval_every_n_steps=3,
        checkpoint_dir=f"{folder}/checkpoints", keep_last_n=3, save_every_n_steps=10, early_stopping_patience=3,
        early_stopping_min_delta=0.02,
    )  # fmt: skip
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    (Path(folder) / f"ended_at_{trainer.accelerator.process_index}").write_text(str(trainer.global_step))


def test_checkpoints_equal_those_of_one_process(tmp_path: Path) -> None:
    for processes in (1, GROUP):
        on_processes(processes, until_patience_runs_out, str(tmp_path / str(processes)), 1)
    one, folder = tmp_path / "1", tmp_path / str(GROUP)
    ended_at = (one / "ended_at_0").read_text()
    assert 20 < int(ended_at) < 200
    assert {path.read_text() for path in folder.glob("ended_at_*")} == {ended_at}
    names = sorted(path.name for path in (one / "checkpoints").glob("step_*"))
    assert len(names) == 3
    assert sorted(path.name for path in (folder / "checkpoints").glob("step_*")) == names
    for name in names:
        ours, theirs = (load_checkpoint(run / "checkpoints" / name) for run in (folder, one))
        assert unlike(ours, theirs) == []


def unlike(one: object, other: object, path: str = "") -> list[str]:
    """Returns the paths at which two checkpoints differ by more than rounding, apart from times, folders and hashes."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = (one.keys() | other.keys()) - MEASURED - {"checkpoint_dir", "sha256"}
        return [found for key in sorted(keys) for found in unlike(one.get(key), other.get(key), f"{path}/{key}")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        finite = [tensor.double().nan_to_num(0.0, 0.0, 0.0) for tensor in (one, other)]  # the guard has infinite ones
        alike = torch.equal(one.isfinite(), other.isfinite()) and distance(*finite) < 1e-5
    elif isinstance(one, float) and isinstance(other, float):
        alike = one == pytest.approx(other, rel=1e-5)
    else:
        alike = one == other
    return [] if alike else [path]


class PartlyUsed(Bigram):
    """Has parameters that have no part in the loss: at all, and on the second rank."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.sometimes = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        return logits + self.sometimes if torch.distributed.get_rank() == 0 else logits


def train_partly_used(processes: int) -> None:
    loader, config = DataLoader(PartlyIgnored(), batch_size=8), TrainingConfig(max_steps=3, micro_batch_size=2)
    model = PartlyUsed()
    with pytest.raises(ConfigError) as error:
        Trainer(model, config, loader, callbacks=[]).train()
    names = ("unused.weight", "unused.bias", *["sometimes"] * torch.distributed.get_rank())
    assert all(name in str(error.value) for name in names)
    finding = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[finding])
    trainer = Trainer(PartlyUsed(), config, loader, callbacks=[], accelerator=accelerator)
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    assert trainer.global_step == 3


def test_parameters_without_a_gradient_are_named_or_found(tmp_path: Path) -> None:
    on_processes(2, train_partly_used)


# ---- output ----------------------------------------------------------------------------------------

LOUD = """
output_dir: run
model: {d_model: 16, num_heads: 2, num_layers: 1}
data: {source: text.txt, sequence_length: 16, cache_dir: cache}
training: {batch_size: 8, max_steps: 6, log_every_n_steps: 1, eval_every_n_steps: 3, save_every_n_steps: 2}
sample_tokens: 10
"""


def run_with_all_outputs(processes: int, folder: str) -> None:
    """Trains with bar, log, curves, checkpoints and samples; records what each process prints and writes."""
    os.chdir(folder)
    rank = torch.distributed.get_rank()
    assert torch.distributed.get_world_size() == processes
    written: list[str] = []

    def record(event: str, arguments: tuple[Any, ...]) -> None:
        opened_to_write = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if opened_to_write or event in ("os.mkdir", "os.rename", "os.remove"):
            written.append(str(arguments[0]))

    with Path(f"out_{rank}").open("w") as out, Path(f"err_{rank}").open("w") as err:
        os.dup2(out.fileno(), 1)  # output that bypasses Python
        os.dup2(err.fileno(), 2)
        sys.addaudithook(record)
        with redirect_stdout(out), redirect_stderr(err):
            assert fundamentallm.train.main(["--config", "config.yaml"]) == 0
    # Only in the output folder: any process may encode the text, and torch has a folder of its own.
    recorded = [path for path in written if Path("run") in (Path(path), *Path(path).parents)]
    Path(f"written_{rank}.json").write_text(json.dumps(recorded))


def test_only_the_main_process_prints_and_writes(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(LOUD)
    (tmp_path / "text.txt").write_text(prose())
    on_processes(3, run_with_all_outputs, str(tmp_path))
    written = [json.loads((tmp_path / f"written_{rank}.json").read_text()) for rank in range(3)]
    assert {"metrics.jsonl", "manifest.json", "status.json.new"} <= {Path(path).name for path in written[0]}
    printed = (tmp_path / "out_0").read_text()
    assert printed.count("3 processes on cpu") == 1
    assert printed.count("---- sample") == 1
    assert [(tmp_path / f"{name}_{rank}").read_text() for name in ("out", "err") for rank in (1, 2)] == [""] * 4
    assert written[1:] == [[], []]


# ---- what all processes are given ------------------------------------------------------------------


def unlike_processes(processes: int) -> None:
    rank = torch.distributed.get_rank()
    assert torch.distributed.get_world_size() == processes

    def named(size: int = 44, rows: int = 8, content: str = "a", order: Any = None, **training: Any) -> list[str]:
        data, model = PartlyIgnored(size), Bigram()
        data.fingerprint = lambda: content  # type: ignore[attr-defined]
        loader = DataLoader(data, batch_size=rows, sampler=order)
        rate = training.pop("rate", None)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate) if rate else None
        try:
            Trainer(model, TrainingConfig(max_steps=2, **training), loader, callbacks=[], optimizer=optimizer)
        except ConfigError as error:
            return [problem.setting for problem in error.problems]
        return []

    different = ["training.learning_rate", "training.seed"]
    assert named(learning_rate=0.1 + 0.1 * rank, seed=rank) == different
    assert named(size=44 + rank) == ["train_loader"]
    assert named(rows=8 - rank) == ["train_loader"]
    assert named(order=range(rank, 44, 2)) == ["train_loader"]  # a share for each process
    assert named(content="ab"[rank]) == ["the content of train_loader"]
    assert named(rate=0.1 + 0.1 * rank) == ["optimizer"]
    assert named(checkpoint_dir=f"folder_{rank}", rate=0.1) == []


def test_processes_given_different_settings_or_data_stop() -> None:
    on_processes(2, unlike_processes)
