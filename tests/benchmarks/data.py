"""What the data costs: batches beside the model that takes them, a corpus of 10 GB beside a small one, the last of its
places beside the first, a second start beside the first one, and how many cores the tokenizer keeps busy.

    python -m tests.benchmarks.data [--rounds 5]

The sides of each row run in turn, on one thread of a CPU but for the tokenizer; a ratio is the median of the rounds'.
The corpus of 10 GB is a sparse file, whose pages the system makes when they are asked for.
"""

import argparse
import itertools
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fundamentallm import Callback, DataConfig, Trainer, load_corpus
from fundamentallm.config.command_line import parse_config
from fundamentallm.config.files import SourceFiles
from fundamentallm.data import corpus, sources
from fundamentallm.data.datasets import TokenDataset
from fundamentallm.data.encoding import encode_pieces
from fundamentallm.data.loaders import collate, device_batches, step_sampler
from fundamentallm.data.tokenizers import create_tokenizer, with_unknown
from fundamentallm.train import make_trainer
from tests.conftest import reset_accelerate
from tests.integration.runs import prose

QUICK_START = ["--config", "quickstart"]
LENGTH, BATCH, STEPS = 128, 16, 2000
"""Tokens of a sequence and sequences of a batch as in the quick start; batches to time."""
EVERY = 10
"""Steps between two looks at the clock."""
SMALL, LARGE = 10 * 2**20, 10 * 2**30
"""Bytes of the corpora."""


def model_step(folder: Path) -> float:
    """Seconds a step of the quick start's model takes."""

    class Marks(Callback):
        def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            marks.append(time.perf_counter())

    marks: list[float] = []
    output = tempfile.mkdtemp(dir=folder)
    settings = {"output_dir": output, "training.max_steps": "50", "training.log_every_n_steps": str(EVERY)}
    config = parse_config([*QUICK_START, *(word for name, value in settings.items() for word in (f"--{name}", value))])
    trainer = make_trainer(replace(config, training=replace(config.training, eval_every_n_steps=None)))
    trainer.val_loader, trainer.checkpoint_manager = None, None
    trainer.callbacks.add(Marks())
    trainer.train()
    reset_accelerate()
    return statistics.median((after - before) / EVERY for before, after in itertools.pairwise(marks))


def batch(tokens: NDArray[np.integer], at: float, again: bool = True) -> float:
    """Seconds the loader alone takes for a batch, `at` this part of an epoch, in the run's order.

    With `again`, when it has read them once already: the first time, the system brings each page into memory.
    """
    if not again:
        forget(tokens)
    loader = torch.utils.data.DataLoader(TokenDataset(tokens, LENGTH), BATCH, shuffle=True, collate_fn=collate)
    sampler = step_sampler("loader", loader, 0)
    first = int(at * (sampler.steps_per_epoch - STEPS))
    for _ in range(1 + again):
        begun = time.perf_counter()
        for _ in device_batches(loader, sampler, first, first + STEPS, torch.device("cpu")):
            pass
    return (time.perf_counter() - begun) / STEPS


def forget(tokens: NDArray[np.integer]) -> None:
    """Take the pages of mapped tokens out of memory."""
    tokens.base.madvise(mmap.MADV_DONTNEED)
    with Path(tokens.filename).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def prepared(folder: Path, num_bytes: int) -> NDArray[np.integer]:
    """Training tokens of so many bytes, opened as `load_corpus` does: all zeros, and a sparse file."""
    folder.mkdir()
    create_tokenizer("byte").save(str(folder / "tokenizer.json"))
    for name, size in (("train.bin", num_bytes), ("validation.bin", 0)):
        with (folder / name).open("wb") as file:
            file.truncate(size)
    meta = {"dtype": "uint16", "tokens": [num_bytes // 2, 0], "rows": None, "validation_bytes": 0, "bad_rows": 0}
    (folder / "meta.json").write_text(json.dumps(meta | {"settings": {"tokenizer": "byte"}}))
    return corpus._open(folder, SourceFiles("zeros", "prepared", (folder,)), 1.0).train.ids


def start(folder: Path, is_first: bool) -> float:
    """Seconds that `load_corpus` takes of a text of 40 MB, for the first time or again."""
    source = folder / "text.txt"
    if not source.exists():
        source.write_text(prose(10**9) * 90)
    cache = tempfile.mkdtemp(dir=folder) if is_first else str(folder / "cache")
    config = DataConfig(str(source), cache_dir=cache)
    if not is_first:
        load_corpus(config, show_progress=False)
    begun = time.perf_counter()
    load_corpus(config, show_progress=False)
    return time.perf_counter() - begun


def encoding(tokenizer: str, on_all_cores: bool) -> float:
    """Seconds to encode 4 MB."""
    text = prose(10**9)
    os.environ["TOKENIZERS_PARALLELISM"] = str(on_all_cores).lower()
    made = create_tokenizer(tokenizer, text)
    pieces = [text[at : at + sources.PIECE] for at in range(0, len(text), sources.PIECE)] * 9
    begun = time.perf_counter()
    for _ in encode_pieces(with_unknown(made), pieces):
        pass
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, large = (prepared(folder / str(size), size) for size in (SMALL, LARGE))
        rows: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
            "the model's step / the loader's batch": (lambda: model_step(folder), lambda: batch(small, 0.5)),
            "the model's step / the loader's batch of 10 GB, first time": (
                lambda: model_step(folder),
                lambda: batch(large, 0.5, again=False),
            ),
            "a batch of 10 GB / of 10 MB": (lambda: batch(large, 0.5), lambda: batch(small, 0.5)),
            "a batch at the end of 10 GB / at the beginning": (lambda: batch(large, 1), lambda: batch(large, 0)),
            "the first start / the next ones": (lambda: start(folder, True), lambda: start(folder, False)),
        }
        for kind in ("char", "byte", "bpe:4096"):
            sides = (lambda kind=kind: encoding(kind, False), lambda kind=kind: encoding(kind, True))
            rows[f"{kind}: encoding on one thread / on {os.cpu_count()} cores"] = sides
        print("| | the one, ms | the other, ms | ratio | from | to |\n| --- | --- | --- | --- | --- | --- |")
        for title, (one, other) in rows.items():
            with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                times = [(one(), other()) for _ in range(options.rounds)]
            ratios = [a / b for a, b in times]
            a, b = (statistics.median(side) * 1e3 for side in zip(*times, strict=True))
            median, low, high = statistics.median(ratios), min(ratios), max(ratios)
            print(f"| {title} | {a:,.3f} | {b:,.3f} | {median:,.2f} | {low:,.2f} | {high:,.2f} |")


if __name__ == "__main__":
    main()
