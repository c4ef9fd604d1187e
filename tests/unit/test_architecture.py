"""What holds of the source as a whole: layers, no dead setting, no pickle, names in step with their tables."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import fundamentallm
from fundamentallm.config.command_line import settings
from fundamentallm.config.schema import (
    CALLBACK_NAMES,
    LOSS_NAMES,
    OPTIMIZER_NAMES,
    SCHEDULE_NAMES,
    Config,
    DataConfig,
    ModelConfig,
    TrainingConfig,
)
from fundamentallm.errors import ConfigError
from fundamentallm.training.loss import LOSSES
from fundamentallm.training.optimizers import create_optimizer
from fundamentallm.training.schedulers import SCHEDULES

ROOT = Path(fundamentallm.__file__).parent
LEAVES = ("errors", "registry", "validation", "files", "config", "command_line")
PARTS = tuple(
    f"training.{name}"
    for name in (
        *("loss", "metrics", "optimizers", "optimizer_state", "parameter_groups", "schedulers", "early_stopping"),
        *("guard", "launch", "throughput"),
    )
)
SERVICES = tuple(
    f"training.{name}"
    for name in (
        *("serialization", "manifest", "snapshot", "checkpoint", "callbacks", "visualization", "progress"),
        *("stopping", "run_folder", "tensor_files", "stored", "team", "group", "watchdog"),
        *("json_lines", "environment", "inspection"),
    )
)
WITHIN_SERVICES = {
    ("training.callbacks", "training.json_lines"),
    ("training.run_folder", "training.json_lines"),
    ("training.visualization", "training.callbacks"),
    ("training.visualization", "training.run_folder"),
    ("training.inspection", "training.callbacks"),
    ("training.inspection", "training.json_lines"),
    ("training.inspection", "training.run_folder"),
    ("training.inspection", "training.tensor_files"),
    ("training.checkpoint", "training.stored"),
    ("training.stored", "training.serialization"),
    ("training.stored", "training.snapshot"),
    ("training.stored", "training.manifest"),
    ("training.stored", "training.tensor_files"),
    ("training.checkpoint", "training.snapshot"),
    ("training.snapshot", "training.serialization"),
    ("training.snapshot", "training.manifest"),
    ("training.checkpoint", "training.manifest"),
    ("training.checkpoint", "training.tensor_files"),
    ("training.checkpoint", "training.team"),
    ("training.snapshot", "training.tensor_files"),
    ("training.tensor_files", "training.manifest"),
}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def _module_name(path: Path) -> str:
    """Below the package: 'training.loss'; 'training' for its __init__; '' for the package's own."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


TREES = {_module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}


