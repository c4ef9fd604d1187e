"""FSDP2 and HSDP, by accelerate's own path on gloo: what is sharded, how it starts, is saved, fails and goes on."""

import functools
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.multiprocessing import ProcessExitedException
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import fundamentallm.checkpoint.manager as checkpoint_module
import fundamentallm.checkpoint.reading as stored
import fundamentallm.distributed.accelerator as accelerators
from fundamentallm import (
    Callback,
    Config,
    LoggingCallback,
    ModelConfig,
    SaveBestCallback,
    Trainer,
    TrainingConfig,
    Transformer,
    train,
)
from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.checkpoint.manifest import read_manifest
from fundamentallm.checkpoint.reading import load_checkpoint
from fundamentallm.checkpoint.snapshot import MODEL_KEY, OPTIMIZER_KEY
from fundamentallm.commands import checkpoints, generate
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.distributed.prepare import place_model, prepare_model
from fundamentallm.errors import CheckpointError, ConfigError, FundamentaLLMError
from fundamentallm.models.with_loss import ModelWithLoss
from fundamentallm.run.folder import LOCK
from fundamentallm.training.callbacks.observing import continuation
from fundamentallm.training.optimizers import create_optimizer
from tests.integration.runs import (
    PartlyIgnored,
    StopAt,
    assert_same_weights,
    lines,
    make_config,
    make_trainer,
    on_processes,
    prose,
    sharded_accelerator,
    timeless,
)
from tests.unit.checkpoint_files import flip_middle_bit

RUN: dict[str, Any] = {"max_steps": 8, "save_every_n_steps": 3, "save_every_n_epochs": None, "keep_last_n": 9}


def sharded(config: Config, replicate: int = 1, precision: str = "no", **arguments: Any) -> Trainer:
    return make_trainer(config, accelerator=sharded_accelerator(replicate, precision), **arguments)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: whole(tensor).clone() for name, tensor in trainer.model.state_dict().items()}


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("step_*"))[-1]


def fit(processes: int, folder: str, settings: dict[str, Any], is_sharded: bool = True, replicate: int = 1) -> None:
    """A run."""
    config = make_config(folder, **{**RUN, **settings})
    trainer = sharded(config, replicate) if is_sharded else make_trainer(config)
    assert trainer.accelerator.num_processes == processes
    assert trainer.is_sharded is is_sharded
    trainer.train()
    trainer.leave_group()


# ---- what is sharded -----------------------------------------------------------------------------------------------


def look_inside(processes: int, folder: str) -> None:
    trainer = sharded(make_config(folder, max_steps=2, optimizer="muon"), precision="bf16")
    assert trainer.accelerator.num_processes == processes
    blocks = [module for module in trainer.model.modules() if type(module).__name__.endswith("Block")]
    assert len(blocks) == 2
    policies = [block._get_fsdp_state()._mp_policy for block in blocks if isinstance(block, FSDPModule)]
    assert [(policy.param_dtype, policy.reduce_dtype) for policy in policies] == [(torch.bfloat16, torch.float32)] * 2
    trainer.train()
    moments = [v for state in trainer.optimizer.state.values() for v in state.values() if v.ndim]
    for tensor in (*trainer.model.parameters(), *moments):
        assert isinstance(tensor, DTensor)
        assert tensor.dtype == torch.float32
        assert tensor.to_local().numel() <= -(-tensor.shape[0] // processes) * tensor[:1].numel()


def test_every_weight_and_moment_is_a_slice_and_every_block_a_unit(tmp_path: Path) -> None:
    on_processes(2, look_inside, str(tmp_path))


# ---- how it starts -------------------------------------------------------------------------------------------------


def begin_on_meta(processes: int, folder: str) -> None:
    config = make_config(folder)
    shape = replace(config.model, vocab_size=50, tie_embeddings=True)
    torch.manual_seed(3)
    expected = Transformer(shape).state_dict()
    accelerator = sharded_accelerator()
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = True
    assert accelerator.num_processes == processes
    with torch.device("meta"):
        model = Transformer(shape)
    place_model(accelerator, model, seed=3)
    prepare_model(accelerator, ModelWithLoss(model, nn.Identity()), create_optimizer(model, "adamw", 0.1))
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert_same_weights({name: whole(tensor) for name, tensor in model.state_dict().items()}, expected)


def test_prepare_model_from_meta_starts_with_single_process_weights(tmp_path: Path) -> None:
    on_processes(2, begin_on_meta, str(tmp_path))


def refused(_: int) -> None:
    accelerator = sharded_accelerator()
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"Linear.* meta device"):
        place_model(accelerator, model, 0)
    with torch.device("meta"):
        with_buffer = Transformer(ModelConfig(20, d_model=8, num_heads=2, num_layers=1))
        with_buffer.register_buffer("mask", torch.ones(3))
    with pytest.raises(ConfigError, match="without buffers"):
        place_model(accelerator, with_buffer, 0)
    with pytest.raises(ConfigError, match="gradient_checkpointing_enable"):
        place_model(accelerator, nn.Linear(2, 2), 0, activation_checkpointing=True)
    accelerator.state.fsdp_plugin.activation_checkpointing = True
    place_model(accelerator, nn.Linear(2, 2), 0, activation_checkpointing=False)  # the run's config decides


