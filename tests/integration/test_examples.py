"""Every example and every accelerate config works as it is."""

import importlib.util
import re
import runpy
import shutil
import sys
import types
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from fundamentallm import train
from fundamentallm.config.command_line import parse_config
from fundamentallm.distributed.accelerator import launch_problems
from tests.integration.runs import lines, prose

ROOT = Path(__file__).parents[2]


def load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_train_from_python_lowers_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = load(ROOT / "examples/train_from_python.py").main(str(tmp_path / "run"))
    assert trainer.metrics.get_latest("val_loss") < 2.9
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert "The " in capsys.readouterr().out


EXPECTED_OUTPUT = {
    "custom_optimizer": r"validation loss [23]\.\d+ after 20 steps",
    "finetune_chat": r"answer: ",
    "finetune_transformers": r"opened in transformers: LlamaForCausalLM",
    "classification": r"'val_accuracy': 0\.[4-9]",
    "lora": r"opened in peft: .*\n(.*\n)*merged: Qwen3ForCausalLM",
    "python_sources": r"def __init__\(self.+",
    "skip_spike": r"steps 21 to 22 are left out, from step_00000020 on\n.*\n +21 +4\.\d+ +1\.\d+",
    "supervised_pairs": r"97\+70=\d+",
    "sweep": r"best val_loss\n +[0-9.]+  \w+_5e-3\n +[0-9.]+  \w+_5e-3",
    "vision": r"[4-9]\d\.\d% of the shapes are classified correctly",
}


@pytest.mark.parametrize("name", EXPECTED_OUTPUT)
def test_script_with_smoke_prints_its_result(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in ("lora", "finetune_chat"):
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--smoke"])
    runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
    assert re.search(EXPECTED_OUTPUT[name], capsys.readouterr().out)


def test_scripts_with_smoke_are_all_tested() -> None:
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py") if "--smoke" in path.read_text()}
    assert scripts == EXPECTED_OUTPUT.keys()


def test_custom_optimizer_trains_with_its_names_in_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(ROOT / "examples/custom_optimizer.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(prose(20_000))
    settings = {
        "data.source": "my.txt",
        "training.optimizer": "custom_optimizer:Lion",
        "training.optimizer_options": "{beta2: 0.95}",
        "training.lr_scheduler": "custom_optimizer:inverse_square_root",
        "training.lr_scheduler_options": "{sharpness: 5}",
        "training.loss": "custom_optimizer:PolyLoss",
        "training.loss_options": "{epsilon: 0.5}",
        "callbacks": '["custom_optimizer:StopWhenGood"]',
    }
    arguments = [word for name, value in settings.items() for word in (f"--{name}", value)]
    arguments += ["--model.d_model", "16", "--model.num_heads", "2", "--model.num_layers", "1", "--sample_tokens", "0"]
    arguments += ["--data.sequence_length", "32", "--training.max_steps", "20", "--training.learning_rate", "1e-2"]
    assert train.main([*arguments, "--training.log_every_n_steps", "1"]) == 0
    rates = [line["learning_rate"] for line in lines(tmp_path / "runs/default") if "learning_rate" in line]
    assert len(rates) == 20
    assert rates[0] == 1e-2
    assert rates == sorted(rates, reverse=True)


def test_shakespeare_lowers_the_loss_on_another_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "my.txt"
    text.write_text(prose(20_000))
    config = parse_config(["--config", str(ROOT / "examples/shakespeare.yaml")])
    assert config.training.max_steps <= 1000
    arguments = ["--config", str(ROOT / "examples/shakespeare.yaml"), "--data.source", str(text)]
    arguments += ["--output_dir", str(tmp_path / "run"), "--training.max_steps", "15", "--sample_tokens", "0"]
    assert train.main(arguments) == 0
    (best,) = re.findall(r"best val_loss ([0-9.]+)", capsys.readouterr().out)
    assert float(best) < 2.9  # a model that knows only the character frequencies has 3.3


CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_config_is_read_with_its_values(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    assert config.use_cpu == path.stem.startswith("cpu")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_config_launches_with_every_key_in_effect(path: Path) -> None:
    """accelerate silently ignores unknown keys of sections, and keys whose flag has a default."""
    parser, given = launch_command_parser(), yaml.safe_load(path.read_text())
    command = ["--config_file", str(path), "-m", "fundamentallm.train"]
    known, flags = vars(parser.parse_args(command)), {}
    for name, value in given.items():
        flags |= value if isinstance(value, dict) else {name: value}
    assert flags.keys() - known.keys() - {"compute_environment", "distributed_type", "use_cpu"} == set()
    arguments, _, _ = _validate_launch_command(parser.parse_args(command))
    taken = {name: getattr(arguments, name) for name in flags if name in known}
    assert taken == {name: flags[name] for name in taken}
    arguments.main_process_port = 0  # any free one
    if arguments.use_fsdp or arguments.multi_gpu:
        environment = prepare_multi_gpu_env(arguments)
        assert arguments.nproc_per_node == str(given["num_processes"] // given["num_machines"])
    else:
        _, environment = prepare_simple_launcher_cmd_env(arguments)
    assert launch_problems({**environment, "WORLD_SIZE": str(given["num_processes"])}, not given["use_cpu"]) == []
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"  # the run's config decides
    assert (environment.get("FSDP_VERSION") == "2") == (given["distributed_type"] == "FSDP")
    assert (environment.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE") == "2") == (path.stem == "hsdp")
