"""Whatever a user, a stranger's checkpoint or a broken disk gives: it works, or it is one of our errors. Never another
exception, never a hang, never code that runs, never a file outside that changes.

`HYPOTHESIS_PROFILE=thorough` tries a hundred times as much.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fundamentallm import LoggingCallback, SaveBestCallback
from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.config.command_line import parse_config
from fundamentallm.config.command_line import settings as all_settings
from fundamentallm.config.schema import Config
from fundamentallm.config.validation import from_dict
from fundamentallm.config.yaml_format import to_yaml
from fundamentallm.errors import CheckpointError, ConfigError, FundamentaLLMError
from tests.conftest import reset_accelerate
from tests.integration.runs import make_config, make_trainer
from tests.unit.checkpoint_files import make_true, write_manifest

SETTINGS = [name for name, _, _, _ in all_settings(Config)]
SECTIONS = ("model", "data", "training")


class Hangs(BaseException):
    """No Exception, so that nothing takes it for a mistake of the input."""


@contextlib.contextmanager
def time_limit(seconds: float = 60) -> Iterator[None]:
    """What takes longer than anything here may on a busy machine is a hang, and ends with the place it hangs at."""

    def end(number: int, frame: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def scaled(share: float) -> Callable[[Any], Any]:
    """A share of the profile's number of examples, for tests whose examples are dear or cheap."""
    return settings(max_examples=max(1, int(settings.default.max_examples * share)))


# ---- settings and command lines -------------------------------------------------------------------------------

# A user's own config needs no defence against its author: no recursive aliases, no control characters in paths, and no
# patterns that mean half the disk.
harmless = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/~*.\0"), max_size=20)
numbers = (
    st.integers()
    | st.floats()
    | st.sampled_from([10**400, -(10**400), 2**63, 0, -1, math.nan, math.inf, 5e-324, 1.7e308])
)
scalars = st.none() | st.booleans() | numbers | harmless
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(harmless | scalars, inner, max_size=3)
)
names = st.sampled_from([*SETTINGS, *SECTIONS, "training.lr", "", "."]) | harmless