def _level(module: str) -> int:
    package = module.partition(".")[0]
    if module in LEAVES:
        return 0
    if package in ("models", "data") or module in PARTS:
        return 1
    if package == "training":
        return 2 if module in SERVICES else 3
    return 4


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _walk_run_time(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not _is_type_checking(child):
            yield from _walk_run_time(child)


def _imports(tree: ast.AST) -> Iterator[str]:
    """Every module imported at run time, inside functions too; 'a.b' for `from a import b`."""
    for node in _walk_run_time(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _own_imports(module: str) -> set[str]:
    """Modules of the package that `module` imports; '' for the package itself."""
    found = set()
    for name in _imports(TREES[module]):
        top, _, below = name.partition(".")
        while top == "fundamentallm" and below not in TREES:
            below = below.rpartition(".")[0]
        if top == "fundamentallm":
            found.add(below)
    return found


def _may_import(importer: str, imported: str) -> bool:
    level = _level(importer)
    if imported == "":
        return False
    if level == 1:
        together = importer.partition(".")[0] in ("models", "data")
        return _level(imported) == 0 or (together and imported.split(".")[0] == importer.split(".")[0])
    if level == 2:
        return _level(imported) < 2 or (importer, imported) in WITHIN_SERVICES
    return _level(imported) <= level


@pytest.mark.parametrize("level", range(5))
def test_each_level_has_modules(level: int) -> None:
    assert [module for module in TREES if module and _level(module) == level]


@pytest.mark.parametrize("named", [*LEAVES, *PARTS, *SERVICES])
def test_a_module_named_by_the_layers_exists(named: str) -> None:
    assert named in TREES


@pytest.mark.parametrize("module", TREES)
def test_imports_go_one_way(module: str) -> None:
    assert [imported for imported in _own_imports(module) if not _may_import(module, imported)] == []


def test_no_modules_import_each_other() -> None:
    graphlib.TopologicalSorter({module: _own_imports(module) for module in TREES}).prepare()


@pytest.mark.parametrize("module", LEAVES)
def test_level_0_imports_only_the_standard_library_and_yaml(module: str) -> None:
    outside = {name.partition(".")[0] for name in _imports(TREES[module])}
    assert outside - sys.stdlib_module_names - {"fundamentallm", "ruamel"} == set()


@pytest.mark.parametrize("module", [module for module in TREES if _level(module) < 3])
def test_only_the_upper_levels_import_accelerate(module: str) -> None:
    assert "accelerate" not in {name.partition(".")[0] for name in _imports(TREES[module])}


@pytest.mark.parametrize("module", TREES)
def test_nothing_pickles(module: str) -> None:
    imported = set(_imports(TREES[module]))
    assert {name.partition(".")[0] for name in imported} & UNPICKLERS == set()
    named = {ast.unparse(node) for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute)}
    # accelerate's save_state and load_state pickle the random state.
    pickling = {name for name in imported | named if name in ("torch.save", "torch.load")}
    pickling |= {name for name in named if name.endswith((".save_state", ".load_state"))}
    keywords = {node.arg for node in ast.walk(TREES[module]) if isinstance(node, ast.keyword)}
    assert pickling | (keywords & {"allow_pickle", "pickle_module"}) == set()


def test_every_setting_is_read_outside_the_config() -> None:
    sections = (Config, ModelConfig, DataConfig, TrainingConfig)
    read = {
        node.attr
        for module, tree in TREES.items()
        if module != "config"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        # `TrainingConfig.momentum` is the default and `self.dropout` a part's own, not the run's value.
        if ast.unparse(node.value) not in ("TrainingConfig", "self")
    }
    assert {name for section in sections for name in section.__dataclass_fields__} - read == set()


@pytest.mark.parametrize(("setting", "text"), [(name, text) for name, _, _, text in settings(Config)])
def test_every_setting_has_a_help_text(setting: str, text: str) -> None:
    assert len(text.split()) > 1


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("training.optimizer", OPTIMIZER_NAMES),
        ("training.lr_scheduler", SCHEDULE_NAMES),
        ("training.loss", LOSS_NAMES),
        ("callbacks", CALLBACK_NAMES),
    ],
)
def test_the_help_text_names_every_choice(setting: str, names: tuple[str, ...]) -> None:
    text = next(text for name, _, _, text in settings(Config) if name == setting)
    assert set(names) <= set(text.replace(",", " ").replace(".", " ").split())


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_every_optimizer_name_makes_that_optimizer(name: str) -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    assert type(create_optimizer(model, name, 0.1)).__name__.lower() == name


def test_create_optimizer_knows_no_other_name() -> None:
    with pytest.raises(ConfigError, match=f"allowed: {', '.join(sorted(OPTIMIZER_NAMES))}, or 'module:name'"):
        create_optimizer(nn.Linear(2, 2), "rmsprop", 0.1)


def test_every_schedule_name_means_that_schedule() -> None:
    assert {name: curve.__name__ for name, curve in SCHEDULES.items()} == {name: name for name in SCHEDULE_NAMES}


def test_every_loss_name_means_that_loss() -> None:
    means = {name: loss.__name__.lower() for name, loss in LOSSES.items()}
    assert means == {name: name.replace("_", "") for name in LOSS_NAMES}


def _loaded_after(statement: str, folder: Path) -> set[str]:
    code = f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    path = {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "module",
    [
        "fundamentallm",
        "fundamentallm.config.command_line",
        "fundamentallm.train",
        "fundamentallm.commands.doctor.main",
        "fundamentallm.commands.estimate.main",
        "fundamentallm.commands.find_lr",
        "fundamentallm.commands.report",
        "fundamentallm.commands.prepare",
    ],
)
def test_what_the_command_line_needs_loads_no_torch(module: str, tmp_path: Path) -> None:
    loaded = _loaded_after(f"import {module}", tmp_path)
    assert module in loaded
    assert loaded & {"torch", "accelerate", "numpy", "tokenizers", "matplotlib"} == set()


@pytest.mark.parametrize("name", fundamentallm.__all__)
def test_every_public_name_resolves_to_the_object_of_that_name(name: str) -> None:
    assert getattr(fundamentallm, name).__name__ == name


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Tansformer'"):
        _ = fundamentallm.Tansformer


def test_the_type_checker_sees_the_public_names() -> None:
    guarded = next(node for node in TREES[""].body if _is_type_checking(node))
    aliases = [alias for node in ast.walk(guarded) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(alias.asname or "" for alias in aliases) == fundamentallm.__all__
