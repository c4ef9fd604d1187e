"""Runs with a mirror: they outlive their disk, and neither an error nor a hang of the mirror stops them."""

import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from fundamentallm import Callback, CheckpointManager, Trainer, TrainingConfig, train
from tests.conftest import problem_of
from tests.integration.crashes import Case, uninterrupted
from tests.integration.runs import (
    StopAt,
    lines,
    make_config,
    make_trainer,
    on_processes,
    prose,
    timeless,
)
from tests.integration.test_sharding import fit, newest
from tests.integration.trap import Instant
from tests.unit.test_docs import ROOT, blocks

RUN: dict[str, Any] = {"dropout": 0.2, "save_every_n_steps": 3, "save_every_n_epochs": None, "keep_last_n": 1}
SETTINGS = {
    "data.source": "text.txt", "data.sequence_length": 16, "model.d_model": 16, "model.num_heads": 2,
    "model.num_layers": 1, "training.max_steps": 6, "training.save_every_n_steps": 2, "training.batch_size": 8,
    "training.log_every_n_steps": 1, "training.keep_last_n": 1, "output_dir": "run", "sample_tokens": 0,
}  # fmt: skip


def command(**settings: Any) -> list[str]:
    return [word for name, value in (SETTINGS | settings).items() for word in (f"--{name}", str(value))]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(prose())
    return tmp_path


