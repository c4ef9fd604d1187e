"""Checkpoints: what is saved comes back bit for bit, whole or not at all, and rotation follows the disk."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.errors import CheckpointError, CheckpointNotFoundError, ConfigError

FILES = ("model.safetensors", "training.safetensors", "state.json", "config.json", "manifest.json")
DTYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8",
    "uint8", "bool",
)  # fmt: skip


def state(step: int = 0) -> dict[str, Any]:
    return {"model_state_dict": {"w": torch.full((3, 2), float(step))}, "step": step, "moment": torch.ones(4)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def round_trip(folder: Path, value: Any) -> Any:
    manager = CheckpointManager(folder)
    return manager.load(manager.save({"value": value}))["value"]


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (got, expected)]
    assert torch.equal(*as_bytes)


# ---- what comes back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    shapes = ((), (0,), (3, 0, 2), (1,), (3, 5), (2, 3, 4))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(0, 99, shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes]
    for got, expected in zip(round_trip(tmp_path, tensors), tensors, strict=True):
        assert_same_bits(got, expected)


def test_non_finite_and_signed_zero_elements_come_back(tmp_path: Path) -> None:
    expected = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    assert_same_bits(round_trip(tmp_path, expected), expected)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        -1,
        2**80,
        0.1,
        1 / 3,
        -0.0,
        5e-324,
        math.inf,
        -math.inf,
        math.nan,
        "",
        "Привет, 世界 \0 \ud800 \n",
    ],
)
def test_plain_values_come_back_with_their_type(tmp_path: Path, value: Any) -> None:
    got = round_trip(tmp_path, value)
    assert type(got) is type(value)
    assert repr(got) == repr(value)


def test_nested_containers_come_back_in_their_order_and_type(tmp_path: Path) -> None:
    value = {
        "z": [],
        "a": {"empty": {}, "ключ": (1, [2, (3.5, None)], ()), "": "", "a.b/c": [{"x": "__float__"}]},
        "list": [torch.tensor(1), "two", (torch.tensor([3.0]), {"four": torch.tensor(True)})],
    }
    got = round_trip(tmp_path, value)
    assert repr(got) == repr(value)


def test_equal_tensors_come_back_in_memory_of_their_own(tmp_path: Path) -> None:
    got = round_trip(tmp_path, [torch.zeros(3), torch.zeros(3)])
    got[0].fill_(1)
    assert torch.equal(got[1], torch.zeros(3))


@pytest.mark.parametrize(
    "value",
    [
        {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}},
        {"": {"x": torch.tensor(1)}, "x": torch.tensor(2)},
        {"a": [torch.tensor(1)], "a/0": torch.tensor(2)},
        {"__metadata__": torch.tensor(1)},
    ],
)
def test_no_key_confuses_one_tensor_with_another(tmp_path: Path, value: dict[str, Any]) -> None:
    manager = CheckpointManager(tmp_path)
    assert repr(manager.load(manager.save(value))) == repr(value)


def test_a_tied_weight_is_stored_once_and_comes_back_under_both_names(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(64, 32))
    manager = CheckpointManager(tmp_path)
    path = manager.save({"model_state_dict": {"table": weight, "head": weight}, "copy": weight})
    got = manager.load(path)
    for tensor in (*got["model_state_dict"].values(), got["copy"]):
        assert_same_bits(tensor, weight.detach())
    assert list(load_file(path / "model.safetensors")) == ["table"]
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) < 1.5 * weight.nbytes


def test_a_weight_shared_with_the_rest_of_the_state_is_in_the_model_file(tmp_path: Path) -> None:
    weight = torch.ones(3)
    path = CheckpointManager(tmp_path).save({"average": {"w": weight}, "model_state_dict": {"w": weight}})
    assert torch.equal(load_file(path / "model.safetensors")["w"], weight)


@pytest.mark.parametrize(
    "view",
    [
        lambda base: base.T,
        lambda base: base[::2, 1:],
        lambda base: base[3],
        lambda base: base.expand(2, 6, 8),
        lambda base: base.as_strided((4, 4), (1, 1)),
        lambda base: base.flip(0),
    ],
)
def test_views_come_back_as_what_they_show_and_drag_nothing_along(tmp_path: Path, view: Callable[..., Tensor]) -> None:
    base = torch.arange(48.0).reshape(6, 8)
    got = round_trip(tmp_path, [base, view(base), view(base)[..., :1]])
    for tensor, expected in zip(got, (base, view(base), view(base)[..., :1]), strict=True):
        assert_same_bits(tensor, expected)


def test_views_that_read_one_memory_in_different_ways_stay_apart(tmp_path: Path) -> None:
    base = torch.arange(9.0).reshape(3, 3)
    expected = [base, base.T, base.view(torch.int32)]
    for got, tensor in zip(round_trip(tmp_path, expected), expected, strict=True):
        assert_same_bits(got, tensor)


def test_a_small_view_of_a_large_tensor_is_stored_small(tmp_path: Path) -> None:
    path = CheckpointManager(tmp_path).save({"view": torch.zeros(100_000)[:10]})
    assert (path / "training.safetensors").stat().st_size < 1000


def test_further_files_are_stored_as_given(tmp_path: Path) -> None:
    path = CheckpointManager(tmp_path).save(state(), files={"config.json": "{}\n", "tokenizer.json": "«é»"})
    assert (path / "config.json").read_text(encoding="utf-8") == "{}\n"
    assert (path / "tokenizer.json").read_text(encoding="utf-8") == "«é»"


def test_no_file_is_a_pickle_or_an_archive(tmp_path: Path) -> None:
    contents = everything(CheckpointManager(tmp_path).save(state(), files={"config.json": "{}"}))
    assert sorted(contents) == sorted(FILES)
    for name, content in contents.items():
        assert not content.startswith((b"\x80", b"PK")), name


def test_a_checkpoint_is_as_open_to_others_as_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    path = CheckpointManager(tmp_path).save(state())
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


# ---- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, {"b": object()}]}, r"^value/a/1/b is a builtins\.object"),
        ({"a": {1, 2}}, r"^value/a is a builtins\.set"),
        ([np.int64(3)], r"^value/0 is a numpy\.int64"),
        ([np.float32(3)], r"^value/0 is a numpy\.float32"),
        (np.zeros(2), r"^value is a numpy\.ndarray"),
        (b"text", r"^value is a builtins\.bytes"),
        (Path("text"), r"^value is a pathlib\."),
        ({"a": {0: 1}}, r"^value/a has the key 0"),
        ({"a": {None: 1}}, r"^value/a has the key None"),
        ({"a": {"__tensor__": "w"}}, r"^value/a has the key '__tensor__'"),
    ],
)
def test_what_neither_tensor_nor_json_can_hold_is_refused_by_its_path(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CheckpointManager(tmp_path / "new").save({"value": value})
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["../x", "/x", "", ".", "..", ".x", "a/b", "a\\b", "a b", "x\n", "é", "a:b"])
def test_a_name_that_could_leave_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    manager = CheckpointManager(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="the name is"):
        manager.save(state(), name)
    with pytest.raises(CheckpointError, match="the name is"):
        manager.save(state(), files={name: "text"})
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", sorted(set(FILES) - {"config.json"}))
def test_a_further_file_cannot_take_the_place_of_ours(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        CheckpointManager(tmp_path).save(state(), files={name: "text"})


@pytest.mark.parametrize("keep", [0, -1, math.nan])
def test_keeping_fewer_than_one_is_refused(tmp_path: Path, keep: int) -> None:
    with pytest.raises(ConfigError, match=r"keep_last_n is .*; allowed: at least 1"):
        CheckpointManager(tmp_path, keep)


# ---- whole or not there --------------------------------------------------------------------------------------


def test_a_value_that_cannot_be_saved_leaves_everything_as_it_was(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last_n=1)
    manager.save(state(1), "step_1")
    before = everything(tmp_path)
    for name in ("step_1", "step_2"):
        with pytest.raises(CheckpointError):
            manager.save({**state(2), "bad": object()}, name)
    assert everything(tmp_path) == before
    assert names(tmp_path) == ["step_1"]


def test_a_file_that_cannot_be_written_leaves_everything_as_it_was(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last_n=1)
    manager.save(state(1), "step_1")
    before = everything(tmp_path)
    for name in ("step_1", "step_2"):
        with pytest.raises(CheckpointError, match="cannot write checkpoint"):
            manager.save(state(2), name, files={"n" * 300: "a name longer than file systems take"})
    assert everything(tmp_path) == before
    assert names(tmp_path) == ["step_1"]


def test_a_file_in_the_place_of_the_folder_is_reported_and_kept(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    manager = CheckpointManager(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint 'step_1' in .*checkpoints"):
        manager.save(state(), "step_1")
    assert (tmp_path / "checkpoints").read_text() == "mine"
    assert (manager.get_latest(), manager.get_best(), manager.newest_intact()) == (None, None, (None, []))


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(state(1), "best", files={"old.json": "{}"})
    path = manager.save(state(2), "best")
    assert names(tmp_path) == ["best"]
    assert manager.load(path)["step"] == 2
    assert not (path / "old.json").exists()


@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors"])
def test_a_damaged_checkpoint_of_the_same_name_is_set_aside_and_kept(tmp_path: Path, file: str) -> None:
    manager = CheckpointManager(tmp_path)
    (manager.save(state(1), "step_1") / file).unlink()
    assert manager.load(manager.save(state(2), "step_1"))["step"] == 2
    saved, set_aside = names(tmp_path)
    assert saved == "step_1"
    assert set_aside.startswith("step_1~damaged-")
    assert file not in names(tmp_path / set_aside)
    assert "state.json" in names(tmp_path / set_aside)
    assert manager.newest_intact()[1] == []


def test_the_best_can_be_saved_as_best_again_and_again(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last_n=1)
    for step in (1, 2, 3):
        path = manager.save(state(step), name="best", is_best=True)
        assert manager.get_best() == path == tmp_path / "best"
        assert manager.load(path)["step"] == step
    assert names(tmp_path) == ["best"]


# ---- saving in the background ------------------------------------------------------------------------------------


class Gate:
    """Holds the writing of checkpoints back until it is opened, and knows how many are being written at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        self.writing, self.most = 0, 0
        write = CheckpointManager._write

        def gated(manager: CheckpointManager, snapshot: Any) -> None:
            self.writing += 1
            self.most = max(self.most, self.writing)
            self.entered.set()
            assert self.opened.wait(60)
            write(manager, snapshot)
            self.writing -= 1

        monkeypatch.setattr(CheckpointManager, "_write", gated)


