"""Adapters of peft: they train and resume as any model, and their checkpoints are what peft opens."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from fundamentallm import Config, DataConfig, ModelConfig, Trainer, TrainingConfig, create_tokenizer, load_model
from fundamentallm.checkpoint.manifest import verify
from fundamentallm.checkpoint.reading import load_checkpoint
from fundamentallm.checkpoint.snapshot import ADAPTER_KEY, AVERAGE_KEY, MODEL_KEY
from fundamentallm.commands.checkpoints import main as checkpoints
from fundamentallm.commands.evaluate import main as evaluate
from fundamentallm.commands.generate import main as generate
from fundamentallm.data.corpus import opened_note
from fundamentallm.errors import CheckpointError, ConfigError, FundamentaLLMError
from fundamentallm.train import make_trainer, run
from tests.conftest import problem_of, reset_accelerate
from tests.integration.runs import (
    KillAfter,
    KilledError,
    PartlyIgnored,
    assert_same_weights,
    on_processes,
    prose,
    sharded_accelerator,
    weights,
)

peft = pytest.importorskip("peft")
LORA = {"task_type": "CAUSAL_LM", "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in bfloat16 with a tokenizer, and a text beside it."""
    folder, text = tmp_path_factory.mktemp("models") / "base", prose()
    tokenizer = create_tokenizer("char", text)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "head_dim": 8, "eos_token_id": None, "bos_token_id": None}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=tokenizer.get_vocab_size(), **sizes, **heads))
    model.bfloat16().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    (folder.parent / "text.txt").write_text(text)
    return folder


def trainer(base: Path, folder: Path, model: Any = None, stop: int | None = None, **settings: Any) -> Trainer:
    """An adapter on random tokens; another seed each time, so that only a checkpoint makes two runs equal."""
    accelerator = settings.pop("accelerator", None)
    if accelerator is None:
        reset_accelerate()
    defaults = {"batch_size": 8, "max_steps": 6, "learning_rate": 1e-2, "save_every_n_steps": 3, "log_every_n_steps": 1}
    training = TrainingConfig(checkpoint_dir=str(folder), **(defaults | settings))
    loader = DataLoader(PartlyIgnored(), batch_size=8, shuffle=True)
    callbacks: list[Any] = [] if stop is None else [KillAfter(stop)]
    return Trainer(model or adapted(base), training, loader, None, callbacks, accelerator=accelerator)


def adapted(base: Path, config: Any = None, seed: int = 0, name: str = "default") -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.get_peft_model(model, config or peft.LoraConfig(**LORA), adapter_name=name)


def killed_and_resumed(base: Path, folder: Path, make: Any, **settings: Any) -> tuple[Trainer, Trainer]:
    """The same run without a stop, and killed at step 5 and resumed from step 3."""
    whole = trainer(base, folder / "whole", make(0), **settings)
    whole.train()
    with pytest.raises(KilledError):
        trainer(base, folder / "killed", make(0), 5, **settings).train()
    resumed = trainer(base, folder / "killed", make(1), **settings)
    resumed.train()
    assert resumed.resumed_from == folder / "killed" / "step_00000003"
    return whole, resumed


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(20)[None]).logits  # type: ignore[no-any-return]


CONFIGS = {
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "norms too": lambda: peft.LoraConfig(**LORA, modules_to_save=["norm"], bias="lora_only"),
    "ia3 without a task": lambda: peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapter_killed_and_resumed_is_bit_exact_and_opens_in_peft(base: Path, tmp_path: Path, kind: str) -> None:
    name = "mine" if kind == "dora" else "default"
    whole, resumed = killed_and_resumed(base, tmp_path, lambda seed: adapted(base, CONFIGS[kind](), seed, name))
    assert_same_weights(weights(resumed), weights(whole))
    assert resumed.history["train_loss"] == whole.history["train_loss"]
    assert resumed.checkpoint_manager is not None
    checkpoint = resumed.checkpoint_manager.get_latest()
    assert checkpoint is not None
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(model, checkpoint)), logits(whole.model))
    auto = peft.AutoPeftModel if "without a task" in kind else peft.AutoPeftModelForCausalLM
    assert torch.equal(logits(auto.from_pretrained(checkpoint, dtype=torch.float32)), logits(whole.model))