def test_what_cannot_be_sharded_is_refused() -> None:
    on_processes(2, refused)


def begin_with_other_draws(processes: int, folder: str) -> None:
    accelerator = sharded_accelerator(replicate=2)
    assert accelerator.num_processes == processes
    shape = replace(make_config(folder).model, vocab_size=50)
    models = []
    for seed in (0, accelerator.process_index):  # the first process's, and this one's
        torch.manual_seed(seed)
        models.append(Transformer(shape))
        models[-1].register_buffer("drawn", torch.rand(3))
    prepare_model(accelerator, ModelWithLoss(models[1], nn.Identity()), create_optimizer(models[1], "adamw", 0.1))
    assert_same_weights({name: whole(t) for name, t in models[1].state_dict().items()}, models[0].state_dict())


def test_all_processes_start_with_the_weights_of_the_first(tmp_path: Path) -> None:
    on_processes(4, begin_with_other_draws, str(tmp_path))


def with_own_parts(processes: int, folder: str) -> None:
    """An optimizer and a schedule made before the model is sharded."""
    config = make_config(folder, max_steps=6)
    trainers = []
    for is_sharded in (False, True):
        text_trainer = make_trainer(config)  # for its loader
        torch.manual_seed(0)
        model = Transformer(replace(config.model, vocab_size=text_trainer.model.config.vocab_size))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        trainer = Trainer(
            model,
            TrainingConfig(max_steps=6, log_every_n_steps=1),
            text_trainer.train_loader,
            callbacks=[],
            optimizer=optimizer,
            scheduler=scheduler,
            accelerator=sharded_accelerator() if is_sharded else text_trainer.accelerator,
        )
        assert trainer.is_sharded is is_sharded
        trainers.append(trainer)
        trainer.train()
    assert trainers[0].accelerator.num_processes == processes
    losses = [trainer.get_history()["train_loss"] for trainer in (trainers[0].metrics, trainers[1].metrics)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    parts = TrainingConfig(max_steps=3), trainers[0].train_loader
    model, accelerator = Transformer(trainers[0].model.config), trainers[1].accelerator
    for optimizer in (
        torch.optim.Adagrad(model.parameters()),  # makes its state at once
        create_optimizer(nn.Linear(2, 2), "sgd", 0.1),  # trains another model
    ):
        with pytest.raises(ConfigError, match=type(optimizer).__name__):
            Trainer(model, *parts, callbacks=[], optimizer=optimizer, accelerator=accelerator)


def test_an_optimizer_made_before_follows_the_sharded_weights(tmp_path: Path) -> None:
    on_processes(2, with_own_parts, str(tmp_path))


# ---- a step that must not be taken ---------------------------------------------------------------------------------


class PoisonOneGradient(Callback):
    """Makes a gradient NaN on one process, before it is exchanged, at one step."""

    def __init__(self, mine: bool) -> None:
        self.mine = mine

    def on_train_begin(self, trainer: Trainer) -> None:
        parameter = trainer.model.model["layers"][0].mlp.up_proj.weight

        # Before the step begins: the forward pass of process 1 alone gives NaN.
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output * float("nan") if self.mine and trainer.global_step == 2 and module.training else output

        assert isinstance(parameter, DTensor)
        trainer.model.model["layers"][0].mlp.register_forward_hook(hook)


class Remember(Callback):
    """All weights and moments after each step."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        moments = [v for state in trainer.optimizer.state.values() for v in state.values()]
        self.seen.append([whole(tensor).clone() for tensor in (*trainer.model.state_dict().values(), *moments)])


def poisoned(_: int, folder: str) -> None:
    accelerator = sharded_accelerator()
    remember = Remember()
    callbacks = [PoisonOneGradient(mine=accelerator.process_index == 1), remember]
    config = make_config(folder, optimizer="muon", max_steps=4)
    trainer = make_trainer(config, accelerator=accelerator, callbacks=callbacks)
    trainer.train()
    assert trainer.metrics.get_history()["bad_steps"] == [0, 0, 1, 1]
    before, after, later = remember.seen[1:4]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(after, later, strict=True))
    assert all(tensor.isfinite().all() for tensor in later)


def test_a_nan_of_one_process_changes_no_slice_of_any(tmp_path: Path) -> None:
    on_processes(2, poisoned, str(tmp_path))


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that share the weights."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    on_processes(2, fit, str(folder), {})
    return folder


def test_each_process_writes_what_it_holds_and_the_commands_read_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = newest(run)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    assert files == [f"{kind}-0000{n}-of-00002.safetensors" for kind in ("model", "training") for n in (1, 2)]
    sizes = [(path / file).stat().st_size for file in files]
    assert sizes[1] < 1.2 * sizes[0]  # nobody writes the other's part
    assert sizes[0] < 1.2 * sizes[1]
    assert checkpoints.main(["verify", str(run)], "checkpoints") == 0
    assert checkpoints.main(["show", str(run)], "checkpoints") == 0
    assert "model-00002-of-00002.safetensors" in capsys.readouterr().out
    assert checkpoints.main(["list", str(run)], "checkpoints") == 0
    assert checkpoints.main(["samples", str(run), "--step", "2", "--indices_only"], "checkpoints") == 0
    said = capsys.readouterr().out
    assert "step_00000008" in said
    assert "8 samples, by their index in the dataset:" in said
    assert generate.main(["--checkpoint", str(run), "--max_new_tokens", "3"], "generate") == 0

    assert checkpoints.main(["consolidate", str(run), str(tmp_path / "out")], "checkpoints") == 0
    weights = load_checkpoint(path)[MODEL_KEY]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights({name: theirs.state_dict()[name] for name in weights}, weights)
    with pytest.raises(ConfigError, match="exists already"):
        checkpoints.main(["consolidate", str(run), str(tmp_path / "out")], "checkpoints")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_one_process_saved_is_consolidated_or_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path / "run", max_steps=1)
    trainer = make_trainer(replace(config, model=replace(config.model, tie_embeddings=True)))
    trainer.train()
    consolidate = functools.partial(checkpoints.main, program="checkpoints")
    assert consolidate(["consolidate", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    theirs, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.arange(16)[None]
    torch.testing.assert_close(theirs(ids).logits, trainer.model.eval()(ids), rtol=1e-5, atol=1e-5)

    def full_disk(*_: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(stored, "write_tensors", full_disk)
    with pytest.raises(CheckpointError, match=r"other cannot be written: .*No space"):
        consolidate(["consolidate", str(tmp_path / "run"), str(tmp_path / "other")])
    monkeypatch.undo()
    (newest(tmp_path / "run") / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has 0 bytes"):
        consolidate(["consolidate", str(tmp_path / "run"), str(tmp_path / "other")])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "run"]


def alone(processes: int, folder: str) -> None:
    """In a group of one, as launchers make for a single GPU."""
    assert torch.distributed.get_world_size() == processes
    in_two_parts(processes, folder, "adamw")


def test_a_group_of_one_saves_whole_tensors_and_goes_on(tmp_path: Path) -> None:
    debug_launcher(alone, (1, str(tmp_path)), num_processes=1)
    assert {file.name for file in newest(tmp_path).glob("*.safetensors")} == {
        "model.safetensors", "training.safetensors"
    }  # fmt: skip


def save_with_a_host_group(processes: int, folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    mesh, mine = torch.distributed.init_device_mesh("cpu", (processes,)), accelerator.process_index
    manager = CheckpointManager(folder, group=HostGroup())

    def state(here: Tensor, placement: Any) -> dict[str, Any]:
        return {MODEL_KEY: {"w": DTensor.from_local(here, mesh, [placement])}}

    # Besides the weights there are no tensors, and those of the second process are not finite.
    path = manager.save(state(torch.full((2, 3), 1.0 if mine == 0 else torch.nan), Shard(0)))
    assert load_checkpoint(path)[MODEL_KEY]["w"].isfinite().sum() == 6
    assert not read_manifest(path)["is_finite"]
    with pytest.raises(CheckpointError, match="Partial"):
        manager.save(state(torch.ones(2, 3), Partial()))


def test_what_processes_save_together_is_theirs_together(tmp_path: Path) -> None:
    on_processes(2, save_with_a_host_group, str(tmp_path))


def in_two_parts(processes: int, folder: str, optimizer: str) -> None:
    config = make_config(folder, dropout=0.2, optimizer=optimizer, **RUN)
    trainer = sharded(config)
    trainer.callbacks.add(StopAt(5))
    trainer.train()
    assert (trainer.accelerator.num_processes, trainer.global_step) == (processes, 5)
    again = make_trainer(config, accelerator=trainer.accelerator)
    again.train()
    assert again.global_step == 8


def test_a_sharded_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    on_processes(2, fit, str(tmp_path / "whole"), {"optimizer": "muon", "dropout": 0.2})
    on_processes(2, in_two_parts, str(tmp_path / "parts"), "muon")
    one, other = (load_checkpoint(newest(tmp_path / name)) for name in ("whole", "parts"))
    assert_same_weights(one[MODEL_KEY], other[MODEL_KEY])
    for name, moments in one[OPTIMIZER_KEY]["state"].items():
        assert_same_weights(moments, other[OPTIMIZER_KEY]["state"][name])
    assert timeless(lines(tmp_path / "parts")) == timeless(lines(tmp_path / "whole"))


def column_major(processes: int, folder: str, is_sharded: bool) -> None:
    """A run with matrices in another memory layout, in two parts."""
    config, loader = make_config(folder, optimizer="muon", max_steps=4), DataLoader(PartlyIgnored(), batch_size=8)
    accelerator = sharded_accelerator() if is_sharded else None
    for stop_at in (2, 4):
        torch.manual_seed(0)
        model = Transformer(replace(config.model, vocab_size=20))
        for parameter in model.parameters():
            parameter.data = parameter.data.t().contiguous().t() if parameter.ndim == 2 else parameter.data
        log = LoggingCallback(Path(folder) / "metrics.jsonl")
        trainer = Trainer(model, config, loader, None, [log, StopAt(stop_at)], accelerator=accelerator)
        trainer.train()
        assert (trainer.accelerator.num_processes, trainer.global_step) == (processes, stop_at)


def test_sharded_run_of_any_memory_layout_has_the_same_losses(tmp_path: Path) -> None:
    for processes, is_sharded in ((1, False), (2, True)):
        on_processes(processes, column_major, str(tmp_path / str(processes)), is_sharded)
    one, two = ([line["train_loss"] for line in lines(tmp_path / name)] for name in ("1", "2"))
    assert two == pytest.approx(one, rel=1e-5)


def begin_from(processes: int, folder: str, checkpoint: str) -> None:
    """fundamentallm.train's own way, with the weights of another run."""
    config = make_config(folder, **RUN, max_minutes=60)
    model = replace(config.model, init_from=checkpoint)
    text = Path(folder).with_suffix(".txt")
    data = replace(config.data, source=str(text), cache_dir=f"{folder}-cache")
    accelerators.create_accelerator = lambda *_: sharded_accelerator()
    trainer = train.make_trainer(replace(config, model=model, data=data, sample_tokens=5))
    assert (trainer.accelerator.num_processes, trainer.is_sharded) == (processes, True)
    assert_same_weights(whole_weights(trainer), load_checkpoint(Path(checkpoint))[MODEL_KEY])
    assert continuation(trainer, None, 5)  # all processes write it together
    trainer.leave_group()


def test_a_new_run_begins_with_the_weights_of_a_sharded_one(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text(prose())
    on_processes(2, begin_from, str(tmp_path / "new"), str(newest(run)))


def until_patience_runs_out(processes: int, folder: str) -> None:
    config = make_config(
        folder, max_steps=40, eval_every_n_steps=2, save_every_n_steps=5, keep_last_n=2,
        early_stopping_patience=2, early_stopping_mode="max",  # the first validation is the best
    )  # fmt: skip
    callbacks = [LoggingCallback(Path(folder) / "metrics.jsonl"), SaveBestCallback(mode="max")]
    trainer = sharded(config, callbacks=callbacks) if processes > 1 else make_trainer(config, callbacks=callbacks)
    assert (trainer.accelerator.num_processes, trainer.is_sharded) == (processes, processes > 1)
    before = trainer.validate()["val_loss"]  # which leaves weights gathered, that all must let go of together
    trainer.train()
    ended = {"at": trainer.global_step, "before": before, "after": trainer.validate()["val_loss"]}
    (Path(folder) / f"ended_{trainer.accelerator.process_index}.json").write_text(json.dumps(ended))


def test_validations_decide_as_on_one_process(tmp_path: Path) -> None:
    for processes in (1, 2):
        on_processes(processes, until_patience_runs_out, str(tmp_path / str(processes)))
    one, *others = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/ended_*.json")))
    assert one["at"] == 6
    for other in others:
        assert other["at"] == one["at"]
        assert [other["before"], other["after"]] == pytest.approx([one["before"], one["after"]], rel=1e-5)
    assert others[0] == others[1]
    managers = [CheckpointManager(tmp_path / str(processes) / "checkpoints") for processes in (1, 2)]
    best, best_of_two = (manager.get_best() for manager in managers)
    assert best is not None
    assert best_of_two is not None
    assert best_of_two.name == best.name != newest(tmp_path / "1").name


class KeepsMeans(Transformer):
    """Its first block is frozen, and a buffer follows what it is given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.model["layers"][0].requires_grad_(False)

    def forward(self, input_ids: Tensor) -> Tensor:
        self.passes += self.training
        return super().forward(input_ids)


def partly_frozen(processes: int, folder: str, replicate: int, steps: int) -> None:
    """Matrices have as few as two rows, and vectors as two elements."""
    settings = {**RUN, "max_steps": steps, "lr_scheduler": "constant", "optimizer": "muon"}
    config = make_config(folder, **settings, resume_changes=["training.max_steps"])
    accelerator = sharded_accelerator(replicate) if replicate else None
    text_trainer = make_trainer(config, accelerator=accelerator)
    torch.manual_seed(0)
    shape = replace(text_trainer.model.config, d_model=4, d_ff=6)
    trainer = Trainer(
        KeepsMeans(shape),
        config,
        text_trainer.train_loader,
        callbacks=[LoggingCallback(Path(folder) / "metrics.jsonl")],
        accelerator=text_trainer.accelerator,
    )
    assert (trainer.accelerator.num_processes, trainer.is_sharded) == (processes, replicate > 0)
    trainer.train()
    assert trainer.model.passes == steps
    trainer.leave_group()


def test_more_processes_than_rows_and_frozen_blocks(tmp_path: Path) -> None:
    on_processes(1, partly_frozen, str(tmp_path / "one"), 0, 6)
    on_processes(4, partly_frozen, str(tmp_path / "four"), 2, 2)
    on_processes(4, partly_frozen, str(tmp_path / "four"), 1, 4)
    manager = CheckpointManager(tmp_path / "four" / "checkpoints")
    assert manager.newest_intact() == (newest(tmp_path / "four"), [])
    on_processes(1, partly_frozen, str(tmp_path / "four"), 0, 6)
    losses = [
        [line["train_loss"] for line in lines(tmp_path / name) if "train_loss" in line] for name in ("one", "four")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, other = (load_checkpoint(newest(tmp_path / name)) for name in ("one", "four"))
    assert {name.rpartition("layers.")[2][:2] for name in one[OPTIMIZER_KEY]["state"] if "layers." in name} == {"1."}
    for name, moments in one[OPTIMIZER_KEY]["state"].items():
        for key, moment in moments.items():
            torch.testing.assert_close(other[OPTIMIZER_KEY]["state"][name][key], moment, rtol=1e-3, atol=1e-6)


# ---- faults --------------------------------------------------------------------------------------------------------


def resume_and_say(processes: int, folder: str) -> None:
    trainer = sharded(make_config(folder, **{**RUN, "max_steps": 9}, resume_changes=["training.max_steps"]))
    assert trainer.accelerator.num_processes == processes
    said: list[str] = []
    trainer.say = said.append  # type: ignore[method-assign]
    trainer.train()
    (Path(folder) / f"said_{trainer.accelerator.process_index}.json").write_text(json.dumps(said))


def test_a_damaged_part_is_found_by_all_processes(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    damaged = newest(copy)
    flip_middle_bit(damaged / "model-00002-of-00002.safetensors")
    on_processes(2, resume_and_say, str(copy))
    first, second = ("\n".join(json.loads((copy / f"said_{index}.json").read_text())) for index in (0, 1))
    assert f"skipping checkpoint {damaged}: model-00002-of-00002.safetensors " in first
    assert "at step 6:" in first
    assert "at step 6:" in second


def full_disk(processes: int, folder: str) -> None:
    trainer = sharded(make_config(folder, **{**RUN, "save_every_n_steps": None}))
    mine = trainer.accelerator.process_index
    assert trainer.accelerator.num_processes == processes
    trainer.save_checkpoint("good")
    real = checkpoint_module.write_tensors
    if mine == 1:

        def fails(*_: Any) -> None:
            raise SafetensorError("No space left on device")

        checkpoint_module.write_tensors = fails
    told_by = "" if mine == 1 else "process 1 of 2 failed: "
    with pytest.raises(CheckpointError, match=rf"cannot write checkpoint .*: {told_by}.*No space left"):
        trainer.train()
    checkpoint_module.write_tensors = real
    trainer.accelerator.wait_for_everyone()
    names = sorted(
        path.name for path in (Path(folder) / "checkpoints").iterdir() if path.name[0] != "." or path.is_dir()
    )
    assert names == ["good"]
    assert CheckpointManager(Path(folder) / "checkpoints").newest_intact()[0] == Path(folder) / "checkpoints" / "good"


def test_where_one_process_cannot_write_none_has_a_checkpoint(tmp_path: Path) -> None:
    on_processes(2, full_disk, str(tmp_path))


def other_folders(_: int, folder: str) -> None:
    """Of the same name on each process, as on machines that share nothing."""
    accelerator = sharded_accelerator()
    own = Path(folder) / str(accelerator.process_index)
    own.mkdir()
    os.chdir(own)
    with pytest.raises(CheckpointError, match="on several machines, a folder that they share"):
        make_trainer(make_config("run", **RUN), accelerator=accelerator).save_checkpoint()


def test_folders_of_their_own_are_told(tmp_path: Path) -> None:
    on_processes(2, other_folders, str(tmp_path))


# ---- a kill while it is saved ---------------------------------------------------------------------------------------


def killed_at(processes: int, folder: str, rank: int, function: str) -> None:
    """A run in which a process is killed as it enters a function of the second save, or as that returns."""
    accelerator = sharded_accelerator()
    assert accelerator.num_processes == processes
    if accelerator.process_index == rank:
        real, calls = getattr(CheckpointManager, function), []

        def kill(self: CheckpointManager, *arguments: Any) -> Any:
            calls.append(function)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, *arguments)

        setattr(CheckpointManager, function, kill)
    try:
        make_trainer(make_config(folder, **RUN), accelerator=accelerator).train()
    except FundamentaLLMError as error:
        Path(f"{folder}.survivor").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize(("rank", "function"), [(1, "_write"), (0, "_publish")])
def test_a_kill_while_slices_are_saved_loses_nothing(run: Path, tmp_path: Path, rank: int, function: str) -> None:
    copy = tmp_path / "run"
    with pytest.raises(ProcessExitedException):
        on_processes(2, killed_at, str(copy), rank, function)
    survivor = (tmp_path / "run.survivor").read_text()
    assert survivor.startswith("ProcessLostError: ")
    assert f"process {rank} of 2" in survivor
    saved = sorted(path.name for path in (copy / "checkpoints").glob("step_*"))
    assert saved == ["step_00000003"]
    on_processes(2, fit, str(copy), {})
    assert_same_weights(load_checkpoint(newest(copy))[MODEL_KEY], load_checkpoint(newest(run))[MODEL_KEY])
    assert timeless(lines(copy)) == timeless(lines(run))
    assert sorted(path.name for path in (copy / "checkpoints").iterdir() if path.name != LOCK) == [
        "step_00000003", "step_00000006", "step_00000008"
    ]  # fmt: skip
