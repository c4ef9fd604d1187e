"""Saved state comes back bit for bit, a checkpoint is complete or absent, and rotation follows the disk."""

import copy
import math
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.distributed.dtensor import is_dense
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import CheckpointError, CheckpointNotFoundError
from tests.unit.checkpoint_files import empty, flip_first_bit, make_true

FILES = ("model.safetensors", "training.safetensors", "state.json", "config.json", "manifest.json")
CONFIG = {"config.json": '{"model_type": "llama"}'}
DTYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8",
    "uint8", "bool",
)  # fmt: skip


def state(step: int = 0) -> dict[str, Any]:
    return {"model_state_dict": {"w": torch.full((3, 2), float(step))}, "step": step, "moment": torch.ones(4)}


def save_steps(manager: CheckpointManager, count: int, best: tuple[int, ...] = ()) -> Path:
    for step in range(count):
        path = manager.save(state(step), f"step_{step}", is_best=step in best, files=CONFIG)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def round_trip(folder: Path, value: Any) -> Any:
    manager = CheckpointManager(folder)
    return manager.load(manager.save({"value": value}))["value"]


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (got, expected)]
    assert torch.equal(*as_bytes)


# ---- round trips -------------------------------------------------------------------------------------------


def test_load_returns_tensors_bit_for_bit(tmp_path: Path) -> None:
    shapes = ((), (0,), (3, 0, 2), (1,), (3, 5), (2, 3, 4))
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randint(0, 99, shape, generator=generator).to(getattr(torch, dtype))
        for dtype in DTYPES
        for shape in shapes
    ] + [torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])]
    for got, expected in zip(round_trip(tmp_path, tensors), tensors, strict=True):
        assert_same_bits(got, expected)


def test_load_returns_values_with_their_type(tmp_path: Path) -> None:
    numbers = [0, -1, 2**80, 0.1, 1 / 3, -0.0, 5e-324, math.inf, -math.inf, math.nan]
    values = [None, True, False, *numbers, "", "Привет, 世界 \0 \ud800 \n"]
    for got, value in zip(round_trip(tmp_path, values), values, strict=True):
        assert type(got) is type(value)
        assert repr(got) == repr(value)


def test_load_returns_containers_in_order_and_type(tmp_path: Path) -> None:
    value = {
        "z": [],
        "a": {"empty": {}, "ключ": (1, [2, (3.5, None)], ()), "": "", "a.b/c": [{"x": "__float__"}]},
        "keys": {0: {2.5: "a", None: "b"}, (1, "x"): [torch.tensor(1)], "0": 1, "__tensor__": 2},
        "milestones": Counter([3, 3, 5]),
        "list": [torch.tensor(1), "two", (torch.tensor([3.0]), {"four": torch.tensor(True)})],
        "alike": [
            {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "": {"x": torch.tensor(3)}},
            {"a": [torch.tensor(1)], "a/0": torch.tensor(2), "__metadata__": torch.tensor(3)},
        ],
    }
    assert repr(round_trip(tmp_path, value)) == repr(value)


def test_save_stores_a_tied_weight_once(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(64, 32))
    manager = CheckpointManager(tmp_path)
    path = manager.save({"copy": weight, "model_state_dict": {"table": weight, "head": weight}})
    got = manager.load(path)
    for tensor in (*got["model_state_dict"].values(), got["copy"]):
        assert_same_bits(tensor, weight.detach())
    assert list(load_file(path / "model.safetensors")) == ["table"]
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) < 1.5 * weight.nbytes


def test_save_of_a_view_stores_what_it_shows(tmp_path: Path) -> None:
    base = torch.arange(48.0).reshape(6, 8)
    views = [base, base.T, base[::2, 1:], base[3], base.expand(2, 6, 8), base.as_strided((4, 4), (1, 1))]
    views += [base.view(torch.int32), *(view[..., :1] for view in views)]
    for got, expected in zip(round_trip(tmp_path, views), views, strict=True):
        assert_same_bits(got, expected)
        assert got.stride() == expected.stride() or not is_dense(expected) or 1 in expected.shape
    path = CheckpointManager(tmp_path).save({"view": torch.zeros(100_000)[:10]})
    assert (path / "training.safetensors").stat().st_size < 1000


