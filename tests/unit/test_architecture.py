"""What holds for the source as a whole: one order of rooms, budgets, no dead setting, no pickle."""

import ast
import graphlib
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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
from fundamentallm.training.loss import LOSSES
from fundamentallm.training.optimizers import CLASSES
from fundamentallm.training.schedulers import SCHEDULES

ROOT = Path(fundamentallm.__file__).parent
ROOMS = (
    "__main__",
    "train",
    "commands",
    "training",
    "inference",
    "run",
    "checkpoint",
    "models",
    "data",
    "distributed",
    "config",
    "signals",
    "errors",
    "atomic",
)
"""Imports go down this list only, also those that only a type checker sees."""
WITHOUT_TORCH = ("config", "signals", "errors", "atomic")
"""Rooms that import nothing but the standard library and YAML, so that --help and config errors answer at once."""
IMPORTERS_OF_ACCELERATE = ("train", "commands", "training", "distributed")
MAX_PACKAGE, MAX_FILE, MAX_FUNCTION = 13_500, 450, 60
"""Lines, docstrings included."""
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def _module_name(path: Path) -> str:
    """Returns the name below the package: 'training.loss', 'training' for its __init__, '' for the package's own."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


CALLBACKS = ("Callback", "CallbackList", "LoggingCallback", "SaveBestCallback", "VisualizationCallback")
PATHS = {
    "fundamentallm.config": ("Config", "DataConfig", "ModelConfig", "TrainingConfig"),
    "fundamentallm.training.trainer": ("Trainer",),
    "fundamentallm.training.optimizers": ("create_optimizer",),
    "fundamentallm.training.schedulers": ("create_scheduler",),
    "fundamentallm.training.early_stopping": ("EarlyStopping",),
    "fundamentallm.training.callbacks": CALLBACKS,
    "fundamentallm.training.metrics": ("MetricTracker",),
    "fundamentallm.training.loss": ("create_loss",),
    "fundamentallm.utils.checkpoint": ("CheckpointManager",),
}
"""The import paths that the specification names."""
TEXTS = {_module_name(path): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}


def _room(module: str) -> str:
    return module.partition(".")[0]


def _imports(tree: ast.AST) -> Iterator[str]:
    """Yields every imported module, inside functions and under TYPE_CHECKING too; 'a.b' for `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _own_imports(module: str) -> set[str]:
    """Returns the modules of the package that `module` imports; '' stands for the package itself."""
    found = set()
    for name in _imports(TREES[module]):
        top, _, below = name.partition(".")
        while top == "fundamentallm" and below not in TREES:
            below = below.rpartition(".")[0]
        if top == "fundamentallm":
            found.add(below)
    return found - {module}


def test_rooms_are_the_folders_of_the_package() -> None:
    assert {_room(module) for module in TREES} - {"", "utils"} == set(ROOMS)


@pytest.mark.parametrize("module", [name for name in TREES if _room(name) in ROOMS])
def test_imports_go_down_the_list_of_rooms(module: str) -> None:
    allowed = ROOMS[ROOMS.index(_room(module)) :]
    assert [imported for imported in _own_imports(module) if _room(imported) not in allowed] == []


def test_modules_form_no_circle() -> None:
    # A package's __init__ collects what its modules define, and is imported with each of them.
    packages = {module for module in TREES if any(other.startswith(f"{module}.") for other in TREES)}
    graphlib.TopologicalSorter({module: _own_imports(module) - packages for module in TREES}).prepare()


@pytest.mark.parametrize("module", [name for name in TREES if _room(name) in WITHOUT_TORCH])
def test_config_imports_only_the_standard_library_and_yaml(module: str) -> None:
    outside = {name.partition(".")[0] for name in _imports(TREES[module])}
    assert outside - sys.stdlib_module_names - {"fundamentallm", "yaml"} == set()


@pytest.mark.parametrize("module", [name for name in TREES if _room(name) not in IMPORTERS_OF_ACCELERATE])
def test_lower_rooms_do_not_import_accelerate(module: str) -> None:
    assert "accelerate" not in {name.partition(".")[0] for name in _imports(TREES[module])}


def test_package_stays_within_its_budget() -> None:
    assert sum(text.count("\n") for text in TEXTS.values()) <= MAX_PACKAGE


@pytest.mark.parametrize("module", TREES)
def test_file_and_functions_stay_within_budget(module: str) -> None:
    assert TEXTS[module].count("\n") <= MAX_FILE
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION} == {}


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
        if module != "config.schema"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        # `TrainingConfig.momentum` is the default and `self.dropout` a part's own, not the run's value.
        if ast.unparse(node.value) not in ("TrainingConfig", "self")
    }
    assert {name for section in sections for name in section.__dataclass_fields__} - read == set()


def test_every_setting_has_a_help_text() -> None:
    assert [name for name, _, _, text in settings(Config) if len(text.split()) < 2] == []


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


def test_names_in_the_config_are_those_of_the_tables() -> None:
    assert {name: kind.__name__.lower() for name, kind in CLASSES.items()} == {name: name for name in OPTIMIZER_NAMES}
    assert tuple(SCHEDULES) == SCHEDULE_NAMES
    assert {name: loss.__name__ for name, loss in LOSSES.items()} == {name: name for name in LOSS_NAMES}


def test_what_the_command_line_needs_loads_no_torch(tmp_path: Path) -> None:
    commands = ("estimate", "find_lr", "report", "prepare")
    names = ["config.command_line", "train", *(f"commands.{name}" for name in commands)]
    modules = ", ".join(f"fundamentallm.{name}" for name in names)
    code = f"import {modules}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    path = {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) & {"torch", "accelerate", "numpy", "tokenizers", "matplotlib"} == set()


@pytest.mark.parametrize("name", fundamentallm.__all__)
def test_every_public_name_resolves_to_the_object_of_that_name(name: str) -> None:
    assert getattr(fundamentallm, name).__name__ == name


def test_package_lists_its_public_names_only() -> None:
    assert dir(fundamentallm) == fundamentallm.__all__
    with pytest.raises(AttributeError, match="no attribute 'Tansformer'"):
        _ = fundamentallm.Tansformer


@pytest.mark.parametrize("path", PATHS)
def test_import_path_of_the_specification_gives_the_public_object(path: str) -> None:
    module = importlib.import_module(path)
    for name in PATHS[path]:
        assert getattr(module, name) is getattr(fundamentallm, name)
