"""How long a checkpoint keeps the training waiting, beside the same state saved at once.

    python -m tests.benchmarks.checkpoint_stall [--rounds 5] [--width 512]

In one run, by turns: a checkpoint in the background, as runs save, whose loss is what the step that saves and the steps
until it is written take longer than others, and of it the copying to memory; and, outside the steps, the same state
saved while the training waits. The training has one thread, and the writing thread is taken to have a core of its own:
time for which other work has the cores does not count.
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
from fundamentallm.data.loaders import create_dataloaders
from fundamentallm.data.tokenizers import create_tokenizer
from fundamentallm.training import checkpoint
from fundamentallm.training.resume import model_files, run_state
from fundamentallm.training.snapshot import Snapshot, take_snapshot
from tests.integration.runs import prose

QUIET = 10
"""Steps between two saves, at least, in which nothing is saved."""


def clock() -> float:
    """Seconds, without those in which this thread was ready and other work had the cores (where Linux counts them)."""
    try:
        waited = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        waited = 0.0
    return time.perf_counter() - waited


class Saves(Callback):
    """Saves in all ways by turns, and notes what each takes, in seconds."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.quiet: list[float] = []
        self.saving: list[float] = []
        self.losses: list[float] = []
        self.copies: list[float] = []
        self.saves: list[float] = []
        self._mark, self._saves = 0.0, False

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After each step, before it is saved."""
        took, manager = clock() - self._mark, trainer.checkpoint_manager
        assert manager is not None
        if self._saves:
            self.saving.append(took)
            if manager._writer is None or not manager._writer.is_alive():
                self.losses.append(sum(self.saving) - len(self.saving) * statistics.median(self.quiet))
                self.saving.clear()
                self._saves = False
                self._save_and_wait(trainer)
        elif trainer.global_step > 1:
            self.quiet.append(took)
            if len(self.quiet) % QUIET == 0:
                if len(self.losses) == self.rounds:
                    trainer.request_stop("measured")
                else:
                    trainer.request_save()
                    self._saves = True
        self._mark = clock()

    def _save_and_wait(self, trainer: Trainer) -> None:
        manager, state = trainer.checkpoint_manager, run_state(trainer)
        assert manager is not None
        self.saves.append(
            seconds(lambda: manager.save(state, f"at_once_{trainer.global_step}", False, model_files(trainer)))
        )


def seconds(action: Callable[[], object]) -> float:
    begun = clock()
    action()
    return clock() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = prose(400_000)
    tokenizer = create_tokenizer("char", lambda: [text], lambda: [text])
    shape = ModelConfig(tokenizer.get_vocab_size(), d_model=options.width, num_layers=8)
    saves = Saves(options.rounds)

    def copying(state: Any, name: str, is_best: bool, files: Any, copy: bool, *others: Any) -> Snapshot:
        begun = clock()
        snapshot = take_snapshot(state, name, is_best, files, copy, *others)
        if copy:
            saves.copies.append(clock() - begun)
        return snapshot

    checkpoint.take_snapshot = copying
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
    print(f"{size / 1e6:,.0f} MB of state; a step takes {statistics.median(saves.quiet) * 1e3:,.0f} ms")
    print("| | median, ms | from | to |\n| --- | --- | --- | --- |")
    sides = {"copied": saves.copies, "saved at once": saves.saves, "lost by the loop": saves.losses}
    for name, times in sides.items():
        low, middle, high = (value * 1e3 for value in (min(times), statistics.median(times), max(times)))
        print(f"| {name} | {middle:,.0f} | {low:,.0f} | {high:,.0f} |")
    rounds = zip(saves.losses, saves.copies, saves.saves, strict=False)  # the end of the run is copied too
    ratios = [(loss - copy) / save for loss, copy, save in rounds][1:]  # the first gets its memory from the system
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"lost beyond the copy / saved at once: {middle:.1%} (from {low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main()
