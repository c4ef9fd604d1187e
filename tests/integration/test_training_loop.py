"""One config, one run: the loss curve depends on neither micro-batches nor processes."""

import copy
import io
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from fundamentallm import Callback, ConfigError, LoggingCallback, Trainer, TrainingConfig, create_loss
from fundamentallm.training.metrics import MEASURED
from tests.conftest import problem_of
from tests.integration.runs import PartlyIgnored, lines, make_config, make_trainer, on_processes, timeless


class Bigram(nn.Module):
    """Any module that maps ids to logits."""

    def __init__(self, vocabulary: int = 20) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 12)
        self.mix = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.mix(self.embedding(ids)).relu()))


def bigram_trainer(folder: Path, rows: int = 8, shuffle: bool = True, **training: object) -> Trainer:
    torch.manual_seed(0)
    loader = DataLoader(PartlyIgnored(), batch_size=rows, shuffle=shuffle)
    config = TrainingConfig(**{"max_epochs": 2, "learning_rate": 1e-2, "log_every_n_steps": 1, **training})
    validation = DataLoader(PartlyIgnored(30), batch_size=7)
    return Trainer(Bigram(), config, loader, validation, [LoggingCallback(folder / "metrics.jsonl")])


def train_batch_smaller_than_group(processes: int, folder: str, micro_batch_size: int | None) -> None:
    # 44 samples in batches of 6: the last batch has 2, so that the third and the fourth process have none.
    trainer = bigram_trainer(Path(folder), rows=6, micro_batch_size=micro_batch_size)
    assert trainer.accelerator.num_processes == processes
    trainer.train()


def test_the_loss_curve_depends_on_neither_micro_batches_nor_processes(tmp_path: Path) -> None:
    layouts: dict[str, tuple[int, int | None]] = {"1": (1, None), "1 by 3": (1, 3)}
    layouts |= {"3 accumulated": (3, 1), "4": (4, None)}
    curves = {}
    for name, (processes, micro_batch_size) in layouts.items():
        on_processes(processes, train_batch_smaller_than_group, str(tmp_path / name), micro_batch_size)
        curves[name] = lines(tmp_path / name)
    reference = curves.pop("1")
    assert len(reference) >= 14
    for name, curve in curves.items():
        for expected, got in zip(reference, curve, strict=True):
            assert got.keys() == expected.keys()
            for key in expected.keys() - MEASURED:
                assert got[key] == pytest.approx(expected[key], rel=1e-5), (name, key, expected["step"])


def test_recomputing_activations_keeps_fewer_and_changes_no_bit(tmp_path: Path) -> None:
    kept = {}
    for recomputes in (False, True):
        config = make_config(tmp_path / str(recomputes), dropout=0.2, max_steps=4, activation_checkpointing=recomputes)
        trainer, sizes = make_trainer(config), []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trainer.train()
        kept[recomputes] = sum(sizes)
    assert timeless(lines(tmp_path / "True")) == timeless(lines(tmp_path / "False"))
    assert kept[True] < 0.6 * kept[False]


def test_every_line_has_the_promised_keys(tmp_path: Path) -> None:
    make_trainer(make_config(tmp_path, max_steps=3)).train()
    training, validation = lines(tmp_path)[0], lines(tmp_path)[-1]
    promised = ["step", "epoch", "samples", "tokens", "train_loss", "learning_rate", "grad_norm", "bad_steps"]
    assert {*promised, *MEASURED} - {"mfu"} <= training.keys()
    assert {"step", "epoch", "val_loss", "val_perplexity", "val_bits_per_byte", "time"} == validation.keys()


