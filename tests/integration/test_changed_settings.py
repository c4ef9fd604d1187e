"""Settings that may differ on resume, those that must be allowed by name, and new runs from the weights of another."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Subset

from fundamentallm import CheckpointError, ConfigError, Trainer, TrainingConfig, create_dataloaders, load_model
from fundamentallm.checkpoint.reading import load_parts
from fundamentallm.commands import checkpoints, prepare
from fundamentallm.commands.evaluate import main as evaluate
from fundamentallm.config.schema import Config, DataConfig, ModelConfig
from fundamentallm.data.tokenizers import create_tokenizer, read_tokenizer, same_tokenizer
from fundamentallm.train import make_trainer as make_from_config
from tests.conftest import reset_accelerate
from tests.integration.runs import (
    Counting,
    StopAt,
    assert_same_weights,
    lines,
    make_config,
    make_trainer,
    prose,
    weights,
)
from tests.integration.test_training_loop import Bigram


def part(folder: Path, batch_size: int, stop_at: int | None = None, size: int = 44, **training: Any) -> Trainer:
    """Launches a run once, from Python, over a dataset that notes its samples."""
    torch.manual_seed(0)
    config = TrainingConfig(**{"max_epochs": 3, "checkpoint_dir": str(folder), **training})
    loader = DataLoader(Counting(size), batch_size=batch_size, shuffle=True)
    trainer = Trainer(Bigram(), config, loader, callbacks=[StopAt(stop_at)] if stop_at else [])
    trainer.train()
    return trainer


def test_resume_after_a_changed_batch_size_is_bit_exact(tmp_path: Path) -> None:
    allowed = {"resume_changes": ["training.batch_size"]}
    for folder in ("whole", "parts"):
        part(tmp_path / folder, 8, stop_at=8)
    whole = part(tmp_path / "whole", 5, **allowed)
    part(tmp_path / "parts", 5, stop_at=11, **allowed)
    parts = part(tmp_path / "parts", 5)  # the change is part of the run now
    assert_same_weights(weights(parts), weights(whole))
    assert parts.total_steps == whole.total_steps
    assert parts.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
    assert parts.metrics.get_latest("learning_rate") == pytest.approx(3e-4 * 0.1)  # the floor, at the last step
    starts = [(segment["batch_size"], segment["start"]) for segment in parts.state.progress.segments]
    assert starts == [(8, [0, 0, 0, 0]), (5, [8, 1, 16, 60])]


def test_resume_with_a_changed_text_is_refused(tmp_path: Path) -> None:
    config = from_text(tmp_path, tokenizer="byte")
    make_from_config(config).train()
    text = prose()
    (tmp_path / "moved.txt").write_text(text)
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(tmp_path / "moved.txt")))
    trainer = make_from_config(moved)
    trainer.train()
    assert trainer.global_step == 5
    for index in (1234, len(text) - 1):  # in the training part, in the validation part
        changed = text[:index] + chr(ord(text[index]) ^ 1) + text[index + 1 :]
        (tmp_path / "moved.txt").write_text(changed)
        with pytest.raises(ConfigError, match=r"data\.content is"):
            make_from_config(moved).train()


def test_run_keeps_the_tokenizer_it_began_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = "bpe:300"

    def start(spec: str, *may_change: str, steps: int = 5, **model: Any) -> Trainer:
        config = from_text(tmp_path, tokenizer=spec, suffixes=[".txt"])
        data = dataclasses.replace(config.data, source=str(tmp_path / "*.txt"))
        training = dataclasses.replace(config.training, resume_changes=list(may_change), max_steps=steps)
        shape = dataclasses.replace(config.model, **model)
        reset_accelerate()
        trainer = make_from_config(dataclasses.replace(config, data=data, training=training, model=shape).resolved())
        trainer.train()
        return trainer

    before = start(spec).train_loader.dataset.tokenizer.to_str()
    (tmp_path / "more.txt").write_text("zq " * 3_000)
    with pytest.raises(ConfigError, match=r"data\.content"):
        start(spec)
    given = {"output_dir": tmp_path / "old", "data.source": tmp_path / "*.txt", "data.tokenizer": spec}
    assert prepare.main([f"--{name}={value}" for name, value in given.items()], "prepare") == 0
    prepared = Path(capsys.readouterr().out.rpartition(" is prepared in ")[2].rpartition(" (")[0])
    assert same_tokenizer(read_tokenizer(prepared / "tokenizer.json"), Tokenizer.from_str(before))
    again = start(spec, "data", "training", steps=6)
    assert again.train_loader.dataset.tokenizer.to_str() == before
    assert evaluate(["--checkpoint", str(tmp_path / "old/checkpoints/step_00000006")], "evaluate") == 0
    for other in ("bpe:290", "byte"):
        with pytest.raises(ConfigError) as error:
            start(other, "data", "model", "training")
        assert [problem.setting for problem in error.value.problems] == ["data.tokenizer"]
    size = again.model.config.vocab_size + 7
    with pytest.raises(ConfigError) as error:
        start(spec, "data", "training", "model.vocab_size", vocab_size=size)
    (problem,) = error.value.problems
    assert problem.setting == "model.vocab_size"
    assert "resume_changes" not in problem.advice
    (tmp_path / "old/checkpoints/step_00000006/model.safetensors").write_bytes(b"")  # an earlier one has it too
    assert start(spec, "data", "training", steps=7).train_loader.dataset.tokenizer.to_str() == before


def test_run_without_an_end_of_text_resumes_by_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = from_text(tmp_path, tokenizer="bpe:300", end_of_text=None)
    make_from_config(old).train()
    data, training = DataConfig(**vars(old.data) | {"end_of_text": "auto"}), old.training
    more = dataclasses.replace(training, max_steps=8, resume_changes=["training.max_steps", "training.warmup_steps"])
    reset_accelerate()
    capsys.readouterr()
    trainer = make_from_config(dataclasses.replace(old, data=data, training=more))
    trainer.train()
    assert (trainer.global_step, trainer.config.data.end_of_text) == (8, None)
    assert "data.end_of_text" not in capsys.readouterr().out
    named = dataclasses.replace(old, data=dataclasses.replace(old.data, end_of_text="<|endoftext|>"), training=more)
    reset_accelerate()
    with pytest.raises(ConfigError) as error:
        make_from_config(named).train()
    assert {problem.setting for problem in error.value.problems} == {"data.tokenizer"}
    assert "data.end_of_text" in error.value.problems[0].advice
    new = dataclasses.replace(old, output_dir=str(tmp_path / "new"), data=data)
    reset_accelerate()
    made = make_from_config(new)
    made.train()
    checkpoint = tmp_path / "new/checkpoints/step_00000005"
    assert made.config.data.end_of_text == load_parts(checkpoint, ["config"])["config"]["data"]["end_of_text"]
    ends = {load_model(checkpoint).tokenizer.id_to_token(token) for token in load_model(checkpoint).stop}
    assert ends == {made.config.data.end_of_text} == {"<|endoftext|>"}
    assert evaluate(["--checkpoint", str(checkpoint)], "evaluate") == 0


@pytest.mark.parametrize("kind", ["own", "text"])
def test_own_loader_without_an_end_resumes_by_the_default(tmp_path: Path, kind: str) -> None:
    for end_of_text, steps in ((None, 2), ("auto", 4)):
        reset_accelerate()
        data = DataConfig(tokenizer="bpe:300", end_of_text=end_of_text, sequence_length=16)
        training = TrainingConfig(max_steps=steps, warmup_steps=1, resume_changes=["training.max_steps"])
        config = Config(output_dir=str(tmp_path), data=data, training=training)
        dataset: Any = Counting(40)
        if kind == "text":  # which has no documents, whatever the tokenizer knows
            tokenizer = create_tokenizer("bpe:300", prose(), "<|endoftext|>")
            dataset = Subset(create_dataloaders(prose(), tokenizer, config)[0].dataset, range(40))
        trainer = Trainer(Bigram(300), config, DataLoader(dataset, batch_size=4, shuffle=True), callbacks=[])
        trainer.train()
        assert (trainer.global_step, trainer.config.data.end_of_text) == (steps, None)


def test_resume_with_special_tokens_read_otherwise_names_them(tmp_path: Path) -> None:
    end = "<|endoftext|>"
    tokenizer = create_tokenizer("byte", end_of_text=end)
    tokenizer.save(str(tmp_path / "mine.json"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": f"{prose(900)}{end}{prose(900)}"}))
    config = from_text(tmp_path, tokenizer=str(tmp_path / "mine.json"), end_of_text=end, special_tokens="text")
    data = dataclasses.replace(config.data, source=str(tmp_path / "rows.jsonl"))
    make_from_config(dataclasses.replace(config, data=data)).train()
    with pytest.raises(ConfigError) as error:
        make_from_config(dataclasses.replace(config, data=dataclasses.replace(data, special_tokens=None))).train()
    found = {problem.setting: problem.allowed for problem in error.value.problems}
    assert found["data.special_tokens"] == "'text'"


def test_resume_lists_free_changes_and_accepts_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(make_config(tmp_path, save_every_n_steps=6), callbacks=[StopAt(6)]).train()
    free = {"log_every_n_steps": 3, "keep_last_n": 7, "micro_batch_size": 3, "early_stopping_patience": 5}
    capsys.readouterr()
    config = make_config(tmp_path, save_every_n_steps=6, **free)
    trainer = make_trainer(
        dataclasses.replace(config, model=dataclasses.replace(config.model, zero_init_residual=True))
    )
    trainer.train()
    said = capsys.readouterr().out
    assert "model.zero_init_residual False -> True" in said
    assert "training.log_every_n_steps 1 -> 3" in said
    assert "training.micro_batch_size None -> 3" in said
    assert "early_stopping starts new" in said
    assert trainer.is_finished
    without = make_trainer(
        make_config(tmp_path, log_every_n_steps=3, resume=str(tmp_path / "checkpoints/step_00000012"))
    )
    without.train()
    assert "early_stopping is in the checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"seed": 1}, {"mixed_precision": "bf16"}])
def test_resume_refuses_other_changes_until_named(tmp_path: Path, change: dict[str, Any]) -> None:
    make_trainer(make_config(tmp_path), callbacks=[StopAt(6)]).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (name,) = change
    reset_accelerate()  # it keeps one precision for a whole process
    with pytest.raises(ConfigError) as error:
        make_trainer(make_config(tmp_path, **change)).train()
    (problem,) = error.value.problems
    assert problem.setting == f"training.{name}"
    assert f"training.resume_changes '[training.{name}]'" in problem.advice
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    trainer = make_trainer(make_config(tmp_path, **change, resume_changes=[f"training.{name}"]))
    trainer.train()
    assert trainer.global_step == trainer.total_steps > 6


def test_resume_with_another_optimizer_starts_it_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(make_config(tmp_path), callbacks=[StopAt(6)]).train()
    allowed = ["training.optimizer"]
    trainer = make_trainer(make_config(tmp_path, optimizer="sgd", resume_changes=allowed))
    trainer.train()
    said = capsys.readouterr().out
    assert "optimizer starts new" in said
    assert "optimizer" not in said.partition(" at step 6: ")[2].partition("\n")[0]


# ---- a new run from the weights of another -----------------------------------------------------------------


def from_text(folder: Path, **data: Any) -> Config:
    (folder / "text.txt").write_text(prose())
    return Config(
        output_dir=str(folder / "old"),
        model=ModelConfig(d_model=16, num_heads=2, num_layers=1),
        data=DataConfig(source=str(folder / "text.txt"), sequence_length=16, **data),
        training=TrainingConfig(max_steps=5, batch_size=8, log_every_n_steps=1),
    )


def with_init_from(old: Config, checkpoint: Path) -> Config:
    model = dataclasses.replace(old.model, init_from=str(checkpoint))
    return dataclasses.replace(old, output_dir=str(Path(old.output_dir).with_name("new")), model=model)


def test_init_from_loads_weights_and_nothing_else(tmp_path: Path) -> None:
    old = from_text(tmp_path)
    trained = make_from_config(old)
    trained.train()
    checkpoint = tmp_path / "old" / "checkpoints" / "step_00000005"
    new = with_init_from(old, checkpoint)
    second = make_from_config(new)
    assert_same_weights(weights(second), weights(trained))
    assert (second.global_step, len(second.optimizer.state)) == (0, 0)
    second.train()
    # A relaunch resumes from the new run's own checkpoint, even if the old one is gone.
    checkpoint.rename(tmp_path / "elsewhere")
    longer = dataclasses.replace(
        new, training=dataclasses.replace(new.training, max_steps=7, resume_changes=["training.max_steps"])
    )
    third = make_from_config(longer)
    third.train()
    assert [line["step"] for line in lines(tmp_path / "new") if "train_loss" in line] == list(range(1, 8))


def test_init_from_refuses_what_does_not_fit(tmp_path: Path) -> None:
    old = from_text(tmp_path)
    make_from_config(old).train()
    checkpoint = tmp_path / "old" / "checkpoints" / "step_00000005"
    new = with_init_from(old, checkpoint)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*tokenizer\.json"):
        make_from_config(dataclasses.replace(new, data=dataclasses.replace(new.data, tokenizer="byte")))
    with pytest.raises(CheckpointError, match="do not fit the model"):
        make_from_config(dataclasses.replace(new, model=dataclasses.replace(new.model, d_ff=8)))
    with_file = dataclasses.replace(new.data, tokenizer=str(checkpoint / "tokenizer.json"))
    assert make_from_config(dataclasses.replace(new, data=with_file)).global_step == 0
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has 0 bytes"):
        make_from_config(new)
    with pytest.raises(CheckpointError, match="no checkpoint directory here"):
        make_from_config(with_init_from(old, tmp_path / "nowhere"))


# ---- batches of several sizes -------------------------------------------------------------------------------


def test_resume_with_fewer_epochs_than_done_is_finished(tmp_path: Path, capsys: Any) -> None:
    part(tmp_path, 8, stop_at=14)  # in the third epoch
    again = part(tmp_path, 3, max_epochs=1, resume_changes=["training.max_epochs", "training.batch_size"])
    assert (again.global_step, again.total_steps) == (14, 14)
    assert "finished, at step 14 of 14" in capsys.readouterr().out


SCHEDULED = {"batch_size_schedule": [[3, 16], [7, 5]], "log_every_n_steps": 1}


def test_batch_size_schedule_keeps_the_order_of_samples(tmp_path: Path, capsys: Any) -> None:
    """44 samples an epoch: 8 + 8 + 8 + 16 + 4 in the first; 16, 16 and then 5 + 5 + 2 in the second."""
    plain = part(tmp_path / "plain", 8, max_epochs=2).train_loader.dataset.asked
    whole = part(tmp_path / "whole", 8, max_epochs=2, **SCHEDULED)
    assert whole.train_loader.dataset.asked == plain
    history = whole.metrics.get_history()
    assert history["samples"] == [8, 16, 24, 40, 44, 60, 76, 81, 86, 88]
    assert whole.global_step == whole.total_steps == 10
    assert history["learning_rate"][-1] == pytest.approx(3e-4 * 0.1)  # the floor, on the very last step
    assert checkpoints.main(["samples", str(tmp_path / "whole"), "--step", "9"], "checkpoints") == 0
    assert ", ".join(map(str, plain[81:86])) in capsys.readouterr().out


def test_trainer_with_a_scheduled_batch_above_the_data_raises() -> None:
    loader = DataLoader(Counting(44), batch_size=8, drop_last=True)
    with pytest.raises(ConfigError) as error:
        Trainer(Bigram(), TrainingConfig(max_steps=3, batch_size_schedule=[[1, 45]]), loader)
    problem = error.value.problems[0]
    assert (problem.setting, problem.value) == ("training.batch_size_schedule", 45)


def test_resume_freezes_and_unfreezes_parameters(tmp_path: Path) -> None:
    """The embeddings are frozen for two steps, trained for two, and frozen again. The rest is trained and averaged."""
    embeddings, frozen = "model.embed_tokens.weight", [{"pattern": "*.embed_tokens.*", "frozen": True}]
    seen: list[dict[str, torch.Tensor]] = []
    for stop_at, groups in ((2, frozen), (4, []), (6, frozen)):
        changes = {"parameter_groups": groups, "resume_changes": ["training.parameter_groups"]}
        config = make_config(tmp_path, optimizer="muon", ema_decay=0.5, **changes)
        trainer = make_trainer(config, callbacks=[StopAt(stop_at)])
        seen = seen or [weights(trainer)]
        trainer.train()
        seen.append(weights(trainer))
        assert trainer.average is not None
        assert (trainer.global_step, embeddings in trainer.average.state_dict()["weights"]) == (stop_at, not groups)
    moved = {
        name: [not torch.equal(one[name], other[name]) for one, other in itertools.pairwise(seen)] for name in seen[0]
    }
    assert moved[embeddings] == [False, True, False]
    assert moved["lm_head.weight"] == [True, True, True]
