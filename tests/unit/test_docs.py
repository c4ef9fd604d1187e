"""The documentation: links work, names exist, and examples run."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from torch import Tensor

import fundamentallm
from fundamentallm import CheckpointManager
from fundamentallm.config.command_line import parse_config, settings
from fundamentallm.config.schema import Config
from fundamentallm.train import run
from tests.benchmarks.packing import write_pairs
from tests.unit.test_architecture import ROOMS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SETTINGS = {name for name, _, _, _ in settings(Config)}


def generate() -> ModuleType:
    """Returns the module docs/generate.py."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_as_the_source_says() -> None:
    stale = [str(path.relative_to(ROOT)) for path in generate().out_of_date()]
    assert stale == [], "run python docs/generate.py"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the site. A broken link or anchor, or a page missing in the navigation, is an error."""
    folder = tmp_path_factory.mktemp("site")
    config: Any = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    build(config)
    return folder


def test_api_page_documents_every_public_name_trainer_first() -> None:
    page = (ROOT / "docs/api.md").read_text()
    names = re.findall(r"^### (\w+)$", page, flags=re.MULTILINE)
    assert sorted(names) == fundamentallm.__all__
    assert names[0] == "Trainer"
    assert "Newton" not in page  # from the docstring of a private function
    assert "numbers = torch" in page


def test_site_loads_nothing_from_other_servers(site: Path) -> None:
    text = "".join(path.read_text() for path in site.rglob("*.html"))
    assert re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?:[^\"]+", text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_links_to_files_that_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"", page.read_text())
    paths = [one or other for one, other in targets]
    assert [path for path in paths if "://" not in path and not (page.parent / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_names_settings_and_files_that_exist(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"`(?:--)?((?:model|data|training)\.\w+)\b(?!\()", text))
    assert named - SETTINGS - {"training.safetensors", "model.safetensors"} == set()
    options = set(re.findall(r" --((?:model|data|training)\.\w+)", text))
    assert options - SETTINGS == set()
    files = re.findall(r"`((?:examples|accelerate_configs|fundamentallm|tests)/[\w/.]+)`", text)
    assert [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_python_compiles_and_imports_public_names(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
        for names in re.findall(r"from fundamentallm import \(?([\w,\s]+?)\)?$", block, flags=re.MULTILINE):
            assert {name for name in re.split(r"[,\s]+", names) if name} <= {*fundamentallm.__all__}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_yaml_is_a_valid_config(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        (tmp_path / "config.yaml").write_text(block)
        parse_config(["--config", str(tmp_path / "config.yaml")], check_files=False)


def test_contributing_lists_the_rooms_in_order() -> None:
    (rooms,) = re.findall(r"^## Rooms\n(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
    assert re.findall(r"^\| `(\w+)` \|", rooms, flags=re.MULTILINE) == [*ROOMS]


def test_quickstart_in_the_tutorial_is_the_packaged_one() -> None:
    shown = yaml.safe_load(blocks(ROOT / "docs/tutorial.md", "yaml")[0])
    packaged = yaml.safe_load((ROOT / "fundamentallm/config/quickstart.yaml").read_text())
    for section, values in shown.items():
        assert values == packaged[section] or values.items() <= packaged[section].items()


def test_tutorial_and_numerics_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for page in ("tutorial", "numerics"):
        for block in blocks(ROOT / f"docs/{page}.md", "python"):
            exec(block, names)
    assert names["history"]["train_loss"][-1] < 0.5


def test_python_page_trains_with_several_validation_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(next(block for block in blocks(ROOT / "docs/python.md", "python") if "val_near_loss" in block), names)
    assert {"val_near_loss", "val_far_loss"} <= names["history"].keys()
    assert names["history"]["step"][0] == 0


def test_data_page_packs_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl", "bisect heapq json shlex")
    (example,) = [block for block in blocks(ROOT / "docs/data.md", "yaml") if "packing: true" in block]
    (tmp_path / "config.yaml").write_text(example)
    trainer = run(parse_config(["--config", "config.yaml", "--training.max_steps", "1", "--sample_tokens", "0"]))
    assert trainer.is_finished
    num_pairs = len((tmp_path / "pairs.jsonl").read_text().splitlines())
    assert trainer.samples.num_samples < num_pairs / 2  # windows


# ---- the format of checkpoints -------------------------------------------------------------------------------

DTYPES = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64, "BF16": torch.bfloat16, "BOOL": torch.bool}


@pytest.fixture(scope="module")
def read_checkpoint() -> Any:
    """Returns the reader of the format's specification."""
    names: dict[str, Any] = {}
    exec(blocks(ROOT / "docs/checkpoint-format.md", "python")[-1], names)
    return names["read_checkpoint"]


def plain(state: Any) -> Any:
    """Returns a state with its tensors as the specification's reader returns unsharded ones."""
    if isinstance(state, Tensor):
        size = list(state.shape)
        dtype = next(name for name, kind in DTYPES.items() if kind == state.dtype)
        return (dtype, size, [([0] * state.ndim, size, state.reshape(-1).view(torch.uint8).numpy().tobytes())])
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return type(state)(map(plain, state)) if isinstance(state, (list, tuple)) else state


def test_specified_reader_returns_what_the_package_loads(tmp_path: Path, read_checkpoint: Any) -> None:
    shared = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    state = {
        "model_state_dict": {
            "embed.weight": shared,
            "head.weight": shared,
            "gain": torch.ones(3, dtype=torch.bfloat16),
        },
        "optimizer_state_dict": {"state": {"embed.weight": {"step": torch.tensor(3.0)}, "a/b~c": {"m": torch.ones(2)}}},
        "progress_state_dict": {"step": 7, "done": torch.tensor([True]), "place": (1, [None, "ä"])},
        "best": float("inf"),
        "config": {"output_dir": "läufe"},
    }
    path = CheckpointManager(tmp_path).save(state, "one", files={"config.json": "{}"})
    assert read_checkpoint(path) == plain(CheckpointManager(tmp_path).load(path))
    assert read_checkpoint(path)["optimizer_state_dict"]["state"]["a/b~c"]["m"][0] == "F32"


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "model.safetensors", "config.json"])
def test_specified_reader_damaged_file_raises(tmp_path: Path, read_checkpoint: Any, file: str) -> None:
    state = {"model_state_dict": {"weight": torch.ones(3)}}
    path = CheckpointManager(tmp_path).save(state, "one", files={"config.json": json.dumps({"a": 1})})
    data = bytearray((path / file).read_bytes())
    data[-3] ^= 1  # not the last byte, which may be a closing bracket
    (path / file).write_bytes(data)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        read_checkpoint(path)
