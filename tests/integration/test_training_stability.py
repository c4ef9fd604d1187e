"""A step whose loss or gradient is not finite changes nothing, is logged as what it is, and ends a run in time."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fundamentallm import Callback, LoggingCallback, Trainer, TrainingConfig, TrainingError, create_loss
from fundamentallm.errors import CheckpointError
from fundamentallm.training.step import skips_on_device
from tests.integration.runs import PartlyIgnored, assert_same_weights, lines, make_config, make_trainer, on_processes
from tests.integration.test_training_loop import Bigram

BAD_STEP = 3


class SpoiledLoss(nn.Module):
    """Cross entropy that one step spoils: its value, or (value intact) only its gradient."""

    def __init__(self, kind: str, bad_calls: set[int]) -> None:
        super().__init__()
        self.kind, self.bad_calls, self.calls, self.plain = kind, bad_calls, 0, create_loss()

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            if self.calls in self.bad_calls:
                if self.kind == "loss":
                    return self.plain(logits, targets) * math.inf
                logits.register_hook(lambda gradient: gradient * math.nan)
        return self.plain(logits, targets)


class Snapshots(Callback):
    """Weights and moments after each step."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Tensor]] = []

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        moments = trainer.state.parts["optimizer"].state_dict()["state"]
        flat = {f"{name}/{key}": value.clone() for name, state in moments.items() for key, value in state.items()}
        self.taken.append({**flat, **{name: p.detach().clone() for name, p in trainer.model.named_parameters()}})


def spoiled_trainer(folder: Path, kind: str, bad_calls: set[int], optimizer: str = "adamw", **training) -> Trainer:
    torch.manual_seed(0)
    loader = DataLoader(PartlyIgnored(), batch_size=8)
    config = TrainingConfig(**{"max_steps": 5, "log_every_n_steps": 1, "optimizer": optimizer, **training})
    callbacks: list[Callback] = [Snapshots(), LoggingCallback(folder / "metrics.jsonl")]
    return Trainer(Bigram(), config, loader, None, callbacks, loss_fn=SpoiledLoss(kind, bad_calls))


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [("loss", "adamw"), ("gradient", "adam"), ("loss", "sgd"), ("gradient", "muon"), ("loss", "torch.optim:Adagrad")],
)
def test_a_bad_step_changes_no_weight_and_no_moment(tmp_path: Path, kind: str, optimizer: str) -> None:
    trainer = spoiled_trainer(tmp_path, kind, {BAD_STEP}, optimizer)
    trainer.train()
    snapshots = trainer.callbacks.callbacks[0].taken
    assert_same_weights(snapshots[BAD_STEP - 1], snapshots[BAD_STEP - 2])
    assert not torch.equal(snapshots[BAD_STEP]["head.weight"], snapshots[BAD_STEP - 1]["head.weight"])
    assert all(tensor.isfinite().all() for tensor in snapshots[-1].values())


