"""What is minimised: a model's own loss, the caller's objective; the same in every layout, and after a resume."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, WeightedRandomSampler

from fundamentallm import CheckpointError, ConfigError, Trainer, TrainingConfig
from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.run.progress import samples_of_step
from tests.integration import objectives
from tests.integration.objectives import CASES, Case, causal, classes, difference, plain_losses, samples, trainer_of
from tests.integration.runs import StopAt, on_processes
from tests.integration.test_compile import accelerator_for

pytest.importorskip("transformers")
HERE = "tests.integration.test_objectives"
STEPS = 5
"""More than an epoch, whose last batch is short."""


@pytest.mark.parametrize(("name", "micro"), [("gpt2", 4), ("bert", 1), ("numbers", 1), ("own", None)])
def test_own_losses_are_those_of_a_plain_loop(name: str, micro: int | None) -> None:
    found = trainer_of(name, STEPS, micro_batch_size=micro).train()["train_loss"]
    assert difference(plain_losses(name, STEPS), found) < 1e-5


def test_own_losses_are_the_same_on_three_processes(tmp_path: Path) -> None:
    """The last batch has two rows, fewer than there are processes."""
    expected = {name: plain_losses(name, STEPS) for name in ("gpt2", "numbers", "own")}
    on_processes(3, objectives.compare_on_processes, expected, str(tmp_path), 1)
    assert max(json.loads((tmp_path / "found-0.json").read_text()).values()) < 1e-5


def count_labels(count: int, folder: str) -> None:
    """In the first step, the last process has rows without labels only."""

    def collate(rows: list[Tensor]) -> dict[str, Any]:
        batch = causal(rows)
        batch["labels"][batch["labels"] == 0] = -100
        return batch

    rows = [torch.full((6,), 0 if number in (2, 3) else 5) for number in range(8)]
    loader = DataLoader(rows, batch_size=4, collate_fn=collate)
    trainer = Trainer(CASES["own"].make(), TrainingConfig(max_steps=2), loader, callbacks=[])
    assert trainer.accelerator.num_processes == count
    trainer.train()
    Path(folder, "tokens").write_text(str(trainer.metrics.get_latest("tokens")))


def test_processes_agree_on_whether_a_model_shifts_its_labels(tmp_path: Path) -> None:
    on_processes(2, count_labels, str(tmp_path))
    assert int((tmp_path / "tokens").read_text()) == 6 * 5


def test_run_on_mappings_resumes_to_the_bit(tmp_path: Path) -> None:
    assert objectives.resumes_to_the_bit("gpt2", 6, tmp_path)


def test_compiled_model_takes_batches_of_any_length() -> None:
    trainer = trainer_of("own", STEPS, micro_batch_size=4, compile=True, accelerator=accelerator_for("eager", False))
    assert difference(plain_losses("own", STEPS), trainer.train()["train_loss"]) < 1e-5


ROUTED = {**objectives.TEXT, "num_key_value_heads": 2, "num_local_experts": 2, "output_router_logits": True}
MIXTRAL = Case("MixtralForCausalLM", {**ROUTED, "router_aux_loss_coef": 10.0}, causal)


def test_router_loss_is_averaged_by_targets() -> None:
    """As the model's loss of each micro-batch, a mean, weighted by its number of targets."""
    model, rows = MIXTRAL.make(), samples()[:6]
    batch = causal(rows)
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(3), slice(3, 6))]
    counts = [(part["labels"][:, 1:] != -100).sum() for part in parts]
    with torch.no_grad():
        losses = [model(**part).loss for part in parts]
        assert model(**batch).loss > 2 * F.cross_entropy(torch.zeros(1, 64), torch.tensor([0]))
    loader = DataLoader(rows, batch_size=6, collate_fn=causal)
    trainer = Trainer(model, TrainingConfig(max_steps=1, micro_batch_size=3), loader, callbacks=[])
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert trainer.train()["train_loss"][0] == pytest.approx(float(expected), rel=1e-5)


def test_router_loss_is_minimised_with_pairs_too() -> None:
    ids = torch.stack([row[:5] for row in samples()[:6]])
    model = MIXTRAL.make()
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    pairs = list(zip(ids, torch.cat([ids[:, 1:], torch.full((6, 1), -100)], 1), strict=True))
    trainer = Trainer(model, TrainingConfig(max_steps=1), DataLoader(pairs, batch_size=6), callbacks=[])
    assert trainer.train()["train_loss"][0] == pytest.approx(expected, rel=1e-5)


class Contrast:
    """Pulls the sums of an anchor's and a positive's features together: an objective without labels."""

    weight = 1

    def num_targets(self, batch: dict[str, Any]) -> int:
        return self.weight * len(batch["anchor"])

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        assert batch["name"] == [f"{anchor[0]:.4f}" for anchor in batch["anchor"].tolist()]  # rows stay together
        outputs = model(batch["anchor"]) - model(batch["positive"])
        return self.weight * outputs.square().sum(), outputs


