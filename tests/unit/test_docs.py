"""The documentation: its links lead somewhere, what it names exists, and what can be run is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mkdocs.commands.build import build
from mkdocs.config import load_config
from torch import Tensor

import fundamentallm
from fundamentallm import CheckpointManager
from fundamentallm.config.command_line import parse_config, settings
from fundamentallm.config.schema import Config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SETTINGS = {name for name, _, _, _ in settings(Config)}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As CI builds it: a broken link or anchor, or a page that the navigation lacks, is an error."""
    folder = tmp_path_factory.mktemp("site")
    config: Any = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    build(config)
    return folder


def test_the_site_has_every_setting(site: Path) -> None:
    page = (site / "settings" / "index.html").read_text()
    assert {name for name in SETTINGS if f"<code>{name}</code>" not in page} == set()


def test_the_site_has_every_public_name_with_what_it_says_of_itself(site: Path) -> None:
    page = (site / "api" / "index.html").read_text()
    assert [name for name in fundamentallm.__all__ if f'id="fundamentallm.{name}"' not in page] == []
    assert "Newton" not in page  # nothing else
    assert "numbers = torch" in re.sub(r"<[^>]+>", "", page)


def test_the_site_asks_nobody_else_for_scripts_or_fonts(site: Path) -> None:
    text = "".join(path.read_text() for path in site.rglob("*.html"))
    assert re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?:[^\"]+", text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_to_files_of_the_repository_lead_to_one(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"", page.read_text())
    paths = [one or other for one, other in targets]
    assert [path for path in paths if "://" not in path and not (page.parent / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"`(?:--)?((?:model|data|training)\.\w+)\b(?!\()", text))
    assert named - SETTINGS - {"training.safetensors", "model.safetensors"} == set()
    options = set(re.findall(r" --((?:model|data|training)\.\w+)", text))
    assert options - SETTINGS == set()
    files = re.findall(r"`((?:examples|accelerate_configs|fundamentallm|tests)/[\w/.]+)`", text)
    assert [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_on_a_page_is_python_and_imports_what_there_is(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
        for names in re.findall(r"from fundamentallm import \(?([\w,\s]+?)\)?$", block, flags=re.MULTILINE):
            assert {name for name in re.split(r"[,\s]+", names) if name} <= {*fundamentallm.__all__}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_yaml_on_a_page_is_a_config(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        (tmp_path / "config.yaml").write_text(block)
        parse_config(["--config", str(tmp_path / "config.yaml")], check_files=False)


def test_the_tutorial_s_python_and_the_numerics_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for page in ("tutorial", "numerics"):
        for block in blocks(ROOT / f"docs/{page}.md", "python"):
            exec(block, names)
    assert names["history"]["train_loss"][-1] < 0.5


# ---- the format of checkpoints -------------------------------------------------------------------------------

DTYPES = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64, "BF16": torch.bfloat16, "BOOL": torch.bool}


@pytest.fixture(scope="module")
def read_checkpoint() -> Any:
    """The reader that the format's specification has."""
    names: dict[str, Any] = {}
    exec(blocks(ROOT / "docs/checkpoint-format.md", "python")[-1], names)
    return names["read_checkpoint"]


def plain(state: Any) -> Any:
    """A state with tensors as the specification's reader gives whole ones."""
    if isinstance(state, Tensor):
        size = list(state.shape)
        dtype = next(name for name, kind in DTYPES.items() if kind == state.dtype)
        return (dtype, size, [([0] * state.ndim, size, state.reshape(-1).view(torch.uint8).numpy().tobytes())])
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return type(state)(map(plain, state)) if isinstance(state, (list, tuple)) else state


def test_the_specified_reader_reads_what_the_package_reads(tmp_path: Path, read_checkpoint: Any) -> None:
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
def test_the_specified_reader_refuses_what_is_damaged(tmp_path: Path, read_checkpoint: Any, file: str) -> None:
    state = {"model_state_dict": {"weight": torch.ones(3)}}
    path = CheckpointManager(tmp_path).save(state, "one", files={"config.json": json.dumps({"a": 1})})
    data = bytearray((path / file).read_bytes())
    data[-3] ^= 1  # the last bracket is at the end
    (path / file).write_bytes(data)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        read_checkpoint(path)
