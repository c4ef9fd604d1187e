"""Any checkpoint from a stranger or a broken disk loads, or is one of our errors: no other exception, no hang, no code
that runs, no file outside that changes.

`HYPOTHESIS_PROFILE=thorough` tries 250 times as many.
"""

import atexit
import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from fundamentallm import Config, LoggingCallback, ModelConfig, SaveBestCallback
from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.checkpoint.reading import explained
from fundamentallm.commands import checkpoints, evaluate, generate
from fundamentallm.errors import CheckpointError, FundamentaLLMError
from fundamentallm.run.resume import open_pretrained
from tests.conftest import reset_accelerate
from tests.integration.runs import make_config, make_trainer
from tests.unit.checkpoint_files import make_true, pairs, write_manifest
from tests.unit.test_hostile_input import numbers, scaled, time_limit

FILES = ("model.safetensors", "training.safetensors", "state.json", "config.json", "tokenizer.json", "manifest.json")
RUN: dict[str, Any] = {
    "optimizer": "muon", "max_steps": 4, "save_every_n_steps": 2, "early_stopping_patience": 9, "eval_every_n_steps": 1,
    "skip_spikes_above": 9.0,
}  # fmt: skip


def train(folder: Path) -> None:
    reset_accelerate()
    callbacks = [LoggingCallback(folder / "metrics.jsonl"), SaveBestCallback()]
    make_trainer(make_config(folder, **RUN), characters=900, callbacks=callbacks).train()


@functools.cache
def real_run() -> Path:
    """Returns the folder of a run after step 3 of 4, with the checkpoints of steps 2 and 3."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    train(folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    assert sorted(path.name for path in (folder / "checkpoints").glob("step*")) == ["step_00000002", "step_00000003"]
    return folder


@contextlib.contextmanager
def copy_of_run() -> Iterator[Path]:
    """Yields a copy of the run beside a file that nothing may change."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(real_run(), Path(folder) / "run")
        outside = Path(folder) / "outside"
        outside.write_text("mine")
        outside.chmod(0o644)
        yield Path(folder) / "run"
        assert outside.read_text() == "mine"
        assert {path.name for path in Path(folder).iterdir()} == {"run", "outside"}


def assert_opens_or_is_refused(run: Path) -> None:
    """Every way to open the run's checkpoints works or raises one of our errors."""
    checkpoints = run / "checkpoints"
    manager = CheckpointManager(checkpoints)
    with time_limit():
        manager.get_best()
        manager.get_latest()
        manager.newest_intact()
        for path in sorted(checkpoints.glob("step*")):
            with contextlib.suppress(CheckpointError):
                assert isinstance(manager.load(path), dict)
        with contextlib.suppress(FundamentaLLMError):
            train(run)


def paths_in(document: Any) -> st.SearchStrategy[tuple[Any, ...]]:
    """A path into a JSON document: each child of a level is as likely as the others."""
    if not isinstance(document, (dict, list)) or not document:
        return st.just(())
    keys = sorted(document) if isinstance(document, dict) else range(len(document))
    deeper = st.sampled_from(keys).flatmap(lambda key: paths_in(document[key]).map(lambda rest: (key, *rest)))
    return deeper if len(document) > 1 else deeper | st.just(())


TENSOR_NAMES = st.sampled_from(
    ["model_state_dict/norm.weight", "progress_state_dict/tokens", "guard_state_dict/counts", "guard_state_dict/recent"]
) | st.text(max_size=3)
json_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | numbers
json_values = st.recursive(
    json_scalars
    | st.builds(lambda name: {"__tensor__": name}, TENSOR_NAMES)
    | st.builds(lambda value: {"__float__": value}, json_scalars),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        | st.builds(lambda value: {"__tuple__": value}, inner)
    ),
    max_leaves=6,
)
DELETED = object()
checkpoint_names = st.sampled_from(["step_00000002", "step_00000003"])