def test_save_writes_further_files_and_no_pickle(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    path = CheckpointManager(tmp_path).save(state(), files={"config.json": "«é»\n"})
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    written = contents(path)
    assert sorted(written) == sorted(FILES)
    assert written["config.json"].decode() == "«é»\n"
    for name, content in written.items():
        assert not content.startswith((b"\x80", b"PK")), name


# ---- refused states and names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "facts"),
    [
        ({"a": [1, {"b": object()}]}, ("value/a/1/b", "builtins.object")),
        ({"a": {1, 2}}, ("value/a", "builtins.set")),
        ([np.float32(3)], ("value/0", "numpy.float32")),
        (np.zeros(2), ("value", "numpy.ndarray")),
        (b"text", ("value", "builtins.bytes")),
        ({"a": {torch.ones(1): 1}}, ("value/a", "keys")),
        ([torch.zeros(2, dtype=torch.complex128)], ("value/0", "complex128")),
    ],
)
def test_save_refuses_a_value_by_its_path(tmp_path: Path, value: Any, facts: tuple[str, ...]) -> None:
    for save in (CheckpointManager.save, CheckpointManager.save_in_background):
        with pytest.raises(CheckpointError) as error:
            save(CheckpointManager(tmp_path / "new"), {"value": value}, "a")
        assert all(fact in str(error.value) for fact in facts)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["../x", "/x", "", "..", ".x", "a/b", "x\n", "é", "state.json", "model.safetensors"])
def test_save_refuses_an_unsafe_or_reserved_name(tmp_path: Path, name: str) -> None:
    manager = CheckpointManager(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError):
        manager.save(state(), name)
    with pytest.raises(CheckpointError):
        manager.save(state(), files={name: "text"})
    assert names(tmp_path) == []


# ---- complete or absent ----------------------------------------------------------------------------------------


def test_save_replaces_a_checkpoint_of_the_same_name(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last_n=1)
    for step in (1, 2, 3):  # the second replaces a damaged one
        path = manager.save(state(step), "best", is_best=True, files={f"{step}.json": "{}"})
        assert manager.get_best() == path == tmp_path / "best"
        assert manager.load(path)["step"] == step
        assert names(tmp_path) == ["best"]
        assert [file.name for file in path.glob("?.json")] == [f"{step}.json"]
        if step == 1:
            empty(path / "model.safetensors")


@pytest.mark.parametrize("file", ["thesis.tex", "model.safetensors", "manifest.json", "state.json"])
def test_save_does_not_replace_what_is_not_a_checkpoint(tmp_path: Path, file: str) -> None:
    """A model folder in Hugging Face format has model.safetensors, and other programs write a manifest.json."""
    mine = tmp_path / "best" / file
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(CheckpointError, match="best"):
        CheckpointManager(tmp_path).save(state(), "best")
    assert mine.read_text() == "mine"
    assert names(tmp_path) == ["best"]


# ---- saving in the background ------------------------------------------------------------------------------------


class Gate(HostGroup):
    """Holds back the thread that writes until it is opened."""

    def __init__(self) -> None:
        super().__init__(alone=True)
        self.opened, self.entered = threading.Event(), threading.Event()

    def from_main(self, action: Callable[[], Any]) -> Any:
        self.entered.set()
        assert self.opened.wait(60)
        return super().from_main(action)


def test_save_in_background_copies_the_state(tmp_path: Path) -> None:
    """Changes in place, through a view, through a tied name, and in nested containers."""
    gate = Gate()
    manager = CheckpointManager(tmp_path, group=gate)
    weight, moments = torch.ones(4, 3), [torch.arange(6.0)]
    texts, files = {"a": [1, 2]}, {"config.json": "{}"}
    changing = {
        "model_state_dict": {"w": weight, "tied": weight, "row": weight[1], "turned": weight.T},
        "optimizer_state_dict": {"state": moments}, "texts": texts,
    }  # fmt: skip
    expected = copy.deepcopy(changing)
    manager.save_in_background(changing, "step_1", files=files)
    assert gate.entered.wait(60)
    weight.fill_(math.nan)
    moments[0].zero_()
    moments.append(torch.ones(1))
    texts["a"].append(3)
    texts["b"] = [4]
    files.clear()
    gate.opened.set()
    manager.wait()
    assert repr(manager.load(tmp_path / "step_1")) == repr(expected)
    assert (tmp_path / "step_1" / "config.json").read_text() == "{}"