def test_a_bad_step_is_logged_as_what_it_is_and_counted(tmp_path: Path) -> None:
    spoiled_trainer(tmp_path, "loss", {BAD_STEP}).train()
    written = lines(tmp_path)
    assert [line["bad_steps"] for line in written] == [0, 0, 1, 1, 1]
    assert [line["train_loss"] for line in written].index("Infinity") == BAD_STEP - 1
    assert all(isinstance(line["train_loss"], float) for line in written if line["step"] != BAD_STEP)
    for text in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    trainer = spoiled_trainer(
        tmp_path, "gradient", set(range(4, 99)), max_steps=50, max_bad_steps=6, checkpoint_dir=str(tmp_path / "c"),
        save_every_n_steps=2,
    )  # fmt: skip
    with pytest.raises(TrainingError, match="6 consecutive"):
        trainer.train()
    assert trainer.global_step == 9
    manager = trainer.checkpoint_manager
    weights = manager.load(manager.get_latest())["model_state_dict"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


def spoiled_on_one_process(processes: int, folder: str) -> None:
    bad_calls = {BAD_STEP} if torch.distributed.get_rank() == 1 else set()
    trainer = spoiled_trainer(Path(folder), "gradient", bad_calls)
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    snapshots = trainer.callbacks.callbacks[0].taken
    assert_same_weights(snapshots[BAD_STEP - 1], snapshots[BAD_STEP - 2])
    assert trainer.metrics.get_latest("bad_steps") == 1


def test_a_bad_step_of_one_process_is_one_of_all(tmp_path: Path) -> None:
    on_processes(2, spoiled_on_one_process, str(tmp_path))


def test_batches_without_any_target_do_no_harm(tmp_path: Path) -> None:
    class Nothing(PartlyIgnored):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            ids, targets = super().__getitem__(index)
            return ids, torch.full_like(targets, -100) if index < 8 else targets

    torch.manual_seed(0)
    loader = DataLoader(Nothing(), batch_size=8)
    history = Trainer(Bigram(), TrainingConfig(log_every_n_steps=1), loader, callbacks=[]).train()
    assert math.isnan(history["train_loss"][0])
    assert history["tokens"][0] == history["bad_steps"][-1] == 0
    assert all(map(math.isfinite, history["train_loss"][1:]))


class Flagged(torch.optim.Optimizer):
    """Carries torch's flag for optimizers that skip by `found_inf`, and ignores the attribute."""

    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 1.0, "fused": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"])


def test_step_clips_and_guards_an_optimizer_that_only_claims_to_skip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, snapshots = Bigram(), Snapshots()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(
        model,
        TrainingConfig(max_steps=3, gradient_clip_norm=1e-3, lr_scheduler="constant", warmup_steps=0),
        DataLoader(PartlyIgnored(), batch_size=8),
        callbacks=[snapshots],
        optimizer=Flagged(model.parameters()),
        loss_fn=SpoiledLoss("gradient", {2}),
    )
    trainer.train()
    moved = math.sqrt(sum((snapshots.taken[0][name] - start[name]).square().sum().item() for name in start))
    assert moved == pytest.approx(1e-3, rel=1e-2)  # the clipped gradient at a learning rate of 1
    assert_same_weights(snapshots.taken[1], snapshots.taken[0])


class FailsOnce(Callback):
    """Raises within the optimizer's step."""

    def on_train_begin(self, trainer: Trainer) -> None:
        def fail(*_: object) -> None:
            if trainer.global_step == 1:
                raise RuntimeError("within the update")

        trainer.optimizer.register_step_post_hook(fail)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_step_that_fails_leaves_no_attribute_and_no_way_on(tmp_path: Path, optimizer: str) -> None:
    trainer = make_trainer(make_config(tmp_path, optimizer=optimizer, max_steps=2), callbacks=[FailsOnce()])
    with pytest.raises(RuntimeError, match="within the update"):
        trainer.train()
    assert not {"found_inf", "grad_scale"} & vars(trainer.optimizer).keys()
    with pytest.raises(CheckpointError):
        trainer.train()


class Normed(Bigram):
    """Has running statistics, a codebook that each forward pass replaces, and a buffer that never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(12)
        self.register_buffer("codebook", torch.zeros(12))
        self.register_buffer("constant", torch.ones(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.training:
            self.codebook = self.codebook + x.detach().mean(dim=(0, 1))
        return self.head(self.norm(self.mix(x).mT).mT)


class Buffers(Callback):
    """Keeps the buffers after each step."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Tensor]] = []

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        self.taken.append({name: buffer.clone() for name, buffer in trainer.model.named_buffers()})


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # before the skipped optimizer step
@pytest.mark.parametrize(("bad_step", "optimizer"), [(1, "adamw"), (BAD_STEP, "torch.optim:Adagrad")])
def test_a_bad_step_changes_no_buffer(bad_step: int, optimizer: str) -> None:
    torch.manual_seed(0)
    buffers, loader = Buffers(), DataLoader(PartlyIgnored(), batch_size=8)
    model, loss = Normed(), SpoiledLoss("loss", {bad_step})
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    config = TrainingConfig(max_steps=5, optimizer=optimizer)
    Trainer(model, config, loader, None, [buffers], loss_fn=loss).train()
    taken = [start, *buffers.taken]
    assert_same_weights(taken[bad_step], taken[bad_step - 1])
    for name in ("norm.running_mean", "norm.num_batches_tracked", "codebook"):
        assert not torch.equal(taken[bad_step + 1][name], taken[bad_step][name])
    assert taken[-1]["constant"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_no_checkpoint_holds_is_named(persistent: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = Normed()
    model.register_buffer("codebook", torch.zeros(12), persistent=persistent)
    Trainer(model, TrainingConfig(max_steps=1), DataLoader(PartlyIgnored(), 8), callbacks=[]).train()
    named = [record for record in caplog.records if "codebook" in record.getMessage()]
    assert len(named) == (not persistent)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # before the skipped optimizer step
def test_fused_sgd_of_the_caller_survives_a_skipped_first_step() -> None:
    """torch's kernel would start from uninitialised momentum."""
    torch.manual_seed(0)
    model = Bigram()
    first, *others = model.parameters()
    groups = [{"params": [first]}, {"params": others, "momentum": 0.9}]
    optimizer = torch.optim.SGD(groups, lr=0.1, fused=True)
    assert not skips_on_device(optimizer)
    config = TrainingConfig(max_steps=3, lr_scheduler="constant", warmup_steps=0)
    loader = DataLoader(PartlyIgnored(), batch_size=8)
    loss = SpoiledLoss("loss", {1})
    Trainer(model, config, loader, callbacks=[], optimizer=optimizer, loss_fn=loss).train()
    assert skips_on_device(optimizer)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