def test_a_step_is_that_of_plain_torch(tmp_path: Path) -> None:
    trainer = bigram_trainer(tmp_path, shuffle=False, max_epochs=1, weight_decay=0.1, gradient_clip_norm=0.5)
    torch.manual_seed(0)
    model, data = Bigram(), PartlyIgnored()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    total, losses, norms = 6, [], []
    for step in range(total):
        ids, targets = torch.utils.data.default_collate([data[i] for i in range(8 * step, min(8 * step + 8, 44))])
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi * step / (total - 1))) / 2)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    history = trainer.train()
    assert history["train_loss"] == pytest.approx(losses, rel=1e-5)
    assert history["grad_norm"] == pytest.approx(norms, rel=1e-4)
    for mine, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_log_lines_mean_over_all_steps_since_the_last(tmp_path: Path) -> None:
    bigram_trainer(tmp_path / "each", max_epochs=1).train()
    bigram_trainer(tmp_path / "third", max_epochs=1, log_every_n_steps=3).train()
    each, third = ([line for line in lines(tmp_path / name) if "train_loss" in line] for name in ("each", "third"))
    assert [line["step"] for line in third] == [3, 6]
    tokens = [line["tokens"] - before["tokens"] for before, line in zip([{"tokens": 0}, *each], each, strict=False)]
    for line, steps in zip(third, (slice(0, 3), slice(3, 6)), strict=True):
        weighted = sum(x["train_loss"] * n for x, n in zip(each[steps], tokens[steps], strict=True))
        assert line["train_loss"] == pytest.approx(weighted / sum(tokens[steps]), rel=1e-6)
        assert line["tokens"] == each[steps][-1]["tokens"]


@pytest.mark.parametrize(("batch_size", "micro_batch_size"), [(30, None), (7, None), (4, 3)])
def test_validation_is_the_mean_over_tokens_in_any_batches(batch_size: int, micro_batch_size: int | None) -> None:
    torch.manual_seed(0)
    model, data = Bigram(), PartlyIgnored(30)
    targets = torch.stack([data[i][1] for i in range(30)])
    expected = nn.functional.cross_entropy(model(data.tokens[:, :-1]).flatten(0, 1), targets.flatten()).item()
    loader = DataLoader(data, batch_size=batch_size)
    result = Trainer(model, TrainingConfig(micro_batch_size=micro_batch_size), loader, loader, []).validate()
    assert result == pytest.approx({"val_loss": expected, "val_perplexity": math.exp(expected)}, rel=1e-6)


def test_validation_is_plain_cross_entropy_whatever_is_trained(tmp_path: Path) -> None:
    plain, *others = (
        bigram_trainer(tmp_path / loss, max_epochs=1, loss=loss)
        for loss in ("cross_entropy", "label_smoothing", "focal")
    )
    assert [other.validate() for other in others] == [plain.validate()] * 2
    first = plain.train()["train_loss"][0]
    assert all(other.train()["train_loss"][0] != pytest.approx(first, rel=1e-3) for other in others)


def test_a_users_optimizer_schedule_and_loss_are_used() -> None:
    model = Bigram()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    twice = lambda logits, targets: 2 * create_loss()(logits, targets)  # noqa: E731
    given: dict[str, Any] = {"optimizer": optimizer, "scheduler": scheduler, "loss_fn": twice}
    loader = DataLoader(PartlyIgnored(), batch_size=11)
    trainer = Trainer(model, TrainingConfig(log_every_n_steps=1), loader, callbacks=[], **given)
    history = trainer.train()
    assert history["learning_rate"] == [0.5, 0.25, 0.125, 0.0625]
    assert history["train_loss"][0] > 1.8 * math.log(20)
    assert trainer.optimizer is optimizer


def test_mixed_precision_computes_in_bf16_with_float32_weights(tmp_path: Path) -> None:
    dtypes = set()
    trainer = make_trainer(make_config(tmp_path, mixed_precision="bf16", max_steps=2))
    down = trainer.model.model["layers"][0].mlp.down_proj
    down.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    trainer.train()
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