YAML_WORDS = [
    *(name.rpartition(".")[2] for name in SETTINGS), *SECTIONS,
    *(":", ": ", "- ", "\n", "\n  ", "\t", "{", "}", "[", "]", ", ", "? ", "| ", ">", "#", "'", '"', "---", "&a "),
    *("<<: ", "!!int ", "!!float ", "!!bool ", "!!null ", "!!timestamp ", "!!set ", "!!python/name:os.system "),
    *("%YAML 1.1\n", "%TAG", "0x", "0o", "1e", ".inf", "12:30", "=", "~", "null", "no", "1_0", "\ud800", "\0", "!x "),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(*arguments: str) -> None:
    """Parse a command line; it may be refused by a ConfigError, or print and exit with 0."""
    with time_limit(), contextlib.redirect_stdout(io.StringIO()):
        code: object = 0
        try:
            parse_config(arguments)
        except ConfigError:
            pass
        except SystemExit as raised:
            code = raised.code
        assert code == 0


@scaled(0.4)
@given((st.lists(st.sampled_from(YAML_WORDS) | st.text(max_size=3), max_size=25).map("".join)) | st.binary(max_size=60))
@example("a: &a !!timestamp x")
@example("a: !!bool x")
@example("a: !!float ''")
def test_parse_config_of_any_file_is_a_config_or_a_config_error(folder: Path, content: str | bytes) -> None:
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    (folder / "config.yaml").write_bytes(raw)
    parse("--config", "config.yaml", "--print_config")


def in_sections(given: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in given.items():
        section, _, key = name.rpartition(".")
        target = nested.setdefault(section, {}) if section else nested
        if isinstance(target, dict):
            target[key] = value
    return nested


@scaled(0.3)
@given(st.dictionaries(names, values, max_size=6).map(in_sections))
def test_parse_config_of_any_values_is_a_config_or_a_config_error(folder: Path, nested: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        from_dict(Config, nested)
    (folder / "config.yaml").write_text(to_yaml(nested), encoding="utf-8")
    parse("--config", "config.yaml", "--print_config")


@scaled(0.5)
@given(
    st.lists(
        st.builds(lambda name, value: f"--{name}={value}", names, harmless | values.map(repr))
        | st.builds("--{}".format, names)
        | st.sampled_from(["--help", "-h", "--print_config", "--config", "--", "-", "--config=config.yaml", "--="])
        | harmless,
        max_size=6,
    )
)
@example(["--config", "a" * 5000])
@example(["--output_dir", "a" * 5000])
def test_parse_config_of_any_command_line_is_a_config_or_a_config_error(folder: Path, arguments: list[str]) -> None:
    (folder / "config.yaml").write_text("training: {seed: 1}")
    parse(*arguments)


def test_no_tag_of_yaml_runs_code(folder: Path) -> None:
    for tag in ("!!python/object/apply:os.mkdir [ran]", "!!python/object/new:os.mkdir [ran]", "!!python/name:os.mkdir"):
        (folder / "config.yaml").write_text(f"output_dir: {tag}")
        with pytest.raises(ConfigError):
            parse_config(["--config", "config.yaml"])
        parse(f"--output_dir={tag}", f"--training.loss_options={tag}")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_a_config_that_is_not_a_regular_file_is_refused(folder: Path, kind: str) -> None:
    path = folder / "config.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")  # stands for /dev/zero, which would fill the memory if this fails
    with time_limit(10), pytest.raises(ConfigError, match=r"config\.yaml"):
        parse_config(["--config", "config.yaml"])


# ---- checkpoints ----------------------------------------------------------------------------------------------

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
    """A run's folder that ended after step 3 of 4, with the checkpoints of steps 2 and 3."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    train(folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    assert sorted(path.name for path in (folder / "checkpoints").glob("step*")) == ["step_00000002", "step_00000003"]
    return folder


@contextlib.contextmanager
def copy_of_run() -> Iterator[Path]:
    """A copy of the run beside a file that nobody may touch."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(real_run(), Path(folder) / "run")
        outside = Path(folder) / "outside"
        outside.write_text("mine")
        outside.chmod(0o644)
        yield Path(folder) / "run"
        assert outside.read_text() == "mine"
        assert {path.name for path in Path(folder).iterdir()} == {"run", "outside"}


def opens_or_is_refused(run: Path) -> None:
    """Whoever opens the run's checkpoints gets them, or an error of ours."""
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


def places(document: Any) -> st.SearchStrategy[tuple[Any, ...]]:
    """A path into a JSON document: down a few levels, each child of a level as likely as the other."""
    if not isinstance(document, (dict, list)) or not document:
        return st.just(())
    keys = sorted(document) if isinstance(document, dict) else range(len(document))
    deeper = st.sampled_from(keys).flatmap(lambda key: places(document[key]).map(lambda rest: (key, *rest)))
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
GONE = object()


def put(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at a place, or without what was there."""
    if not place:
        return {} if value is GONE else value
    *path, last = place
    target = document
    for key in path:
        target = target[key]
    if value is GONE:
        del target[last]
    else:
        target[last] = value
    return document


checkpoint_names = st.sampled_from(["step_00000002", "step_00000003"])


@scaled(0.7)
@given(st.data())
def test_any_value_anywhere_in_a_state(data: st.DataObject) -> None:
    """The manifest is true: somebody has made this state on purpose."""
    with copy_of_run() as run:
        newest = run / "checkpoints" / "step_00000003"
        document = json.loads((newest / "state.json").read_text())
        for _ in range(data.draw(st.integers(1, 2))):
            place = data.draw(places(document))
            document = put(document, place, data.draw(json_values | st.just(GONE)))
        (newest / "state.json").write_text(json.dumps(document))
        make_true(newest)
        opens_or_is_refused(run)


@scaled(0.4)
@given(st.data())
def test_any_value_anywhere_in_a_manifest(data: st.DataObject) -> None:
    with copy_of_run() as run:
        path = run / "checkpoints" / data.draw(checkpoint_names)
        document = json.loads((path / "manifest.json").read_text())
        place = data.draw(places(document))
        names = st.sampled_from(["../outside", str(run.parent / "outside"), "a" * 300, "a\0", "manifest.json", "."])
        entry = {"size": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}
        if data.draw(st.booleans()):
            document["files"][data.draw(names)] = entry
        else:
            document = put(document, place, data.draw(json_values | st.just(GONE)))
        if data.draw(st.booleans()) and isinstance(document, dict):
            write_manifest(path, document)
        else:
            (path / "manifest.json").write_text(json.dumps(document))
        opens_or_is_refused(run)


@scaled(0.4)
@given(st.data())
def test_any_bytes_in_any_file(data: st.DataObject) -> None:
    with copy_of_run() as run:
        path = run / "checkpoints" / data.draw(checkpoint_names)
        file = path / data.draw(st.sampled_from(FILES))
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            # The first bytes are the dense ones: lengths, and the header of tensors.
            start = data.draw(st.integers(0, 200) | st.integers(0, len(content)))
            content[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
        file.write_bytes(content)
        if file.name != "manifest.json":
            make_true(path)
        opens_or_is_refused(run)


sizes = st.integers(-2, 2**65) | st.sampled_from([0, 1, 2**31, 2**63, 2**64])
headers = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(
            ["F32", "F64", "I64", "U64", "BOOL", "BF16", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "C64", "x", "", None]
        ),
        "shape": st.lists(sizes, max_size=3) | json_values,
        "data_offsets": st.tuples(sizes, sizes) | json_values,
    }
)


@scaled(0.6)
@given(st.data())
def test_any_header_of_tensors(data: st.DataObject) -> None:
    with copy_of_run() as run:
        path = run / "checkpoints" / data.draw(checkpoint_names)
        file = path / data.draw(st.sampled_from(FILES[:2]))
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        name = data.draw(st.sampled_from(sorted(header)))
        header[name] = data.draw(headers | json_values)
        if data.draw(st.booleans()):  # a header that fits the bytes behind it
            header = {name: {"dtype": "F32", "shape": data.draw(st.lists(sizes, max_size=3)), "data_offsets": [0, 0]}}
            content = content[:end]
        text = json.dumps(header).encode()
        length = data.draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
        file.write_bytes(length.to_bytes(8, "little") + text + content[end:])
        make_true(path)
        opens_or_is_refused(run)


KINDS = (
    "pipe",
    "folder",
    "link to nothing",
    "link to itself",
    "link outside",
    "link to its like",
    "nothing",
    "device",
)


def replace(path: Path, kind: str, outside: Path) -> None:
    """Let something else be where a file or folder was."""
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
        path.symlink_to({**targets, "link to its like": f"{path.name}-moved", "device": "/dev/null"}[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", [*FILES, "", "~", "../.fundamentallm.lock", ".staging-x-0123456789ab", ".replaced-x-0123456789ab"]
)
def test_anything_in_the_place_of_a_file_or_folder(kind: str, name: str) -> None:
    with copy_of_run() as run:
        checkpoints = run / "checkpoints"
        path = checkpoints / "step_00000003" / name if name in FILES else checkpoints / (name or "step_00000003")
        replace(path, kind, run.parent / "outside")
        opens_or_is_refused(run)


@pytest.mark.parametrize("file", ["manifest.json", "state.json"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[" * 900 + "]" * 900, '{"state": null, "same_as": {}}']
)
def test_nesting_without_end(file: str, text: str) -> None:
    with copy_of_run() as run:
        path = run / "checkpoints" / "step_00000003"
        (path / file).write_text(text)
        if file != "manifest.json":
            make_true(path)
        with time_limit(), pytest.raises(CheckpointError, match=file):
            CheckpointManager(run).load(path)
        opens_or_is_refused(run)