def put(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Returns the document with another value at a path, or without what was there."""
    if not path:
        return {} if value is DELETED else value
    *parents, last = path
    target = document
    for key in parents:
        target = target[key]
    if value is DELETED:
        del target[last]
    else:
        target[last] = value
    return document


@scaled(0.3)
@given(st.data())
def test_resume_of_any_json_works_or_is_refused(data: st.DataObject) -> None:
    """Also with a correct manifest: the author knows the format."""
    with copy_of_run() as run:
        file = run / "checkpoints/step_00000003" / data.draw(st.sampled_from(["state.json", "manifest.json"]))
        document = json.loads(file.read_text())
        for _ in range(data.draw(st.integers(1, 2))):
            path = data.draw(paths_in(document))
            document = put(document, path, data.draw(json_values | st.just(DELETED)))
        file.write_text(json.dumps(document))
        if file.name == "state.json":
            make_true(file.parent)
        elif data.draw(st.booleans()) and isinstance(document, dict):
            write_manifest(file.parent, document)
        assert_opens_or_is_refused(run)


@scaled(0.15)
@given(st.data())
def test_resume_of_any_bytes_works_or_is_refused(data: st.DataObject) -> None:
    with copy_of_run() as run:
        folder = run / "checkpoints" / data.draw(checkpoint_names)
        file = folder / data.draw(st.sampled_from(FILES))
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            # Most of the structure is in the first bytes: lengths, and the header of tensors.
            start = data.draw(st.integers(0, 200) | st.integers(0, len(content)))
            content[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
        file.write_bytes(content)
        if file.name != "manifest.json":
            make_true(folder)
        assert_opens_or_is_refused(run)


KINDS = (
    *("pipe", "folder", "link to nothing", "link to itself", "link outside", "link to the moved one", "nothing"),
    "device",
)
NAMES = (*FILES, "", "~", "../.fundamentallm.lock", ".staging-x-0123456789ab", ".replaced-x-0123456789ab")


def replace(path: Path, kind: str, outside: Path) -> None:
    """Replace a file or folder by something else."""
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(path.name + "-moved"))
    else:
        path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "nothing":
        targets = {"link to nothing": "nothing", "link to itself": path.name, "link outside": outside}
        path.symlink_to({**targets, "link to the moved one": f"{path.name}-moved", "device": "/dev/null"}[kind])


@pytest.mark.parametrize(("kind", "name"), sorted({*pairs(KINDS, NAMES), ("link outside", "manifest.json")}))
def test_resume_with_anything_in_place_of_a_file(kind: str, name: str) -> None:
    with copy_of_run() as run:
        checkpoints = run / "checkpoints"
        path = checkpoints / "step_00000003" / name if name in FILES else checkpoints / (name or "step_00000003")
        replace(path, kind, run.parent / "outside")
        assert_opens_or_is_refused(run)


DEEP = "[" * 100_000
TEXTS = ("config.json", "tokenizer.json", "generation_config.json", "state.json", "manifest.json")
IN_CONFIG = [
    ("num_attention_heads", 0), ("num_attention_heads", "two"), ("hidden_size", -16), ("vocab_size", 10**30),
    ("rope_parameters", "none"), ("max_position_embeddings", -1), ("eos_token_id", {"a": [1]}), ("layer_types", 7),
    ("model_type", "gpt2"), ("model_type", ["qwen3"]), ("architectures", 3), ("rms_norm_eps", None),
]  # fmt: skip
SPLIT = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
REPLACE = {"type": "Replace", "pattern": {"Regex": "(?<n>a)\\g<n>*"}, "content": "b"}
HOSTILE: list[tuple[str, Any]] = [
    *((file, DEEP) for file in TEXTS),
    *(("config.json", text) for text in ("[]", "{}", "\xff")),
    *(("config.json", {name: value}) for name, value in IN_CONFIG),
    *(("generation_config.json", value) for value in ("[1]", {"eos_token_id": [[1]]}, {"eos_token_id": "end"})),
    *(("tokenizer.json", value) for value in ({"pre_tokenizer": SPLIT}, {"decoder": REPLACE})),
]


@pytest.mark.parametrize(("file", "content"), HOSTILE)
def test_use_of_hostile_text_files_works_or_is_refused(file: str, content: Any) -> None:
    with copy_of_run() as run:
        checkpoint = run / "checkpoints" / "step_00000003"
        if isinstance(content, dict):
            path = checkpoint / file
            content = json.dumps((json.loads(path.read_text()) if path.exists() else {}) | content)
        (checkpoint / file).write_text(content, encoding="latin-1")
        if file != "manifest.json":
            make_true(checkpoint)
        text = run.parent / "run" / "text.txt"
        text.write_text("to be or not to be")
        for command, arguments in [
            (generate, ["--checkpoint", str(checkpoint), "--max_new_tokens", "2"]),
            (evaluate, ["--checkpoint", str(checkpoint), "--source", str(text)]),
            (checkpoints, ["show", "--checkpoint", str(checkpoint)]),
            (checkpoints, ["samples", "--checkpoint", str(checkpoint), "--step", "1"]),
        ]:
            with time_limit(), contextlib.suppress(FundamentaLLMError):
                command.main(arguments, "test")
        with time_limit(), contextlib.suppress(FundamentaLLMError):
            open_pretrained(Config(model=ModelConfig(pretrained=str(checkpoint))))


def test_explained_takes_a_panic_but_no_interruption(tmp_path: Path) -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    for error, expected in ((panic("regex"), CheckpointError), (RecursionError(), CheckpointError)):
        with pytest.raises(expected), explained(tmp_path):
            raise error
    for passed in (KeyboardInterrupt, torch.OutOfMemoryError):
        with pytest.raises(passed), explained(tmp_path):
            raise passed
