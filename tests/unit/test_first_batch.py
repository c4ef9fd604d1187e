"""Known traps: reported before the first step, with what to do."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fundamentallm import Callback, Trainer, TrainingConfig, shift_labels
from fundamentallm.errors import ConfigError

IDS = torch.arange(80).reshape(10, 8) % 10
NEXT = (IDS + 1) % 10


class Model(nn.Module):
    """Ten classes for each of ten ids; `output` makes what forward returns of the logits."""

    def __init__(self, output: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.embedding, self.head, self.output = nn.Embedding(10, 8), nn.Linear(8, 10), output

    def forward(self, x: Tensor) -> Any:
        return self.output(self.head(self.embedding(x)))


class WithLabels(Model):
    """`output` is given the logits and the labels."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        return self.output(self.head(self.embedding(input_ids)), labels)


class LikeNanoGPT(Model):
    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        hidden = self.embedding(idx)
        if targets is None:
            return self.head(hidden[:, [-1]]), None
        logits = self.head(hidden)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)


def trainer(model: nn.Module, data: Any, collate: Any = None, **arguments: Any) -> Trainer:
    config = TrainingConfig(max_steps=2, log_every_n_steps=1, **arguments.pop("training", {}))
    torch.manual_seed(0)
    loader = DataLoader(data, batch_size=4, collate_fn=collate)
    return Trainer(model, config, loader, **{"callbacks": [], **arguments})


def pairs(inputs: Tensor = IDS, targets: Tensor = NEXT) -> TensorDataset:
    return TensorDataset(inputs, targets)


def mappings(**entries: Tensor) -> list[dict[str, Tensor]]:
    columns = {"input_ids": IDS, "labels": NEXT, "attention_mask": torch.ones_like(IDS), **entries}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(IDS))]


def with_loss(logits: Tensor, labels: Tensor) -> Any:
    return {"loss": loss(logits, labels), "logits": logits}


@pytest.mark.parametrize(
    ("model", "data", "setting", "named"),
    [
        (Model(), pairs(targets=torch.full_like(IDS, -100)), "the number of targets", "-100"),
        (Model(), pairs(targets=IDS + 5), "targets", "0 to 9"),
        (Model(), pairs(IDS + 5), "inputs", "0 to 9, the rows of embedding.weight"),
        (Model(), pairs(IDS.float()), "inputs", "embedding.weight"),
        (Model(), pairs(targets=NEXT.float()), "targets", "targets.long()"),
        (Model(lambda logits: {"hidden": logits}), pairs(), "the model's output", "a dict of hidden"),
        (Model(lambda logits: logits.mean(1)), pairs(), "targets", "objective"),
        (Model(lambda logits: {"logits": logits, "z_loss": logits.mean()}), pairs(), "the model's output", "z_loss"),
        (Model(), TensorDataset(IDS, IDS, IDS), "batch", "objective"),
        (Model(), ["text"] * 10, "batch", "inputs, targets"),
        (WithLabels(lambda logits, labels: {"hidden": logits}), mappings(), "the model's output", "loss"),
        (WithLabels(with_loss), mappings(labels=IDS + 5), "targets", "0 to 9"),
        (
            WithLabels(with_loss),
            mappings(attention_mask=torch.eye(10)[:, 2:].long()),
            "batch['attention_mask']",
            "sample 0",
        ),
        (Model(), [{"x": row} for row in IDS], "batch", "labels"),
    ],
)
def test_first_batch_names_what_does_not_fit(model: nn.Module, data: Any, setting: str, named: str) -> None:
    made = trainer(model, data)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError) as error:
        made.train()
    (problem,) = error.value.problems
    assert problem.setting == setting
    assert named in problem
    assert made.global_step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_first_batch_of_validation_is_checked_too() -> None:
    made = trainer(Model(), pairs(), val_loader=DataLoader(pairs(targets=IDS + 5), batch_size=4))
    with pytest.raises(ConfigError) as error:
        made.validate()
    assert error.value.problems[0].setting == "targets"


def test_distances_of_unlike_shapes_are_refused() -> None:
    """(4, 1) outputs and (4,) targets: torch would compare each output with each target."""

    def squared(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets, reduction="sum")

    data = TensorDataset(torch.rand(10, 3), torch.rand(10))
    with pytest.raises(ConfigError, match="squeeze"):
        trainer(nn.Linear(3, 1), data, loss_fn=squared).train()
    data = TensorDataset(torch.rand(10, 3), torch.rand(10, 1))
    trainer(nn.Linear(3, 1), data, loss_fn=squared).train()