def test_a_snapshot_is_not_changed_by_what_happens_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, through a view, through a tied name, in nested containers: the training goes on while it is written."""
    gate, manager = Gate(monkeypatch), CheckpointManager(tmp_path)
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


def test_the_next_save_in_the_background_copies_to_the_same_memory(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last_n=9)
    for step, shape in enumerate([(3, 2), (3, 2), (2, 2)]):  # the last one does not fit
        before = manager._buffers
        manager.save_in_background(
            {"value": {"a": torch.full(shape, float(step)), "b": torch.tensor(step)}}, f"s{step}"
        )
        assert (step == 0) or manager._buffers["value/b"].data_ptr() == before["value/b"].data_ptr()
    manager.wait()
    for step, shape in enumerate([(3, 2), (3, 2), (2, 2)]):
        saved = manager.load(tmp_path / f"s{step}")["value"]
        assert torch.equal(saved["a"], torch.full(shape, float(step)))
        assert saved["b"].item() == step


def test_one_checkpoint_at_a_time_is_written_in_the_order_of_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, manager = Gate(monkeypatch), CheckpointManager(tmp_path, 9)
    manager.save_in_background(state(1), "z")
    assert gate.entered.wait(60)
    gate.opened.set()
    manager.save_in_background(state(2), "y")
    manager.save(state(3), "x")
    assert manager.get_latest() == tmp_path / "x"
    manager.save_in_background(state(4), "w")
    manager.wait()
    assert gate.most == 1
    sequence = {
        name: json.loads((tmp_path / name / "manifest.json").read_text())["sequence"] for name in names(tmp_path)
    }
    assert sorted(sequence, key=sequence.__getitem__) == ["z", "y", "x", "w"]


def test_an_error_of_the_background_is_raised_once_and_by_whoever_asks_next(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    (tmp_path / "taken").mkdir()
    for ask in (manager.wait, lambda: manager.save(state(), "a"), lambda: manager.save_in_background(state(), "a")):
        manager.save_in_background(state(), "taken")
        with pytest.raises(CheckpointError, match="taken is in the way"):
            ask()
        assert not manager.has_failed
        manager.wait()
    assert names(tmp_path) == ["taken"]
    assert manager.save(state(), "a").name == "a"


def test_what_cannot_be_saved_is_refused_before_the_background(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    with pytest.raises(CheckpointError, match=r"x is a builtins\.object"):
        manager.save_in_background({"x": object()}, "a")
    manager.wait()
    assert names(tmp_path) == []


# ---- rotation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_are_kept_and_older_ones_deleted(tmp_path: Path, keep: int) -> None:
    manager = CheckpointManager(tmp_path, keep)
    for step in range(6):
        manager.save(state(step), f"step_{step}")
        assert names(tmp_path) == [f"step_{i}" for i in range(max(0, step + 1 - keep), step + 1)]


def test_age_is_the_order_of_saving_and_not_of_names(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, 2)
    for name in ("z", "a", "m", "b"):
        path = manager.save(state(), name)
        assert manager.get_latest() == path
    assert names(tmp_path) == ["b", "m"]


def test_the_best_is_never_rotated_out(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, 2)
    for step in range(8):
        manager.save(state(step), f"step_{step}", is_best=step == 1)
    assert names(tmp_path) == ["step_1", "step_6", "step_7"]
    assert manager.get_best() == tmp_path / "step_1"


def test_a_former_best_is_rotated_out_like_any_other(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, 1)
    for step in range(6):
        manager.save(state(step), f"step_{step}", is_best=step in (1, 3))
    assert names(tmp_path) == ["step_3", "step_5"]


def test_rotation_goes_on_after_a_restart_and_deletes_all_that_are_stale(tmp_path: Path) -> None:
    for step in range(6):
        CheckpointManager(tmp_path, 10).save(state(step), f"step_{step}", is_best=step == 2)
    manager = CheckpointManager(tmp_path, 2)
    assert len(names(tmp_path)) == 6
    manager.save(state(6), "step_6")
    assert names(tmp_path) == ["step_2", "step_5", "step_6"]
    assert CheckpointManager(tmp_path).get_latest() == tmp_path / "step_6"


def test_what_is_not_a_checkpoint_of_ours_is_never_touched(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    CheckpointManager(outside).save(state(), "theirs")
    folder = tmp_path / "checkpoints"
    (folder / "notes").mkdir(parents=True)
    (folder / "notes" / "a.txt").write_text("mine")
    (folder / "step_0").write_text("mine")
    (folder / "step_00").mkdir()
    (folder / "step_00" / "model.safetensors").write_bytes(b"no manifest")
    (folder / "torn").mkdir()
    (folder / "torn" / "manifest.json").write_text('{"format_version": 1, "files"')
    (folder / "linked").symlink_to(outside / "theirs")
    before, listed = everything(folder), names(folder)
    manager = CheckpointManager(folder, 1)
    for step in (1, 2, 3):
        manager.save(state(step), f"step_{step}")
    assert names(folder) == sorted([*listed, "step_3"])
    after = everything(folder)
    assert {name: after[name] for name in before} == before
    assert names(outside) == ["theirs"]


@pytest.mark.parametrize("foreign", ["folder", "file"])
def test_saving_does_not_take_the_place_of_what_is_not_a_checkpoint(tmp_path: Path, foreign: str) -> None:
    mine = tmp_path / "best" / "thesis.tex" if foreign == "folder" else tmp_path / "best"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(CheckpointError, match="best"):
        CheckpointManager(tmp_path).save(state(), "best")
    assert mine.read_text() == "mine"
    assert names(tmp_path) == ["best"]


# ---- finding and loading -------------------------------------------------------------------------------------


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        manager = CheckpointManager(folder)
        assert (manager.get_latest(), manager.get_best(), manager.newest_intact()) == (None, None, (None, []))
    assert not (tmp_path / "missing").exists()


def test_a_missing_checkpoint_is_a_file_not_found_error(tmp_path: Path) -> None:
    assert issubclass(CheckpointNotFoundError, FileNotFoundError)
    (tmp_path / "file").touch()
    for name in ("missing", "file"):
        with pytest.raises(CheckpointNotFoundError, match=f"{name}: there is no checkpoint directory"):
            CheckpointManager(tmp_path).load(tmp_path / name)


def test_a_checkpoint_loads_from_wherever_it_lies(tmp_path: Path) -> None:
    path = CheckpointManager(tmp_path / "a").save(state(3))
    moved = path.rename(tmp_path / "moved away")
    assert CheckpointManager(tmp_path / "b").load(str(moved))["step"] == 3


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[0] ^= 4
    file.write_bytes(content)


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"}")


def link_elsewhere(file: Path) -> None:
    file.symlink_to(file.rename(file.parent.parent / "elsewhere"))


def link_to_nothing(file: Path) -> None:
    file.unlink()
    file.symlink_to("nothing")


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = (truncate, empty, flip_a_bit, append, link_elsewhere, link_to_nothing, make_folder, Path.unlink)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_any_damage_to_any_file_is_found_and_the_file_named(
    tmp_path: Path, damage: Callable[[Path], None], file: str
) -> None:
    manager = CheckpointManager(tmp_path / "checkpoints")
    path = manager.save(state(), files={"config.json": '{"model_type": "llama"}'})
    damage(path / file)
    with pytest.raises(CheckpointError, match=file):
        manager.load(path)


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    path = manager.save(state())
    content = (path / "manifest.json").read_bytes()
    unnoticed = []
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1
        (path / "manifest.json").write_bytes(damaged)
        try:
            manager.load(path)
        except CheckpointError:
            continue
        unnoticed.append(content[:index].decode().splitlines()[-1])
    assert unnoticed == []


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink], ids=lambda damage: damage.__name__)
def test_the_newest_intact_checkpoint_is_loaded_and_the_damage_told(
    tmp_path: Path, damage: Callable[[Path], None], file: str
) -> None:
    manager = CheckpointManager(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        newest = manager.save(state(step), f"step_{step}", files={"config.json": '{"model_type": "llama"}'})
    damage(newest / file)
    path, reasons = manager.newest_intact()
    assert path == tmp_path / "checkpoints" / "step_2"
    assert manager.load(path)["step"] == 2
    assert len(reasons) == 1
    assert "step_3" in reasons[0]
    assert file in reasons[0]


def test_an_intact_checkpoint_is_loaded_without_complaint(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for step in (1, 2):
        manager.save(state(step), f"step_{step}")
    path, reasons = manager.newest_intact()
    assert (path, reasons) == (tmp_path / "step_2", [])


def test_with_nothing_intact_there_are_only_reasons(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for step, file in enumerate(FILES[:3]):
        empty(manager.save(state(step), f"step_{step}") / file)
    path, reasons = manager.newest_intact()
    assert (path, len(reasons)) == (None, 3)


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """What somebody could write who knows the format: its own checksum is right."""
    manifest = {**json.loads((path / "manifest.json").read_text()), **changes}
    del manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}))


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", ".x", "", "a/b"])
def test_a_manifest_that_names_a_file_outside_is_refused(tmp_path: Path, name: str) -> None:
    manager = CheckpointManager(tmp_path)
    path = manager.save(state())
    (tmp_path / "x").write_bytes(b"text")
    files = json.loads((path / "manifest.json").read_text())["files"]
    entry = {"size": 4, "sha256": hashlib.sha256(b"text").hexdigest()}
    rewrite_manifest(path, files={**files, name: entry})
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        manager.load(path)


@pytest.mark.parametrize(
    "changes",
    [{"files": {}}, {"files": []}, {"files": None}, {"sequence": "1"}, {"sequence": None}, {"is_best": "yes"}],
)
def test_a_manifest_of_another_form_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    manager = CheckpointManager(tmp_path)
    path = manager.save(state())
    rewrite_manifest(path, **changes)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        manager.load(path)


def test_another_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    path = manager.save(state())
    rewrite_manifest(path, format_version=3)
    with pytest.raises(CheckpointError, match=r"its format is 3; allowed: 2\. Use the version of fundamentallm"):
        manager.load(path)


@pytest.mark.parametrize("file", FILES[:3])
def test_a_pickle_under_a_true_manifest_is_refused_and_not_run(tmp_path: Path, file: str) -> None:
    manager = CheckpointManager(tmp_path)
    path = manager.save(state())
    content = b"cos\nmkdir\n(V" + bytes(tmp_path / "ran") + b"\ntR."  # a pickle that makes a folder when it is opened
    (path / file).write_bytes(content)
    files = json.loads((path / "manifest.json").read_text())["files"]
    files[file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite_manifest(path, files=files)
    with pytest.raises(CheckpointError, match=file):
        manager.load(path)
    assert not (tmp_path / "ran").exists()


def test_a_state_that_points_to_no_tensor_is_refused(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    path = manager.save(state())
    text = (path / "state.json").read_text().replace("moment", "momenta").encode()
    (path / "state.json").write_bytes(text)
    files = json.loads((path / "manifest.json").read_text())["files"]
    files["state.json"] = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    rewrite_manifest(path, files=files)
    with pytest.raises(CheckpointError, match=r"state\.json does not fit the tensors.*momenta"):
        manager.load(path)
