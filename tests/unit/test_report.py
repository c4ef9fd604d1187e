"""`fundamentallm report` makes one self-contained page of runs, also of old or hostile ones."""

import contextlib
import html
import json
import math
import re
import shutil
import subprocess
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fundamentallm import FundamentaLLMError, SampleCallback
from fundamentallm.commands.report import main, thinned
from fundamentallm.run.folder import write_start
from tests.integration.runs import StopAt, make_config, make_trainer

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
HOSTILE = "<img src=x onerror=document.title='owned'></script><script>document.title='owned'</script><!--"


def report(*arguments: object) -> int:
    return main([str(argument) for argument in arguments], "fundamentallm report")


class Scripts(HTMLParser):
    """Tags and scripts of a page, as a browser parses them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["script"]:
            self.scripts[-1] += data


def data_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(Scripts(path.read_text()).scripts[0])["runs"]  # type: ignore[no-any-return]


def write_log(folder: Path, *lines: dict[str, Any], end: str = "\n") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + end)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run with samples that was stopped and resumed."""
    folder = tmp_path_factory.mktemp("runs") / "real"

    def trainer() -> Any:
        settings = {"eval_every_n_steps": 5, "eval_every_n_epochs": None, "max_steps": 12}
        made = make_trainer(make_config(folder, checkpoint_dir=str(folder / "checkpoints"), **settings))
        made.callbacks.add(SampleCallback(["The "], 5))
        return made

    first = trainer()
    first.callbacks.add(StopAt(7))
    first.train()
    trainer().train()
    return folder


@pytest.fixture(scope="module")
def old(run: Path) -> Path:
    """An old run without starts.jsonl, with NaN, a torn last line and a hostile name."""
    lines = [
        {"step": n, "epoch": n / 9, "tokens": 64 * n, "train_loss": 5 - n / 4, "bad_steps": n // 6}
        for n in range(1, 13)
    ]
    lines[5]["train_loss"], lines[6]["train_loss"] = "NaN", float("nan")
    folder = run.parent / "<img src=x onerror=document.title='owned'>"
    write_log(folder, *lines, {"step": 12, "epoch": 1.0, "val_loss": 2.5}, end='\n{"step": 13, "train_lo')
    sample = {"step": 12, "prompt": HOSTILE, "text": HOSTILE}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return folder


@pytest.fixture(scope="module")
def page(run: Path, old: Path) -> Path:
    path = run.parent / "page" / "report.html"
    assert report(run, old, "--output", path) == 0
    return path


def test_report_shows_curves_samples_and_config_of_a_run(page: Path, run: Path) -> None:
    real = data_of(page)[0]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in logged if "train_loss" in line]
    assert real["curves"]["train_loss"] == [list(range(1, 13)), losses]
    assert real["curves"]["val_loss"][0] == [5, 10, 12]
    assert (real["name"], real["state"]) == (str(run), "finished")
    assert (real["total_steps"], real["restarts"]) == (12, [7])
    assert [sample["step"] for sample in real["samples"]] == [5, 10, 12]
    assert (real["config"]["model.d_model"], real["config"]["training.max_steps"]) == (16, 12)
    assert real["environment"]["processes"] == 1
    assert {"python", "torch", "accelerate", "host", "command"} <= real["environment"].keys()
    steps, seconds = real["curves"]["time"]
    assert steps == sorted([*range(1, 13), 5, 10, 12])
    assert seconds == sorted(seconds)
    assert 0 < seconds[-1] < 600


def test_report_old_run_is_shown_without_missing_parts(page: Path) -> None:
    old = data_of(page)[1]
    assert old["curves"]["train_loss"] == [
        list(range(1, 13)),
        [4.75, 4.5, 4.25, 4.0, 3.75, None, None, 3.0, 2.75, 2.5, 2.25, 2.0],
    ]
    assert (old["config"], old["environment"], old["restarts"], old["data"]) == (None, None, [], None)
    assert "time" not in old["curves"]