@pytest.mark.parametrize("as_mapping", [False, True])
def test_copied_inputs_are_reported_and_shift_labels_helps(
    as_mapping: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = WithLabels(with_loss) if as_mapping else Model()
    data = mappings(labels=IDS) if as_mapping else pairs(IDS, IDS)
    trainer(model, data).train()
    assert "shift_labels" in capsys.readouterr().out
    shifted = trainer(Model() if not as_mapping else WithLabels(with_loss), data, shift_labels)
    losses = shifted.train()["train_loss"]
    assert "shift_labels" not in capsys.readouterr().out
    by_hand = trainer(Model(), pairs(IDS[:, :-1], IDS[:, 1:]))
    assert by_hand.train()["train_loss"] == pytest.approx(losses, rel=1e-6)


def test_labels_that_are_shifted_twice_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(WithLabels(shifting), mappings(labels=IDS)).train()
    assert "warning" not in capsys.readouterr().out
    trainer(WithLabels(shifting), mappings(labels=NEXT)).train()
    assert "shifts labels itself" in capsys.readouterr().out


def test_model_like_nanogpts_trains_on_all_its_logits() -> None:
    losses = [trainer(model(), pairs()).train()["train_loss"] for model in (LikeNanoGPT, Model)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    tuples = trainer(Model(lambda logits: (logits, None)), pairs()).train()["train_loss"]
    assert tuples == losses[1]


def test_tokenizer_that_pads_with_another_token_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    class Collator:
        tokenizer = SimpleNamespace(pad_token_id=3)

        def __call__(self, samples: Any) -> Any:
            return torch.utils.data.default_collate(samples)

    model = WithLabels(with_loss)
    model.config = SimpleNamespace(pad_token_id=0)
    trainer(model, mappings(), Collator()).train()
    assert "pad_token_id" in capsys.readouterr().out
    model.config.pad_token_id = 3
    trainer(model, mappings(), Collator()).train()
    assert "pad_token_id" not in capsys.readouterr().out


def shifting(logits: Tensor, labels: Tensor) -> Any:
    return {"loss": loss(logits[:, :-1], labels[:, 1:]), "logits": logits}


def test_first_batches_without_targets_are_allowed_if_later_ones_have_some() -> None:
    """The one with targets shows that the model shifts them."""
    labels = IDS.clone()
    labels[:4] = -100
    history = trainer(WithLabels(shifting), mappings(labels=labels)).train()
    assert history["tokens"] == [0, 4 * 7]


@pytest.mark.parametrize("num_masked", [1, 4])
def test_masked_prompts_do_not_hide_that_a_model_shifts(num_masked: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Counting the first label changes the number of targets, and so the rounding of the loss."""
    labels = IDS.clone()
    labels[:4, :num_masked] = -100
    history = trainer(WithLabels(shifting), mappings(labels=labels)).train()
    assert history["tokens"] == [4 * (8 - num_masked), 4 * (8 - num_masked) + 4 * 7]
    assert "warning" not in capsys.readouterr().out


def test_entries_that_the_model_does_not_take_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(WithLabels(with_loss), mappings()).train()
    assert "warning" not in capsys.readouterr().out
    trainer(WithLabels(with_loss), mappings(token_type_ids=IDS)).train()
    assert capsys.readouterr().out.count("does not take token_type_ids") == 1


def test_check_of_the_first_batch_leaves_no_trace() -> None:
    class Noisy(Model):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return self.head(self.norm(self.embedding(x).transpose(1, 2)).transpose(1, 2))

    class AtFirstStep(Callback):
        def on_step_begin(self, trainer: Any) -> None:
            assert trainer.global_step > 0 or trainer.model.calls == 0
            assert all(module.training for module in trainer.model.modules())
            assert all(parameter.grad is None for parameter in trainer.model.parameters())

    trainer(Noisy(), pairs(), callbacks=[AtFirstStep()]).train()


def test_a_loss_beside_the_models_own_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        trainer(WithLabels(with_loss), mappings(), training={"loss": "focal"}).train()
    assert error.value.problems[0].setting == "training.loss"


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    return loss(logits, labels, "sum")


@pytest.mark.parametrize("micro_batch_size", [None, 1])
@pytest.mark.parametrize("as_objective", [False, True])
def test_a_mean_is_refused_as_a_loss(as_objective: bool, micro_batch_size: int | None) -> None:
    for kind in (loss, summed):
        given: Any = {"loss_fn": kind}
        if as_objective:
            given = {"objective": lambda model, batch, kind=kind: kind(model(batch[0]), batch[1])}
        made = trainer(Model(), pairs(), training={"micro_batch_size": micro_batch_size}, **given)
        with pytest.raises(ConfigError, match="reduction=") if kind is loss else nullcontext():
            made.train()
        assert made.global_step == (0 if kind is loss else 2)