def test_checkpoint_of_adapter_never_holds_base_weights(base: Path, tmp_path: Path) -> None:
    run = trainer(base, tmp_path, ema_decay=0.9)
    run.train()
    checkpoint = run.save_checkpoint("last")
    texts = {"adapter_config.json", "state.json"}
    assert set(verify(checkpoint)["files"]) == {"adapter_model.safetensors", "training.safetensors", *texts}
    assert json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    state, trained = load_checkpoint(checkpoint), {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert state[MODEL_KEY].keys() == state[AVERAGE_KEY]["weights"].keys() == trained
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with run.averaged_weights():
        assert torch.equal(logits(peft.PeftModel.from_pretrained(model, checkpoint)), logits(run.model))


def test_resume_on_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    trainer(base, tmp_path).train()
    model = adapted(base)
    with torch.no_grad():
        model.get_base_model().lm_head.weight[0, 0] += 1
    with pytest.raises(CheckpointError):
        trainer(base, tmp_path, model).train()


def test_resume_from_a_checkpoint_with_the_whole_model(base: Path, tmp_path: Path) -> None:
    """Earlier versions saved it: such a run goes on, and saves the adapter only."""
    whole = trainer(base, tmp_path / "whole")
    whole.train()
    old = trainer(base, tmp_path / "old", max_steps=3)
    old.train()
    assert old.checkpoint_manager is not None
    state = old.state.state_dict() | {MODEL_KEY: dict(old.model.state_dict())}
    del state[ADAPTER_KEY]
    old.checkpoint_manager.save(state, "step_00000003")
    resumed = trainer(base, tmp_path / "old", adapted(base, seed=1), resume_changes=["training.max_steps"])
    resumed.config.training.resume_changes.append("training.lr_scheduler")
    resumed.train()
    assert resumed.global_step == 6
    assert (resumed.save_checkpoint() / "adapter_model.safetensors").exists()


class Counting(nn.Module):
    """A base model that came from nowhere, with a buffer that each forward pass in training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(20, 8), nn.BatchNorm1d(8), nn.Linear(8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids).transpose(1, 2)).transpose(1, 2))  # type: ignore[no-any-return]


def test_buffers_of_the_base_are_resumed(tmp_path: Path) -> None:
    def make(seed: int) -> Any:
        torch.manual_seed(0)
        return peft.get_peft_model(Counting(), peft.LoraConfig(target_modules=["head"]))

    whole, resumed = killed_and_resumed(tmp_path, tmp_path, make)
    assert_same_weights(weights(resumed), weights(whole))
    saved = json.loads((resumed.save_checkpoint() / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] is None


def unfrozen(base: Path) -> Any:
    model = adapted(base)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def injected(base: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.add_adapter(peft.LoraConfig(**LORA))
    return model


REFUSED = {
    "weights outside": unfrozen,
    "injected": injected,
    "computed": lambda base: adapted(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
    "ranks": lambda base: adapted(base, peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=6)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_trainer_of_adapter_that_cannot_be_saved_raises(base: Path, tmp_path: Path, kind: str) -> None:
    assert problem_of(lambda: trainer(base, tmp_path, REFUSED[kind](base))).setting == "model"


def train_on(count: int, base: nn.Module, folder: Path, shards: bool) -> None:
    """Trains three steps, and three more in a second Trainer, on `count` processes."""
    for seed, steps in enumerate((3, 6)):
        reset_accelerate()
        accelerator = sharded_accelerator() if shards else None
        settings = {"lr_scheduler": "constant", "resume_changes": ["training.max_steps"], "ema_decay": 0.9}
        torch.manual_seed(seed)
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM"))
        run = trainer(folder, folder, model, max_steps=steps, accelerator=accelerator, **settings)
        run.train()
        assert (run.accelerator.num_processes, run.is_sharded) == (count, shards)
    if run.is_main_process:
        (folder / "history.json").write_text(json.dumps(run.history["train_loss"]))


@pytest.mark.parametrize("shards", [False, True])
def test_adapter_on_two_processes_trains_as_on_one(base: Path, tmp_path: Path, shards: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)  # here, since reading it takes threads
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        on_processes(count, train_on, model, tmp_path / str(count), shards and count == 2)
    one, two = (json.loads((tmp_path / str(count) / "history.json").read_text()) for count in (1, 2))
    assert two == pytest.approx(one, rel=1e-5)
    opened = []
    for count in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        opened.append(logits(peft.PeftModel.from_pretrained(model, tmp_path / str(count) / "step_00000006")))
    assert torch.allclose(*opened, atol=1e-5)
    resumed = trainer(  # on one process, from two
        base, tmp_path / "2", adapted(base, peft.LoraConfig(task_type="CAUSAL_LM")), lr_scheduler="constant",
        resume_changes=["training.max_steps"], ema_decay=0.9, max_steps=7,
    )  # fmt: skip
    resumed.train()
    assert resumed.global_step == 7


# ---- from a config -------------------------------------------------------------------------------------------


def config(base: Path, folder: Path, **lora: Any) -> Config:
    return Config(
        output_dir=str(folder),
        model=ModelConfig(pretrained=str(base), lora=lora),
        data=DataConfig(str(base.parent / "text.txt"), sequence_length=16),
        training=TrainingConfig(batch_size=16, max_steps=4, learning_rate=1e-2, eval_every_n_steps=2),
        sample_tokens=0,
    )


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    reset_accelerate()
    return run(config(base, tmp_path_factory.mktemp("runs") / "lora", r=4, targets=["q_proj", "down_proj"]))


def test_commands_open_a_run_with_lora(finished: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, losses = str(finished.output_dir), {}
    assert finished.checkpoint_manager is not None
    best = str(finished.checkpoint_manager.get_best())
    assert checkpoints(["verify", folder], "") == checkpoints(["list", folder], "") == 0
    assert checkpoints(["show", folder], "") == generate([folder, "--max_new_tokens", "3"], "") == 0
    checkpoints(["consolidate", best, str(tmp_path / "merged"), "--merge"], "")
    for opened in (best, str(tmp_path / "merged")):
        capsys.readouterr()
        source = str(finished.config.data.source)
        evaluate([opened, "--source", source, "--context", "16", "--json"], "")
        losses[opened] = json.loads(capsys.readouterr().out)["loss"]
    evaluate([best, "--json"], "")
    measured = json.loads(capsys.readouterr().out)["loss"]
    assert measured == pytest.approx(finished.metrics.get_best("val_loss"), rel=1e-6)
    assert losses[best] == pytest.approx(losses[str(tmp_path / "merged")], rel=1e-5)


def test_open_adapter_reads_a_base_only_if_the_user_knows_it(finished: Trainer, base: Path, tmp_path: Path) -> None:
    """A stranger's checkpoint names any folder, and settings that import or read more."""
    assert finished.checkpoint_manager is not None
    folder = tmp_path / "adapter"
    checkpoints(["consolidate", str(finished.checkpoint_manager.get_best()), str(folder)], "")
    secret = shutil.copytree(base, tmp_path / "secret")
    saved = json.loads((folder / "adapter_config.json").read_text())

    def write(**changes: Any) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(saved | changes))

    for name in (str(secret), str(tmp_path / "nowhere"), "no/model", None):
        write(base_model_name_or_path=name)
        with pytest.raises(FundamentaLLMError):
            load_model(folder)
    write(base_model_name_or_path=str(secret))
    assert load_model(folder, base).tokenizer.get_vocab_size() > 1
    assert not opened_note(str(secret)).exists()
    other = AutoModelForCausalLM.from_pretrained(base)
    other.lm_head.weight.data[0, 0] += 1
    other.save_pretrained(secret)
    with pytest.raises(CheckpointError):
        load_model(str(finished.output_dir), secret)
    for change in ({"peft_type": "XLORA"}, {"megatron_config": {"a": 1}}, {"init_lora_weights": "corda"}):
        write(**change)
        with pytest.raises(ConfigError):
            load_model(folder, base)
    write()
    (folder / "adapter_model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError):
        load_model(folder, base)
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError):
        load_model(folder, base)


@pytest.mark.parametrize("targets", [["q_proj", "query"], []])
def test_lora_targets_that_match_nothing_are_named(base: Path, tmp_path: Path, targets: list[str]) -> None:
    reset_accelerate()
    problem = problem_of(lambda: make_trainer(config(base, tmp_path, targets=targets)))
    assert (problem.setting, problem.value) == ("model.lora.targets", targets)
    assert "q_proj" in problem.allowed
