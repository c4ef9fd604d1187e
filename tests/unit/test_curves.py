"""The training curves of a run."""

import io
import math
from pathlib import Path

import matplotlib
import matplotlib.image
import pytest

from fundamentallm import VisualizationCallback
from fundamentallm.run.folder import write_start
from fundamentallm.training.callbacks.curves import draw
from tests.conftest import problem_of
from tests.unit.stub_run import Stub, line, make_stub

SMALL = ("learning_rate", "grad_norm", "tokens_per_second")


def run(folder: Path, steps: int = 3) -> Stub:
    """A run that has logged three lines."""
    stub = make_stub(folder)
    for stub.global_step in range(1, steps + 1):
        stub.metrics.update(line(stub.global_step))
    return stub


def history(losses: list[float]) -> dict[str, list[float]]:
    return {"step": [10.0 * (i + 1) for i in range(len(losses))], **dict.fromkeys(("train_loss", *SMALL), losses)}


def test_curves_are_drawn_in_the_theme(tmp_path: Path) -> None:
    stub = run(tmp_path)
    stub.metrics.update({"val_step": 3, "val_loss": 2.5})
    write_start(tmp_path, step=2)
    before = dict(matplotlib.rcParams)
    brightness = []
    for theme in ("light", "dark"):
        path = tmp_path / theme / "curves.png"
        curves = VisualizationCallback(path, theme=theme)
        curves.on_train_begin(stub)
        curves.on_train_end(stub)
        assert [file.name for file in path.parent.iterdir()] == ["curves.png"]
        brightness.append(matplotlib.image.imread(path)[..., :3].mean())
    assert brightness[0] > 0.9
    assert brightness[1] < 0.1
    assert dict(matplotlib.rcParams) == before
    assert problem_of(VisualizationCallback, theme="sepia").allowed == "light, dark"


def test_curves_are_drawn_after_validations_and_refresh_seconds(tmp_path: Path) -> None:
    path, stub = tmp_path / "curves.png", run(tmp_path)
    VisualizationCallback(path, refresh_seconds=0.0).on_log(run(tmp_path, steps=0), {})
    VisualizationCallback(path, refresh_seconds=1e9).on_log(stub, {})
    assert not path.exists()
    VisualizationCallback(path, refresh_seconds=0.0).on_log(stub, {})
    path.unlink()
    VisualizationCallback(path).on_validation_end(stub, {})
    assert path.exists()


def test_curves_that_cannot_be_written_do_not_end_the_run(tmp_path: Path) -> None:
    stub = run(tmp_path)
    VisualizationCallback(tmp_path).on_train_end(stub)
    assert str(tmp_path) in stub.said[0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("losses", [[math.nan] * 3, [math.inf] * 100, [2.0] * 100])
def test_draw_takes_losses_without_a_range(losses: list[float]) -> None:
    draw(history(losses), [], 10, "light", "$x^$").savefig(io.BytesIO())


def test_draw_shows_each_validation_set() -> None:
    sets = {"val_step": [10.0, 20.0], "val_loss": [3.0, 2.0], "val_books_loss": [2.5, 1.5]}
    axis = draw(history([2.0] * 4) | sets, [], 40, "light", "").axes[0]
    shown = {str(curve.get_label()).partition(" ")[0]: list(curve.get_ydata()) for curve in axis.get_lines()}
    assert shown["val_books_loss"] == [2.5, 1.5]


def test_draw_marks_restarts_and_skipped_steps() -> None:
    counts = {"bad_steps": [0.0, 2.0, 2.0, 3.0], "skipped_spikes": [0.0, 0.0, 1.0, 1.0]}
    axis = draw(history([4.0, 3.0, 2.0, 1.0]) | counts, [15, 25], 100, "light", "run").axes[0]
    drawn = {text: list(drawn.get_xdata()) for drawn in axis.lines if (text := drawn.get_label())[0] != "_"}
    assert drawn["not finite (3)"] == [20, 40]
    assert drawn["skipped spikes (1)"] == [30]
    assert drawn["restarted (2)"] == [15, 15]
    assert [25, 25] in [list(drawn.get_xdata()) for drawn in axis.lines]
    assert axis.get_xlim() == (0, 100)


def test_draw_leaves_the_high_start_of_a_long_run_out() -> None:
    axis = draw(history([90.0, 50.0] + [2.0 - i / 100 for i in range(98)]), [], 1000, "light", "run").axes[0]
    assert axis.get_ylim()[1] < 3