def test_report_duration_leaves_out_time_between_launches(tmp_path: Path) -> None:
    log = write_log(
        tmp_path / "run", {"step": 5, "time": 1010.0}, {"step": 10, "time": 1020.0}, {"step": 15, "time": 9005}
    )
    starts = [(0, 1000), (10, 8000), (10, 9000)]  # the second launch was killed before its first line
    lines = [{"step": step, "time": datetime.fromtimestamp(time, timezone.utc).isoformat()} for step, time in starts]
    (log / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report(log, "--output", tmp_path / "report.html") == 0
    assert data_of(tmp_path / "report.html")[0]["curves"]["time"] == [[5, 10, 15], [10, 20, 25]]


def test_report_text_of_a_run_never_becomes_markup(page: Path) -> None:
    parsed = Scripts(page.read_text())
    assert len(parsed.scripts) == 2  # the data and our own
    assert "img" not in parsed.tags
    assert data_of(page)[1]["samples"][0]["text"] == HOSTILE


def test_report_page_loads_nothing(page: Path) -> None:
    text = page.read_text()
    assert "default-src 'none'" in text
    assert (
        re.findall(r"(?:src|href)\s*=|url\((?!#)|@import|fetch\(|XMLHttpRequest", text.partition("<script type")[0])
        == []
    )
    assert "http://" not in Scripts(text).scripts[1].replace("http://www.w3.org/2000/svg", "")


def test_thinned_keeps_spikes_and_gaps() -> None:
    points: list[tuple[int, float | None]] = [(n, float(n % 7)) for n in range(10_000)]
    points[1234], points[5678], points[7777] = (1234, 99.0), (5678, -99.0), (7777, None)
    kept = thinned(points)
    assert len(kept) <= 2100
    assert {points[0], points[1234], points[5678], points[7777], points[-1]} <= set(kept)
    assert kept == sorted(kept, key=lambda point: point[0])
    assert thinned(points[:50]) == points[:50]


def test_report_refuses_a_folder_that_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(FundamentaLLMError, match=r"metrics.jsonl"):
        report(tmp_path)


def test_report_of_a_config_with_numbers_that_json_lacks(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "run", {"step": 1, "train_loss": 2.0})
    options = {"callback_options": {"curves": {"refresh_seconds": math.inf}}, "training": {}}
    write_start(folder, step=0, time="2026-01-01T00:00:00+00:00", config=options)
    assert report(folder, "--output", tmp_path / "r.html") == 0
    assert data_of(tmp_path / "r.html")[0]["config"]["callback_options"] == {"curves": {"refresh_seconds": "Infinity"}}


@pytest.mark.parametrize("damage", [{"starts.jsonl": '{"step": 0, "config": 3}\n'}, {"status.json": "[1]"}])
def test_report_of_damaged_files_shows_the_rest_or_names_the_run(tmp_path: Path, damage: dict[str, str]) -> None:
    folder = write_log(tmp_path / "run", {"step": 1, "train_loss": 2.0})
    for name, text in damage.items():
        (folder / name).write_text(text)
    with contextlib.suppress(FundamentaLLMError):
        assert report(folder, "--output", tmp_path / "r.html") == 0


# ---- in a browser ------------------------------------------------------------------------------------------

LOOK = """
<script>
addEventListener("load", () => setTimeout(() => {
  const seen = {}, loss = charts.find((chart) => chart.names.includes("val_loss"));
  const box = loss.svg.getBoundingClientRect(), clientX = box.left + 52 + (box.width - 62) * 10 / 12;
  loss.svg.dispatchEvent(new PointerEvent("pointermove", { clientX })); seen.tip = loss.tip.innerText;
  const curve = () => loss.svg.querySelector("g path").getAttribute("d");
  seen.linear = curve(); document.getElementById("log").click(); seen.log = curve();
  const count = (what) => loss.svg.querySelectorAll(what).length, curves = "path:not(.skipped)";
  seen.paths = count(curves); document.querySelectorAll("#runs input")[1].click(); seen.fewer = count(curves);
  document.querySelectorAll("#runs input")[1].click();
  seen.restarts = count(".restart"); seen.crosses = count(".skipped");
  const axis = document.getElementById("axis");
  axis.value = "tokens"; axis.dispatchEvent(new Event("change"));
  seen.tokens = [...loss.svg.querySelectorAll("text")].map((text) => text.textContent);
  seen.text = ["samples", "final", "config"].map((name) => document.getElementById(name).innerText).join(" ");
  seen.title = document.title;
  const out = document.createElement("pre");
  out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
}, 200));
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
def test_report_curves_in_a_browser(page: Path, run: Path, tmp_path: Path) -> None:
    looked_at = tmp_path / "looked_at.html"
    looked_at.write_text(page.read_text().replace("</body>", f"{LOOK}</body>"))
    flags = "headless no-sandbox disable-sync disable-gpu disable-quic no-first-run disable-background-networking "
    flags += f"disable-component-update user-data-dir={tmp_path}/profile virtual-time-budget=3000 dump-dom"
    command = [str(CHROMIUM), *(f"--{flag}" for flag in flags.split()), "--window-size=1200,1500", looked_at.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:] + done.stderr
    seen = json.loads(html.unescape(found.group(1)))
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    value = next(line["val_loss"] for line in logged if line["step"] == 10 and "val_loss" in line)
    assert seen["tip"].startswith("step 10")
    assert f"{value:.5g}".rstrip("0") in seen["tip"]
    assert seen["linear"] != seen["log"]
    assert 0 < seen["fewer"] < seen["paths"]
    assert (seen["restarts"], seen["crosses"]) == (1, 2)
    assert {"800", "1,000"} & {*seen["tokens"]}
    assert all(text in seen["text"] for text in (HOSTILE, "finished", "model.d_model"))
    assert "owned" not in seen["title"]