def test_save_in_background_error_is_raised_at_next_call(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    (tmp_path / "taken").mkdir()
    for ask in (manager.wait, lambda: manager.save(state(), "a"), lambda: manager.save_in_background(state(), "a")):
        manager.save_in_background(state(), "taken")
        with pytest.raises(CheckpointError, match="taken"):
            ask()
        assert manager.error is None
        manager.wait()
    assert names(tmp_path) == ["taken"]
    assert manager.save(state(), "a").name == "a"


# ---- rotation ------------------------------------------------------------------------------------------------


def test_save_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    """Age is the order of saving, not of names."""
    manager, saved = CheckpointManager(tmp_path, 3), list[str]()
    for name in ("z", "a", "m", "b", "y"):
        saved.append(manager.save(state(), name).name)
        assert manager.get_latest() == tmp_path / name
        assert names(tmp_path) == sorted(saved[-3:])
    save_steps(CheckpointManager(tmp_path, 1), 5, best=(1, 3))
    assert names(tmp_path) == ["step_3", "step_4"]
    assert manager.get_best() == tmp_path / "step_3"


def test_save_deletes_nothing_that_is_not_a_checkpoint(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "checkpoints"
    CheckpointManager(outside).save(state(), "theirs")
    for file, text in {
        "notes/a.txt": "mine", "step_x": "mine", "step_y/model.safetensors": "no manifest",
        "torn/manifest.json": '{"format_version": 1, "files"',
    }.items():  # fmt: skip
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    (folder / "linked").symlink_to(outside / "theirs")
    manager = CheckpointManager(folder, 1)
    (manager.save(state(), "with_notes") / "notes.txt").write_text("mine")
    before, listed = contents(folder), names(folder)
    save_steps(manager, 4)
    assert names(folder) == sorted([*listed, "step_3"])
    assert contents(folder).items() >= before.items()
    assert names(outside) == ["theirs"]


# ---- finding and loading -------------------------------------------------------------------------------------


def test_manager_of_an_empty_folder_finds_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "missing"):
        manager = CheckpointManager(folder)
        assert (manager.get_latest(), manager.get_best(), manager.newest_intact()) == (None, None, (None, []))
        with pytest.raises(CheckpointNotFoundError, match="file"):
            manager.load(folder / "file")
    assert names(tmp_path) == ["file"]


def test_newest_intact_skips_a_damaged_checkpoint(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    newest = save_steps(manager, 3)
    flip_first_bit(newest / "training.safetensors")
    with pytest.raises(CheckpointError, match=r"training\.safetensors"):
        manager.load(newest)
    path, (reason,) = manager.newest_intact()
    assert path == tmp_path / "step_1"
    assert manager.load(path)["step"] == 1
    assert "step_2: training.safetensors" in reason


def test_newest_intact_prefers_finite_weights(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save({"model_state_dict": {"w": torch.tensor([1.0, -math.inf])}}, "finite")
    manager.save({"model_state_dict": {"w": torch.tensor([1.0, math.nan])}}, "nan")
    manager.save({"optimizer_state_dict": {"m": torch.tensor([math.inf])}}, "inf")
    path, reasons = manager.newest_intact()
    assert (path, len(reasons)) == (tmp_path / "finite", 2)
    flip_first_bit(tmp_path / "finite" / "state.json")
    assert manager.newest_intact()[0] == tmp_path / "inf"


# ---- a stranger's checkpoint with a correct manifest -------------------------------------------------------------


def test_load_refuses_a_pickle_and_does_not_run_it(tmp_path: Path) -> None:
    for file in FILES[:3]:
        path = CheckpointManager(tmp_path).save(state())
        # A pickle that makes a folder when it is loaded.
        (path / file).write_bytes(b"cos\nmkdir\n(V" + bytes(tmp_path / "ran") + b"\ntR.")
        make_true(path)
        with pytest.raises(CheckpointError):
            CheckpointManager(tmp_path).load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("failing", ["write", "rename"])
def test_save_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    manager = CheckpointManager(tmp_path, keep_last_n=1)
    save_steps(manager, 1)
    before, rename, files = contents(tmp_path), Path.rename, {}

    def fail_once(self: Path, target: Path) -> Path:
        if self.name.startswith(".staging-"):
            raise OSError("no")
        return rename(self, target)

    if failing == "rename":
        monkeypatch.setattr(Path, "rename", fail_once)
    else:
        files["n" * 300] = "a name longer than file systems take"
    with pytest.raises(CheckpointError):
        manager.save(state(2), "step_0", files=files)
    assert contents(tmp_path) == before
    assert names(tmp_path) == ["step_0"]
