"""Any config file and command line works, or is one of our errors. Never another exception, a hang, or code that runs.

`HYPOTHESIS_PROFILE=thorough` tries a hundred times as much.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from fundamentallm.config.command_line import parse_config
from fundamentallm.config.command_line import settings as all_settings
from fundamentallm.config.schema import Config
from fundamentallm.config.validation import from_dict
from fundamentallm.errors import ConfigError

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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(*arguments: str) -> Config | None:
    """The config of a command line; None where it is refused, or printed, as it should be."""
    with time_limit(), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")):
        try:
            config = parse_config(arguments)
            for path in (config.output_dir, config.training.checkpoint_dir, config.data.cache_dir):
                assert path is None or os.fsencode(path).count(0) == 0  # what no folder can be called
            return config
        except ConfigError as raised:
            problems, code = raised.problems, None
        except SystemExit as raised:
            problems, code = [], raised.code
    if code is None:
        assert all(problem.encode("utf-8", "backslashreplace") for problem in problems)
        assert problems
    else:
        assert code == 0
        assert any(word.startswith(("-h", "--help", "--print_config")) for word in arguments)
    return None


# A folder or pattern that means half the disk is no hang: reading it was asked for.
harmless = st.text(max_size=20).filter(lambda text: not set("/~*.") & set(text))
numbers = (
    st.integers()
    | st.floats()
    | st.sampled_from([10**400, -(10**400), 2**63, 0, -1, math.nan, math.inf, 5e-324, 1.7e308])
)
scalars = st.none() | st.booleans() | numbers | harmless | st.binary(max_size=4) | st.dates() | st.datetimes()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(harmless | scalars, inner, max_size=3)
)
names = st.sampled_from([*SETTINGS, *SECTIONS, "training.lr", "", "."]) | harmless

YAML_WORDS = [
    *(name.rpartition(".")[2] for name in SETTINGS), *SECTIONS,
    *(":", ": ", "- ", "\n", "\n  ", "\t", "{", "}", "[", "]", ", ", "? ", "| ", ">", "#", "'", '"', "\\", "---"),
    *("...", "&a ", "*a", "&b ", "*b", "<<: ", "!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!set "),
    *("!!omap ", "!!pairs ", "!!null ", "!!str ", "!!map ", "!!seq ", "! ", "!x ", "!!python/name:os.system "),
    *("%YAML 1.1\n", "%TAG", "0x", "0o", "0b", "1e", ".inf", ".nan", "2024-01-01", "12:30:45", "=", "~", "null", "no"),
    *("yes", "1_0", "\ud800", "\0"),
]  # fmt: skip


@scaled(0.4)
@given(st.lists(st.sampled_from(YAML_WORDS) | st.text(max_size=3), max_size=25).map("".join))
@example("training: &a {loss_options: *a}")
@example("model: &a {model: *a, ? *a : 1}")
@example("training: {loss_options: {a: 0x" + "f" * 5000 + "}}")
@example("model: {d_model: 0x" + "f" * 5000 + "}")
@example("0x" + "f" * 5000 + ": 1")
@example("a: &a !!timestamp x")
@example("a: !!bool x")
@example("a: !!int ''")
@example("a: !!float ''")
@example('output_dir: "\\ud800"\ndata: {source: "\\0/*"}')
@example('data: {source: "\\ud800/*", cache_dir: "\\0", tokenizer: "\\ud800.json"}')
@example("a: " + "[" * 1200)  # deeper than the interpreter goes; ruamel takes time by the square of it
@example('training: {resume: "~\\0", checkpoint_dir: "\\0"}')
def test_any_text_as_a_config_file(folder: Path, text: str) -> None:
    (folder / "config.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    for more in ([], ["--print_config"]):
        parse("--config", "config.yaml", *more)


@scaled(0.3)
@given(st.binary(max_size=60))
def test_any_bytes_as_a_config_file(folder: Path, content: bytes) -> None:
    (folder / "config.yaml").write_bytes(content)
    parse("--config", "config.yaml")


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
def test_any_values_of_any_settings(folder: Path, nested: dict[str, Any]) -> None:
    with time_limit(), contextlib.suppress(ConfigError):
        from_dict(Config, nested)
    with (folder / "config.yaml").open("w", encoding="utf-8", errors="surrogatepass") as file:
        try:
            YAML(typ="safe", pure=True).dump(nested, file)
        except Exception:  # not everything can be written as YAML
            return
    for more in ([], ["--print_config"]):
        parse("--config", "config.yaml", *more)


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
@example(["--training.loss_options=&a {b: *a}", "--print_config"])
@example(["--training.loss_options", "{a: 0x" + "f" * 5000 + "}", "--print_config"])
@example(["--config", "\0"])
@example(["--config", "a" * 5000])
@example(["--output_dir", "a" * 5000])
@example(["--output_dir", "a\0b"])
@example(["--model.init_from", "~nobody_at_all/\0"])
@example(["--training.resume_changes", "&a [*a]"])
@example(["--callbacks", "&a [*a]"])
def test_any_command_line(folder: Path, arguments: list[str]) -> None:
    (folder / "config.yaml").write_text("training: {seed: 1}")
    parse(*arguments)


def test_aliases_that_stand_for_more_than_memory_holds_are_refused(folder: Path) -> None:
    laughs = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    laughs += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (folder / "config.yaml").write_text("\n".join(laughs))
    with time_limit(), pytest.raises(ConfigError, match=r"config\.yaml"):
        parse_config(["--config", "config.yaml"])


def test_no_tag_runs_code(folder: Path) -> None:
    for tag in ("!!python/object/apply:os.mkdir [ran]", "!!python/object/new:os.mkdir [ran]", "!!python/name:os.mkdir"):
        (folder / "config.yaml").write_text(f"output_dir: {tag}")
        assert parse("--config", "config.yaml") is None
        parse(f"--output_dir={tag}", f"--training.loss_options={tag}")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_a_config_that_is_no_file_is_refused(folder: Path, kind: str) -> None:
    path = folder / "config.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")  # stands for /dev/zero, which would take all memory where this fails
    with time_limit(10), pytest.raises(ConfigError, match=r"config\.yaml.*cannot be read"):
        parse_config(["--config", "config.yaml"])