class Reused(Bigram):
    """Has a 16-bit buffer, and a parameter that does not need a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(12))
        self.embedding.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(self.embedding(ids)).relu() * self.scale))


def test_a_model_in_16_bits_is_trained_in_float32(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    loader, config, runs = DataLoader(PartlyIgnored(), 8), TrainingConfig(max_steps=3, log_every_n_steps=1), []
    narrow = Reused().bfloat16()
    narrow.head.float()
    wide = copy.deepcopy(narrow).float()
    for model in (narrow, wide):
        given = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        runs.append(Trainer(model, config, loader, callbacks=[], optimizer=given).train()["train_loss"])
    assert runs[0] == runs[1]
    assert {tensor.dtype for tensor in narrow.state_dict().values()} == {torch.float32}
    assert capsys.readouterr().out.count("bfloat16") == 1


def test_a_frozen_model_in_16_bits_stays_if_autocast_computes_in_them() -> None:
    model = Reused()
    model.embedding.bfloat16()
    config = TrainingConfig(max_steps=1, mixed_precision="bf16")
    Trainer(model, config, DataLoader(PartlyIgnored(), 8), callbacks=[]).train()
    assert model.embedding.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


class Normalised(Bigram):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(self.embedding(ids)).relu().mT).mT)


@pytest.mark.parametrize(
    ("norm", "micro_batch_size", "is_named"),
    [
        (nn.BatchNorm1d(12, track_running_stats=False), 4, True),
        (nn.InstanceNorm1d(12, track_running_stats=True), 4, True),
        (nn.BatchNorm1d(12), None, False),
        (nn.GroupNorm(3, 12), 4, False),
    ],
)
def test_layers_with_batch_statistics_are_named(
    norm: nn.Module, micro_batch_size: int | None, is_named: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrainingConfig(max_steps=2, micro_batch_size=micro_batch_size)
    Trainer(Normalised(norm), config, DataLoader(PartlyIgnored(), 8), callbacks=[]).train()
    named = [record for record in caplog.records if f"norm ({type(norm).__name__})" in record.getMessage()]
    assert len(named) == is_named


@pytest.mark.parametrize(
    ("training", "setting"),
    [
        ({"batch_size": 4}, "training.batch_size"),
        ({"max_epochs": 1, "warmup_steps": 6}, "warmup_steps"),
        ({"mixed_precision": "fp16"}, "training.mixed_precision"),
        ({"early_stopping_patience": 2}, "training.early_stopping_patience"),
        ({"early_stopping_metric": "val_bits_per_byte"}, "early_stopping_metric"),
        ({"parameter_groups": [{"pattern": "*", "frozen": True}]}, "training.parameter_groups"),
        ({}, "scheduler"),
        (None, "config"),
    ],
)
def test_trainer_with_contradicting_arguments_raises(training: dict[str, Any] | None, setting: str) -> None:
    model, loader = Bigram(), DataLoader(PartlyIgnored(), batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given: dict[str, Any] = {"optimizer": optimizer} if setting in ("scheduler", "training.parameter_groups") else {}
    if setting == "scheduler":  # which follows the validation
        given["scheduler"] = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    if setting == "early_stopping_metric":  # of what is no text
        given["val_loader"] = loader
    config: Any = {"max_steps": 3} if training is None else TrainingConfig(**training)
    assert problem_of(Trainer, model, config, loader, callbacks=[], **given).setting == setting


def test_train_of_a_finished_run_in_memory_trains_longer(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = bigram_trainer_in_memory()
    trainer.train()
    assert trainer.train()["step"] == [1, 2, 3]
    assert "output_dir" not in capsys.readouterr().out
    assert trainer.train(max_steps=5)["step"] == [1, 2, 3, 4, 5]
    assert trainer.config.training.max_steps == 5
    whole = bigram_trainer_in_memory(max_steps=5)
    whole.train()
    assert trainer.history["learning_rate"][-1] == whole.history["learning_rate"][-1]
    assert problem_of(trainer.train, max_steps=4).setting == "max_steps"


def bigram_trainer_in_memory(**training: Any) -> Trainer:
    torch.manual_seed(0)
    config = TrainingConfig(**{"max_steps": 3, "log_every_n_steps": 1, **training})
    return Trainer(Bigram(), config, DataLoader(PartlyIgnored(), batch_size=8), callbacks=[])


def test_a_whole_config_without_a_batch_size_has_the_loaders(tmp_path: Path) -> None:
    trainer = Trainer(Bigram(), make_config(tmp_path, batch_size=None), DataLoader(PartlyIgnored(), batch_size=7))
    assert (trainer.batch_size, trainer.config.training.batch_size) == (7, 7)


def test_a_batch_sampler_decides_about_the_batch_size(tmp_path: Path) -> None:
    loader = DataLoader(PartlyIgnored(), batch_sampler=[[0, 1, 2], [3, 4]])
    trainer = Trainer(Bigram(), make_config(tmp_path, batch_size=None), loader)
    assert trainer.config.training.batch_size is None
    with pytest.raises(ConfigError) as error:
        Trainer(Bigram(), TrainingConfig(batch_size=4), loader)
    assert [problem.setting for problem in error.value.problems] == ["training.batch_size"]


# ---- the host does not wait ----------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """At which steps somebody asks for a tensor's value, which on a GPU would wait for it."""

    ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.trainer: Trainer | None = None
        self.steps: list[int] = []

    def note(self) -> None:
        if self.trainer is not None:
            self.steps.append(self.trainer.global_step)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(function) for name in self.ASKS):
            self.note()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{"skip_spikes_above": 6.0, "micro_batch_size": 3}, {"optimizer": "muon"}])
