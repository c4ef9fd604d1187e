"""What packing saves on questions of varied lengths: padding, and processor time for each token of an answer.

    python -m tests.benchmarks.packing [--rounds 4]

The questions are names and signatures of the standard library, the answers their docstrings. Packed and unpacked runs
of a small model take turns, on one thread of a CPU.
"""

import argparse
import importlib
import inspect
import json
import re
import statistics
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from fundamentallm import Callback, Config, DataConfig, ModelConfig, Trainer, TrainingConfig, load_corpus
from fundamentallm.data.datasets import PackedDataset
from fundamentallm.train import make_trainer
from tests.conftest import reset_accelerate

MODULES = (
    "argparse ast asyncio base64 bisect calendar codecs collections configparser contextlib copy csv dataclasses "
    "datetime decimal difflib dis email.message enum fractions ftplib functools gzip heapq html.parser http.client "
    "http.server imaplib inspect io ipaddress itertools json logging mailbox math mimetypes multiprocessing.pool "
    "operator pathlib pdb pickle plistlib pprint profile queue random re sched secrets shelve shlex shutil smtplib "
    "socket sqlite3 ssl statistics string struct subprocess tarfile tempfile textwrap threading timeit tokenize "
    "traceback types typing unittest.mock urllib.request uuid warnings weakref xml.dom.minidom "
    "xml.etree.ElementTree xmlrpc.client zipfile zoneinfo"
)
SIZES = ((8, 512), (32, 512), (8, 2048), (32, 2048))
"""Batch size and sequence length of each row."""


def docstrings(modules: str = MODULES) -> dict[str, str]:
    """Returns the docstrings of functions, classes and methods by name and signature."""
    found = {}
    for module in map(importlib.import_module, modules.split()):
        for name, value in sorted(vars(module).items()):
            members = sorted(vars(value).items()) if inspect.isclass(value) else []
            for path, each in [(name, value), *((f"{name}.{key}", member) for key, member in members)]:
                is_public = not any(part.startswith("_") for part in path.split("."))
                if is_public and (inspect.isroutine(each) or inspect.isclass(each)) and (doc := inspect.getdoc(each)):
                    try:
                        signature = re.sub(r" at 0x\w+", "", str(inspect.signature(each)))  # of a default
                    except (TypeError, ValueError):
                        signature = "(...)"
                    found.setdefault(doc, f"What does {module.__name__}.{path}{signature} do?\n")
    return {question: answer for answer, question in found.items()}


def write_pairs(path: Path, modules: str = MODULES) -> None:
    """Writes the docstrings as rows."""
    rows = [json.dumps({"question": question, "answer": answer}) for question, answer in docstrings(modules).items()]
    path.write_text("\n".join(rows), encoding="utf-8")


def config_of(folder: Path, packing: bool) -> Config:
    """Returns a small run that ends without a validation; unpacked batches have fewer answers, so there are more."""
    data = DataConfig(
        str(folder / "pairs.jsonl"), "bpe:2048", prompt_field="question", text_field="answer", packing=packing,
        end_of_text="<|endoftext|>", sequence_length=512, train_split=1.0, cache_dir=str(folder / "cache"),
    )  # fmt: skip
    steps = 30 if packing else 60
    training = TrainingConfig(batch_size=8, max_steps=steps, log_every_n_steps=10, save_every_n_epochs=None)
    return Config(
        tempfile.mkdtemp(dir=folder),
        ModelConfig(d_model=64, num_heads=4, num_layers=2),
        data,
        training,
        sample_tokens=0,
    )


def seconds_per_token(folder: Path, packing: bool) -> float:
    """Returns the processor time for each token of an answer, apart from the first steps."""

    class Marks(Callback):
        def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            marks.append((time.process_time(), metrics["tokens"]))

    marks: list[tuple[float, float]] = []
    trainer = make_trainer(config_of(folder, packing))
    trainer.callbacks.add(Marks())
    trainer.train()
    reset_accelerate()
    (begin, first), (end, last) = marks[0], marks[-1]
    return (end - begin) / (last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder / "pairs.jsonl")
        corpus = load_corpus(config_of(folder, True).data, show_progress=False)
        pairs = corpus.sources[0].train
        for batch_size, length in SIZES:
            packed = PackedDataset(pairs, length, corpus.tokenizer, corpus.end_of_text)
            print(f"batch_size {batch_size}: {packed.describe(batch_size)}")
        print(f"median and longest pair: {int(statistics.median(packed.lengths))} and {packed.lengths.max()} tokens")
        ratios = []
        for number in range(options.rounds):
            with open("/dev/null", "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                sides = (True, False) if number % 2 else (False, True)
                times = {packing: seconds_per_token(folder, packing) for packing in sides}
            ratios.append(times[False] / times[True])
        if ratios:
            about = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"processor time for an answer token, unpacked / packed: {about}")


if __name__ == "__main__":
    main()
