"""How long a checkpoint keeps the training waiting, beside the same state saved at once.

    python -m tests.benchmarks.checkpoint_stall [--rounds 10] [--width 384]

In one run, by turns: a checkpoint in the background, as runs save, and the same state saved while the training waits.
What the loop loses by the first is the call that begins it, of which the copy to memory is one part, and the time for
which its thread waits until the checkpoint is written (for the interpreter, or for memory). Time for which other work
has the cores does not count, nor does what the traffic of memory costs the steps, which is far less than what any other
work on the machine does to them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from fundamentallm import Callback, Config, DataConfig, ModelConfig, Trainer, TrainingConfig, Transformer
from fundamentallm.checkpoint import manager as checkpoint
from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.checkpoint.snapshot import Snapshot, take_snapshot
from fundamentallm.data.loaders import create_dataloaders
from fundamentallm.data.tokenizers import create_tokenizer
from fundamentallm.models.transformers_format import model_files
from tests.integration.runs import prose

QUIET = 5
"""Steps between two saves."""


def clock() -> float:
    """Seconds, without those in which this thread was ready and other work had the cores (where Linux counts them)."""
    try:
        queued = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        queued = 0.0
    return time.perf_counter() - queued


def waited() -> float:
    """Seconds for which this thread waited for something else than a core."""
    return clock() - time.thread_time()


def seconds(action: Callable[[], object]) -> float:
    begun = clock()
    action()
    return clock() - begun


class Saves(Callback):
    """Saves in both ways by turns, and notes what each takes, in seconds."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.quiet_steps, self.is_saving = rounds, 0, False
        self.calls: list[float] = []
        self.copies: list[float] = []
        self.waits: list[float] = []
        self.saves: list[float] = []
        self.begun = 0.0
        """When the call that saves returned, by `waited`."""

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After each step."""
        manager = trainer.checkpoint_manager
        assert manager is not None
        if self.is_saving:
            if manager._writer is None or not manager._writer.is_alive():
                self.waits.append(waited() - self.begun)
                self.is_saving, state, name = False, trainer.state.state_dict(), f"at_once_{trainer.global_step}"
                self.saves.append(seconds(lambda: manager.save(state, name, False, model_files(trainer))))
        elif len(self.saves) == self.rounds:
            trainer.request_stop("measured")
        else:
            self.quiet_steps += 1
            if self.quiet_steps % QUIET == 0:
                trainer.request_save()
                self.is_saving = True

    def watch(self, monkeypatched: type[CheckpointManager]) -> None:
        """Note what saving in the background, and the copying within it, take."""

        def save(manager: CheckpointManager, *arguments: Any) -> None:
            begun = clock()
            in_background(manager, *arguments)
            self.calls.append(clock() - begun)
            self.begun = waited()

        def copy(state: Any, name: str, is_best: bool, files: Any, copies: bool, *others: Any) -> Snapshot:
            begun = clock()
            snapshot = take_snapshot(state, name, is_best, files, copies, *others)
            if copies:
                self.copies.append(clock() - begun)
            return snapshot

        in_background = monkeypatched.save_in_background
        monkeypatched.save_in_background = save  # type: ignore[method-assign]
        checkpoint.take_snapshot = copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--width", type=int, default=384)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = prose(400_000)
    tokenizer = create_tokenizer("char", lambda: [text], lambda: [text])
    shape = ModelConfig(tokenizer.get_vocab_size(), d_model=options.width, num_layers=8)
    saves = Saves(options.rounds + 1)
    saves.watch(CheckpointManager)
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        training = TrainingConfig(
            batch_size=4, max_steps=10_000, log_every_n_steps=1, keep_last_n=1, checkpoint_dir=f"{folder}/checkpoints",
            save_every_n_epochs=None, eval_every_n_epochs=None,
        )  # fmt: skip
        config = Config(folder, shape, DataConfig(sequence_length=64), training)
        loader, _ = create_dataloaders(text, tokenizer, config)
        model = Transformer(shape)
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            Trainer(model, config, loader, None, [saves]).train()
        size = 3 * sum(parameter.nbytes for parameter in model.parameters())
    # The first gets its memory from the system, and the end of the run is saved too.
    rounds = list(zip(saves.calls, saves.copies, saves.waits, saves.saves, strict=False))[1:]
    print(f"{size / 1e6:,.0f} MB of state\n\n| | median, ms | from | to |\n| --- | --- | --- | --- |")
    titles = ("the call", "of it, the copy", "waited until it is written", "saved at once")
    for title, times in zip(titles, zip(*rounds, strict=True), strict=True):
        low, middle, high = (value * 1e3 for value in (min(times), statistics.median(times), max(times)))
        print(f"| {title} | {middle:,.1f} | {low:,.1f} | {high:,.1f} |")
    ratios = [(call - copy + wait) / save for call, copy, wait, save in rounds]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"\nlost beyond the copy / saved at once: {middle:.1%} (from {low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main()