def test_the_host_asks_for_no_value_between_log_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    waits, tolist = Waits(), Tensor.tolist

    def asking(tensor: Tensor) -> Any:  # which reads memory, and passes no dispatcher
        waits.note()
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", asking)
    config = make_config(tmp_path, max_steps=12, log_every_n_steps=5, eval_every_n_epochs=None, **settings)
    trainer = make_trainer(config)
    trainer.val_loader = None
    waits.trainer = trainer
    with waits:
        trainer.train()
    # What is asked for at the beginning, in the log lines of steps 5 and 10, and at the end; none within a step, which
    # counts as the one before.
    assert sorted(set(waits.steps)) == [0, 5, 10, 12]
    log_lines = [waits.steps.count(step) for step in (5, 10)]
    assert log_lines[0] == log_lines[1] <= 6


def test_epoch_whose_end_is_left_out_still_ends(tmp_path: Path) -> None:
    for name, pair in (("across", [5, 7]), ("behind", [7, 8])):  # of 6 steps an epoch
        config = make_config(tmp_path / name, max_steps=10, eval_every_n_epochs=1)
        config = replace(config, data=replace(config.data, skip=[pair]))
        loader = DataLoader(PartlyIgnored(), 8)
        trainer = Trainer(Bigram(), config, loader, loader, [LoggingCallback(tmp_path / name / "metrics.jsonl")])
        trainer.train()
        assert next(line["step"] for line in lines(tmp_path / name) if "val_loss" in line) == pair[0] - 1


def test_trainer_with_a_home_folder_writes_everything_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = make_config("~/run", max_steps=1)
    assert make_trainer(config).output_dir == tmp_path / "run"


def test_step_clears_gradients_of_parameters_outside_the_optimizer(tmp_path: Path) -> None:
    model = Bigram()
    first, *_ = model.parameters()
    optimizer = torch.optim.SGD([first], lr=0.1)
    config = TrainingConfig(max_steps=2)
    Trainer(model, config, DataLoader(PartlyIgnored(), 8), callbacks=[], optimizer=optimizer).train()
    assert [parameter.grad for parameter in model.parameters() if parameter.grad is not None] == []


def test_final_save_holds_the_last_validation_after_a_save_on_log(tmp_path: Path) -> None:
    class SaveOnLog(Callback):
        def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            trainer.save_checkpoint()

    trainer = make_trainer(make_config(tmp_path, max_steps=4, eval_every_n_steps=2))
    trainer.callbacks.add(SaveOnLog())
    trainer.train()
    assert trainer.checkpoint_manager is not None
    newest = trainer.checkpoint_manager.get_latest()
    assert newest is not None
    assert trainer.checkpoint_manager.load(newest)["metrics_state_dict"]["latest"]["val_step"] == 4


@pytest.mark.parametrize("output", ["closed", "full", "latin-1"])
def test_trainer_goes_on_if_its_output_cannot_be_written(monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    files = {"full": open("/dev/full", "wb", buffering=0), "latin-1": io.BytesIO()}  # noqa: SIM115
    stream = None if output == "closed" else io.TextIOWrapper(files[output], "latin-1", write_through=True)
    trainer = make_trainer(make_config("unused", max_steps=1), callbacks=[])
    monkeypatch.setattr(sys, "stdout", stream)
    trainer.say("漢字 und Wörter")
    if output == "latin-1":
        assert files[output].getvalue() == b"\\u6f22\\u5b57 und W\xf6rter\n"
