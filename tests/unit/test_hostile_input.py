"""Any config file and command line works, or is one of our errors: no other exception, no hang, no code that runs.

`HYPOTHESIS_PROFILE=thorough` tries 250 times as many.
"""

import contextlib
import io
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st

from fundamentallm.config.command_line import parse_config, settings as all_settings
from fundamentallm.config.schema import Config
from fundamentallm.config.validation import from_dict
from fundamentallm.config.yaml_format import to_yaml
from fundamentallm.errors import ConfigError
from tests.conftest import nested

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
def test_parse_config_of_any_file_is_read_or_refused(folder: Path, content: str | bytes) -> None:
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    (folder / "config.yaml").write_bytes(raw)
    parse("--config", "config.yaml", "--print_config")


@scaled(0.3)
@given(st.dictionaries(names, values, max_size=6).map(nested))
def test_parse_config_of_any_values_is_read_or_refused(folder: Path, sections: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        from_dict(Config, sections)
    (folder / "config.yaml").write_text(to_yaml(sections), encoding="utf-8")
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
def test_parse_config_of_any_arguments_is_read_or_refused(folder: Path, arguments: list[str]) -> None:
    (folder / "config.yaml").write_text("training: {seed: 1}")
    parse(*arguments)


def test_parse_config_of_a_yaml_tag_runs_no_code(folder: Path) -> None:
    for tag in ("!!python/object/apply:os.mkdir [ran]", "!!python/object/new:os.mkdir [ran]", "!!python/name:os.mkdir"):
        (folder / "config.yaml").write_text(f"output_dir: {tag}")
        with pytest.raises(ConfigError):
            parse_config(["--config", "config.yaml"])
        parse(f"--output_dir={tag}", f"--training.loss_options={tag}")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