def sum_over_samples(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return Contrast()(model, batch)[0]


class Twice(Contrast):
    weight = 2


def features() -> list[dict[str, Any]]:
    values = torch.rand(7, 2, 3, generator=torch.Generator().manual_seed(0))
    return [{"anchor": x, "positive": y, "name": f"{float(x[0]):.4f}"} for x, y in values]


def run_objective(objective: Any, **arguments: Any) -> Trainer:
    torch.manual_seed(0)
    training = {"max_steps": 4, "log_every_n_steps": 1, "learning_rate": 0.1, **arguments.pop("training", {})}
    config = TrainingConfig(**training)
    loader = DataLoader(features(), batch_size=4, shuffle=False)
    trainer = Trainer(nn.Linear(3, 2), config, loader, loader, callbacks=[], objective=objective, **arguments)
    trainer.train()
    return trainer


def test_callers_objectives_are_minimised() -> None:
    """A function counts samples; a factor of both sum and count changes nothing; nor do micro-batches."""
    losses = run_objective(sum_over_samples).history["train_loss"]
    torch.manual_seed(0)
    model, first = nn.Linear(3, 2), features()[:4]
    anchor, positive = (torch.stack([row[name] for row in first]) for name in ("anchor", "positive"))
    assert losses[0] == pytest.approx((model(anchor) - model(positive)).square().sum().item() / 4, rel=1e-6)
    assert losses[3] < losses[1]
    others = (
        {"objective": Contrast()},
        {"objective": Twice()},
        {"objective": None, "training": {"objective": f"{HERE}:Contrast"}},
        {"objective": None, "training": {"objective": f"{HERE}:sum_over_samples", "micro_batch_size": 1}},
    )
    for arguments in others:
        assert run_objective(**arguments).history["train_loss"] == pytest.approx(losses, rel=1e-6), arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {"objective": sum_over_samples, "loss_fn": F.mse_loss},
        {"objective": sum_over_samples, "training": {"loss": "focal"}},
        {"objective": nn.Linear(2, 2)},
        {"objective": None, "training": {"objective": "no.such:thing"}},
    ],
)
def test_objectives_that_do_not_fit_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        run_objective(**arguments)
    assert error.value.problems[0].setting == "training.objective"


def right(outputs: Any, batch: Any) -> tuple[Tensor, int]:
    return (outputs.logits.argmax(-1) == batch["labels"]).sum(), len(batch["labels"])


class MeanDistance:
    """Collects all rows, as `compute` of the package evaluate wants them."""

    def __init__(self) -> None:
        self.rows: list[float] = []

    def reset(self) -> None:
        self.rows = []

    def update(self, outputs: Any, batch: Any) -> None:
        self.rows += (outputs.logits.softmax(-1)[:, 0] * batch["labels"]).tolist()

    def compute(self) -> float:
        rows = gather_object(self.rows)
        assert len(rows) == objectives.ROWS
        return sum(rows) / len(rows)


def validate(count: int, folder: str) -> None:
    loader = DataLoader(samples(), batch_size=3, collate_fn=classes)
    metrics: Any = {"right": right, "distance": MeanDistance()}
    config = TrainingConfig(max_steps=1, micro_batch_size=1)
    trainer = Trainer(CASES["sequences"].make(), config, loader, loader, callbacks=[], validation_metrics=metrics)
    assert trainer.accelerator.num_processes == count
    trainer.validate()
    Path(folder, f"{trainer.accelerator.process_index}-of-{count}").write_text(json.dumps(trainer.validate()))


def test_metrics_of_outputs_and_batch_are_exact_on_two_processes(tmp_path: Path) -> None:
    model, batch = CASES["sequences"].make().eval(), classes(samples())
    with torch.no_grad():
        output = model(**batch)
    expected = {
        "val_loss": float(output.loss),
        "val_right": float((output.logits.argmax(-1) == batch["labels"]).float().mean()),
        "val_distance": float((output.logits.softmax(-1)[:, 0] * batch["labels"]).mean()),
    }
    for count in (1, 2):
        on_processes(count, validate, str(tmp_path))
        found = json.loads((tmp_path / f"0-of-{count}").read_text())
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_metrics_need_an_objective_that_returns_outputs() -> None:
    with pytest.raises(ConfigError, match="outputs"):
        run_objective(sum_over_samples, validation_metrics={"any": right})
    found = run_objective(Contrast(), validation_metrics={"size": lambda x, batch: (x.sum() * 0 + 2, 2 * len(batch))})
    assert found.metrics.get_latest("val_size") == pytest.approx(2 / 6)  # two batches of three entries


def test_micro_batch_size_auto_takes_mappings() -> None:
    trainer = trainer_of("own", 1, micro_batch_size="auto")
    trainer.train()
    assert trainer.micro_batch is not None
    assert trainer.micro_batch.size == objectives.BATCH


@pytest.mark.parametrize("batched", [False, True])
def test_run_with_a_sampler_of_the_callers_resumes_to_the_bit(batched: bool, tmp_path: Path) -> None:
    """In the middle of the second epoch. The checkpoint cannot tell its samples, and says so."""

    def trainer(folder: Path | None, callbacks: list[Any], power: float = 1.0) -> Trainer:
        torch.manual_seed(0)
        loader = DataLoader(features(), **sampling(power))
        training = TrainingConfig(max_steps=10, checkpoint_dir=folder and str(folder), learning_rate=0.1)
        return Trainer(nn.Linear(3, 2), training, loader, callbacks=callbacks, objective=Contrast())

    def sampling(power: float) -> dict[str, Any]:
        weighted = WeightedRandomSampler([float(i) ** power for i in range(1, 8)], 7)
        return {"batch_sampler": Twos(weighted)} if batched else {"sampler": weighted, "batch_size": 2}

    whole = trainer(None, [])
    whole.train()
    trainer(tmp_path, [StopAt(6)]).train()
    resumed = trainer(tmp_path, [])
    resumed.train()
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert resumed.samples.samples_seen(10) == whole.samples.samples_seen(10)
    with pytest.raises(CheckpointError, match="sampler"):
        samples_of_step(CheckpointManager(str(tmp_path)).get_latest(), 3)
    with pytest.raises(ConfigError) as error:
        trainer(tmp_path, [], power=2.0).train()
    assert "data.sampler" in {problem.setting for problem in error.value.problems}


class Twos:
    """Batches of one and two in turn."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        indices = list(self.sampler)
        return iter([indices[:1], indices[1:3], indices[3:4], indices[4:6], indices[6:]])
