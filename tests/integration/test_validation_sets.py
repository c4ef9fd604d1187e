"""Several validation sets, a fixed subset of them, and a validation before the first step."""

import dataclasses
import os
import signal
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from fundamentallm import (
    Callback,
    ConfigError,
    DataConfig,
    LoggingCallback,
    ModelConfig,
    SaveBestCallback,
    Trainer,
    TrainingConfig,
    Transformer,
    load_corpus,
)
from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.commands.evaluate import main as evaluate_command
from fundamentallm.config.files import validation_sets
from fundamentallm.config.schema import Config
from fundamentallm.data.loaders import corpus_samples
from fundamentallm.train import make_trainer
from tests.integration.runs import (
    KilledError,
    PartlyIgnored,
    StopAt,
    assert_same_weights,
    lines,
    make_config,
    on_processes,
    prose,
    timeless,
    weights,
)

BOOKS, CODE = 11, 6
"""Samples of the two sets: the last batches have fewer than there are processes."""


def made(folder: Path, callbacks: Any = (), val_loader: Any = None, **training: Any) -> Trainer:
    """A run with two sets, whose best checkpoint is that of the books."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=20, d_model=16, num_heads=2, num_layers=1))
    sets = {"books": DataLoader(PartlyIgnored(BOOKS), 4), "code": DataLoader(PartlyIgnored(CODE), 5)}
    defaults = {"max_steps": 6, "eval_every_n_steps": 2, "log_every_n_steps": 1, "learning_rate": 1e-2}
    config = TrainingConfig(**{"checkpoint_dir": str(folder), **defaults, **training})
    log = LoggingCallback(folder / "metrics.jsonl")
    loaders = DataLoader(PartlyIgnored(20), 5, shuffle=True), sets if val_loader is None else val_loader
    return Trainer(model, config, *loaders, callbacks=[log, SaveBestCallback("val_books_loss"), *callbacks])


def mean_loss(trainer: Trainer, *chosen: tuple[Any, range | list[int]]) -> float:
    """The mean over the targets of some samples, by a plain loop."""
    total = count = 0.0
    for dataset, indices in chosen:
        for index in indices:
            inputs, targets = dataset[index]
            with torch.no_grad():
                logits = trainer.model.eval()(inputs[None])
            total += float(torch.nn.functional.cross_entropy(logits[0], targets, reduction="sum"))
            count += int((targets != -100).sum())
    return total / count


def test_each_set_has_the_loss_of_a_plain_loop(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    trainer.train()
    found = trainer.validate()
    books, code = (PartlyIgnored(BOOKS), range(BOOKS)), (PartlyIgnored(CODE), range(CODE))
    losses = {"val_loss": [books, code], "val_books_loss": [books], "val_code_loss": [code]}
    for name, chosen in losses.items():
        assert found[name] == pytest.approx(mean_loss(trainer, *chosen), rel=1e-5), name
    assert list(found) == ["val_loss", "val_perplexity", "val_books_loss", "val_code_loss"]
    assert found.items() <= lines(tmp_path)[-1].items()
    assert found["val_code_loss"] == trainer.history["val_code_loss"][-1]
    history = trainer.metrics.get_history()["val_books_loss"]
    best = CheckpointManager(tmp_path).get_best()
    assert best is not None
    assert best.name == f"step_{2 * history.index(min(history)) + 2:08d}"


def _capped(count: int, folder: Path, wanted: dict[str, float]) -> None:
    trainer = made(folder, eval_max_samples=7, micro_batch_size=2)
    assert trainer.accelerator.num_processes == count
    assert trainer.validate() == pytest.approx(wanted, rel=1e-5)


def test_a_subset_is_the_same_each_time_on_any_processes(tmp_path: Path) -> None:
    trainer = made(tmp_path, eval_max_samples=7)
    first = trainer.validate()
    samples = trainer.val_samples["books"]
    chosen = [index for step in range(samples.steps_per_epoch) for index in samples.batch(step)]
    assert len({*chosen}) == 7
    assert chosen == sorted(chosen) != [*range(7)]
    assert first["val_books_loss"] == pytest.approx(mean_loss(trainer, (PartlyIgnored(BOOKS), chosen)), rel=1e-5)
    assert first["val_code_loss"] == pytest.approx(mean_loss(trainer, (PartlyIgnored(CODE), range(CODE))), rel=1e-5)
    assert trainer.validate() == made(tmp_path, eval_max_samples=7, seed=5).validate() == first
    on_processes(2, _capped, tmp_path, first)


@pytest.mark.parametrize("batches", [[[5, 1], [3], [7, 9, 2]], None])
def test_a_subset_is_of_what_the_sampler_lists(tmp_path: Path, batches: Any) -> None:
    order = {"batch_sampler": batches} if batches else {"sampler": [5, 1, 3, 7, 9, 2], "batch_size": 2}
    trainer = made(tmp_path, val_loader=DataLoader(PartlyIgnored(BOOKS), **order), eval_max_samples=4)
    samples = trainer.val_samples[""]
    chosen = [index for step in range(samples.steps_per_epoch) for index in samples.batch(step)]
    assert [index for index in (5, 1, 3, 7, 9, 2) if index in chosen] == chosen
    assert len(chosen) == 4


def test_resume_with_early_stopping_on_a_set_is_bit_exact(tmp_path: Path) -> None:
    stopping = {"early_stopping_metric": "val_books_loss", "early_stopping_patience": 2, "eval_every_n_steps": 1}
    whole = made(tmp_path / "whole", learning_rate=1.0, max_steps=20, **stopping)
    whole.train()
    losses = whole.metrics.get_history()["val_books_loss"]
    assert 3 < whole.global_step == losses.index(min(losses)) + 3 < 20
    made(tmp_path / "parts", [StopAt(whole.global_step - 1)], learning_rate=1.0, max_steps=20, **stopping).train()
    resumed = made(tmp_path / "parts", learning_rate=1.0, max_steps=20, **stopping)
    resumed.train()
    assert_same_weights(weights(whole), weights(resumed))
    assert timeless(lines(tmp_path / "whole")) == timeless(lines(tmp_path / "parts"))


class KillAtFirstStep(StopAt):
    def on_step_begin(self, trainer: Any) -> None:
        raise KilledError


def test_eval_at_start_validates_once_before_the_first_step(tmp_path: Path) -> None:
    for callbacks in ([KillAtFirstStep(0)], [StopAt(3)], []):  # the first leaves a line, and perhaps a checkpoint
        trainer = made(tmp_path, callbacks, eval_at_start=True)
        initial = made(tmp_path / "other").validate()
        try:
            trainer.train()
        except KilledError:
            assert callbacks
    logged = [line for line in lines(tmp_path) if "val_loss" in line]
    assert [line["step"] for line in logged] == [0, 2, 4, 6]
    assert initial.items() <= logged[0].items()
    plain = made(tmp_path / "plain")
    plain.train()
    assert_same_weights(weights(plain), weights(trainer))


class EpochEnds(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_epoch_end(self, trainer: Any) -> None:
        self.steps.append(trainer.global_step)


def test_eval_at_start_ends_no_epoch_and_saves_nothing(tmp_path: Path) -> None:
    ends = EpochEnds()
    trainer = made(tmp_path, eval_at_start=True, save_every_n_steps=4)
    trainer.callbacks.callbacks = [ends]
    trainer.train()
    assert trainer.metrics.get_history()["val_step"] == [0, 2, 4, 6]
    assert ends.steps == [4]
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000004", "step_00000006"]


def test_an_interrupted_validation_at_the_start_comes_first(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    made(whole, eval_at_start=True).train()
    first = made(parts, eval_at_start=True)
    evaluate = first._evaluate
    first._evaluate = lambda is_interrupted: (os.kill(os.getpid(), signal.SIGTERM), evaluate(is_interrupted))[1]
    first.train()
    assert (first.global_step, first.was_interrupted, first.validation_due) == (0, True, True)
    made(parts, eval_at_start=True).train()
    assert timeless(lines(whole)) == timeless(lines(parts))


TEXTS = {name: prose(9_000)[first:last] for name, first, last in (("a", 0, 4000), ("b", 4000, 7000), ("c", 7000, 9000))}


def text_config(folder: Path, names: dict[str, str], **data: Any) -> Config:
    """A run on a.txt whose validation sources are `names`."""
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
    paths = {name: str(folder / f"{file}.txt") for name, file in names.items()}
    given = {"source": str(folder / "a.txt"), "validation_source": paths, "sequence_length": 16, "tokenizer": "byte"}
    config = make_config(folder / "run", max_steps=2, eval_every_n_epochs=None)
    return dataclasses.replace(config, data=DataConfig(**(given | data)), sample_tokens=0)


@pytest.mark.parametrize("names", [{"books": "b", "code": "c"}, {"books": "b"}])
def test_a_mapping_in_the_config_names_the_sets(tmp_path: Path, names: dict[str, str]) -> None:
    config = text_config(tmp_path, names)
    trainer = make_trainer(config)
    trainer.train()
    last = lines(tmp_path / "run")[-1]
    for name, file in names.items():
        alone = DataConfig(**{**dataclasses.asdict(config.data), "validation_source": str(tmp_path / f"{file}.txt")})
        _, dataset = corpus_samples(load_corpus(alone, show_progress=False), 16)
        assert last[f"val_{name}_loss"] == pytest.approx(mean_loss(trainer, (dataset, range(len(dataset)))), rel=1e-5)
    assert "val_bits_per_byte" in last
    assert evaluate_command(["--checkpoint", str(tmp_path / "run"), "--json"], "evaluate") == 0


def test_the_sources_of_a_mixture_are_reported_apart(tmp_path: Path) -> None:
    mixed = {str(tmp_path / "b.txt"): 1.0, str(tmp_path / "c.txt"): 2.0}
    config = text_config(tmp_path, {}, source=mixed, validation_source=None)
    trainer = make_trainer(config)
    _, joint = corpus_samples(load_corpus(config.data, show_progress=False), 16)
    found = trainer.validate()
    assert found["val_loss"] == pytest.approx(mean_loss(trainer, (joint, range(len(joint)))), rel=1e-5)
    for name, dataset in zip(("b", "c"), joint.datasets, strict=True):
        assert found[f"val_{name}_loss"] == pytest.approx(mean_loss(trainer, (dataset, range(len(dataset)))), rel=1e-5)
    assert validation_sets(config.data) == ["b", "c"]
    # As a checkpoint has it that was made when the sources were not reported apart.
    assert trainer.state.progress.segments[-1]["content"][1] == joint.fingerprint()


@pytest.mark.parametrize("names", [{}, {"my books": "b"}, {"": "b"}])
def test_names_that_make_no_metric_are_refused(tmp_path: Path, names: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as error:
        DataConfig(validation_source=names)
    assert error.value.problems[0].setting == "validation_source"
    with pytest.raises(ConfigError) as error:
        made(tmp_path, val_loader=MappingProxyType(names))
    assert error.value.problems[0].setting == "val_loader"


def test_a_metric_with_the_name_of_a_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        made(tmp_path, validation_metrics=[f"{__name__}:books_loss"])
    assert error.value.problems[0].setting == "validation_metrics"


def books_loss(logits: Any, targets: Any) -> Any:
    """A metric whose name is that of a set's loss."""


@pytest.mark.parametrize("setting", [{"eval_at_start": True}, {"eval_max_samples": 3}])
def test_settings_of_validation_need_a_loader(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        Trainer(torch.nn.Linear(1, 1), TrainingConfig(max_steps=1, **setting), DataLoader(PartlyIgnored(20), 5))
    assert error.value.problems[0].setting == f"training.{next(iter(setting))}"


def test_a_line_of_step_0_is_not_repeated_without_a_checkpoint(tmp_path: Path) -> None:
    for callbacks in ([KillAtFirstStep(0)], []):
        trainer = made(tmp_path, callbacks, eval_at_start=True, checkpoint_dir=None)
        try:
            trainer.train()
        except KilledError:
            assert callbacks
    assert [line["step"] for line in lines(tmp_path) if "val_loss" in line] == [0, 2, 4, 6]