@contextmanager
def endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> Iterator[None]:
    """S3 is at this address, and each request is made once."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    for name, value in {"ENDPOINT_URL": url, "DEFAULT_REGION": "us-east-1", "MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A real S3 API on this machine, with the bucket of the documentation's example."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        with endpoint(monkeypatch, f"http://{host}:{port}"):
            boto3.client("s3").create_bucket(Bucket="my-bucket")
            yield
    finally:
        server.stop()


# ---- lost disks --------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="the harness uses what only Linux has")
@pytest.mark.parametrize("url", ["mirror", "s3://my-bucket/killed"])
def test_train_killed_in_an_upload_resumes_on_an_empty_disk(
    tmp_path: Path, url: str, request: pytest.FixtureRequest
) -> None:
    if url.startswith("s3"):
        request.getfixturevalue("s3")
    reference, case = uninterrupted(tmp_path, 1, ""), Case(tmp_path / "case", 1)
    config = case.folder / "config.yaml"
    config.write_text(config.read_text().replace("  keep_last_n", f"  mirror: {url}\n  keep_last_n"))
    # Of the second checkpoint, one file is at the mirror. Later, while a checkpoint is fetched, the log is there.
    for instant in (
        Instant("read run/checkpoints/step_N/model.safetensors", 2),
        Instant("rename run/metrics.jsonl.new -> run/metrics.jsonl"),
    ):
        assert not case.start(instant)
        if len(case.hits) == 1:
            case.lose_disk()
    assert len(case.hits) == 2
    case.lose_disk()
    assert case.start()
    case.check(reference)


def test_train_with_the_mirror_of_the_docs_survives_its_folder(here: Path, s3: None) -> None:
    (block,) = [block for block in blocks(ROOT / "docs/checkpoints.md", "yaml") if "mirror" in block]
    (here / "mirror.yaml").write_text(block)
    arguments = ["--config", "mirror.yaml", *command(**{"data.tokenizer": "bpe:300"})]
    assert train.main(arguments) == 0
    before = lines("run"), {path.name: path.read_bytes() for path in newest(here / "run").iterdir()}
    shutil.rmtree("run")
    (here / "text.txt").write_text(prose() * 2)  # of which another tokenizer would be learned
    assert train.main([*arguments, "--training.resume_changes", "[data]"]) == 0
    assert (lines("run"), {path.name: path.read_bytes() for path in newest(here / "run").iterdir()}) == before


def test_trainer_resumes_from_the_mirror(tmp_path: Path) -> None:
    whole = make_trainer(make_config(tmp_path / "whole", **RUN))
    whole.train()
    config = make_config(tmp_path / "run", mirror="memory://runs/one", **RUN)
    stopped = make_trainer(config)
    stopped.callbacks.add(StopAt(7))
    stopped.train()
    shutil.rmtree(tmp_path / "run")
    trainer = make_trainer(config)
    trainer.train()
    assert trainer.resumed_from == tmp_path / "run/checkpoints/step_00000007"
    assert timeless(lines(tmp_path / "run")) == timeless(lines(tmp_path / "whole"))
    assert len(list((tmp_path / "run/checkpoints").glob("step_*"))) == 1  # all are copied


def test_sharded_run_is_mirrored_whole(tmp_path: Path) -> None:
    settings = {"mirror": str(tmp_path / "far"), "max_steps": 3}
    on_processes(2, fit, str(tmp_path / "run"), settings)
    before = {path.name: path.read_bytes() for path in newest(tmp_path / "run").iterdir()}
    assert "model-00002-of-00002.safetensors" in before
    shutil.rmtree(tmp_path / "run")
    on_processes(2, fit, str(tmp_path / "run"), settings)
    assert {path.name: path.read_bytes() for path in newest(tmp_path / "run").iterdir()} == before


# ---- mirrors that fail -------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """An S3 that is empty, and refuses to store; or that answers with errors only, if the path names `broken`."""

    def answer(self) -> None:
        empty = b"<ListBucketResult><Name>bucket</Name><KeyCount>0</KeyCount></ListBucketResult>"
        is_listing = self.command == "GET" and "broken" not in self.path
        self.send_response(200 if is_listing else 404 if self.command == "HEAD" else 503)
        self.send_header("Content-Length", str(len(empty) if is_listing else 0))
        self.end_headers()
        self.wfile.write(empty if is_listing else b"")

    do_GET = do_HEAD = do_PUT = do_POST = answer

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("s3fs")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}"):
        yield
    server.shutdown()
    server.server_close()


def test_train_finishes_although_the_mirror_answers_with_errors(
    here: Path, refusing: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train.main(command(**{"training.mirror": "s3://bucket/run"})) == 0
    out = capfd.readouterr().out
    assert out.count("is not copied to s3://bucket/run") == 1
    assert len(list(Path("run/checkpoints").glob("step_*"))) == 3  # none rotates away
    assert train.main(command(**{"training.mirror": str(here / "far")})) == 0  # a finished run is copied too
    assert len(list((here / "far").glob("step_*"))) == 3
    assert len(list(Path("run/checkpoints").glob("step_*"))) == 1


def test_train_with_an_empty_folder_needs_to_read_the_mirror(
    here: Path, refusing: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train.main(command(**{"training.mirror": "s3://bucket/broken"})) == 1
    assert "s3://bucket/broken" in capfd.readouterr().err
    assert not Path("run/metrics.jsonl").exists()


class Hanging(LocalFileSystem):
    """Hangs until the run has taken its last step."""

    protocol = "hanging"
    gate = threading.Event()

    def put_file(self, *arguments: Any, **options: Any) -> None:
        assert self.gate.wait(60.0)
        super().put_file(*arguments, **options)


class OpenGate(Callback):
    def on_train_end(self, trainer: Trainer) -> None:
        assert trainer.checkpoint_manager is not None
        assert len(trainer.checkpoint_manager.mirror.missing()) == 4
        Hanging.gate.set()


def test_train_waits_for_a_hanging_mirror_at_its_end_only(tmp_path: Path) -> None:
    fsspec.register_implementation("hanging", Hanging, clobber=True)
    trainer = make_trainer(
        make_config(tmp_path / "run", mirror=f"hanging://{tmp_path}/far", **RUN), callbacks=[OpenGate()]
    )
    trainer.train()
    assert len(list((tmp_path / "far").glob("step_*/manifest.json"))) == 4
    assert len(list((tmp_path / "run/checkpoints").glob("step_*"))) == 1


# ---- settings ----------------------------------------------------------------------------------------------


def test_train_resume_never_refuses_a_mirror_that_holds_a_run(tmp_path: Path) -> None:
    CheckpointManager(tmp_path / "far").save({}, "one")
    settings = {"mirror": str(tmp_path / "far"), "resume": "never", **RUN}
    problem = problem_of(make_trainer(make_config(tmp_path / "run", **settings)).train)
    assert (problem.setting, problem.value) == ("training.resume", "never")


def test_train_that_is_refused_copies_nothing(tmp_path: Path) -> None:
    make_trainer(make_config(tmp_path / "run", **RUN | {"max_steps": 1})).train()
    settings = RUN | {"max_steps": 1, "mirror": str(tmp_path / "far"), "weight_decay": 0.5}
    assert problem_of(make_trainer(make_config(tmp_path / "run", **settings)).train).setting == "training.weight_decay"
    assert not (tmp_path / "far").exists()


def test_trainer_mirror_needs_a_folder_of_checkpoints(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path / "run", **RUN))
    config = TrainingConfig(max_steps=1, mirror=str(tmp_path / "far"))
    assert problem_of(Trainer, trainer.model, config, trainer.train_loader).setting == "training.mirror"
