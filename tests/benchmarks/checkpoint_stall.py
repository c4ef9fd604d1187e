"""How long a checkpoint keeps the training waiting, compared with saving the same state in the foreground.

    python -m tests.benchmarks.checkpoint_stall [--rounds 10] [--width 384]

In one run, in turn: a checkpoint in the background, as runs save, and the same state saved while the training waits.
The loop loses the call that starts a background save, most of which is the copy to memory, and the time for which its
thread then waits until the checkpoint is written (for the GIL, or for memory). Time for which other work has the cores
does not count, nor does the memory traffic, which slows steps far less than any other work on the machine does.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from fundamentallm import Callback, Config, DataConfig, ModelConfig, Trainer, TrainingConfig, Transformer
from fundamentallm.checkpoint.snapshot import Snapshot
from fundamentallm.data.loaders import create_dataloaders
from fundamentallm.data.tokenizers import create_tokenizer
from fundamentallm.distributed.host_group import HostGroup
from tests.integration.runs import prose

QUIET = 5
"""Steps between two saves."""


def clock() -> float:
    """Returns seconds, without those in which this thread was ready and other work had the cores (Linux only)."""
    try:
        queued = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        queued = 0.0
    return time.perf_counter() - queued


def waited() -> float:
    """Returns the seconds for which this thread waited for something else than a core."""
    return clock() - time.thread_time()


def seconds(action: Callable[[], object]) -> float:
    begun = clock()
    action()
    return clock() - begun


class Saves(Callback):
    """Saves in both ways in turn, and measures them in seconds."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.quiet_steps, self.is_saving, self.waited_before = rounds, 0, False, 0.0
        self.calls: list[float] = []
        self.copies: list[float] = []
        self.waits: list[float] = []
        self.saves: list[float] = []

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After each step."""
        manager = trainer.checkpoint_manager
        assert manager is not None
        if self.is_saving:
            if all(thread.name != "checkpoint" for thread in threading.enumerate()):
                self.waits.append(waited() - self.waited_before)
                self.is_saving, state = False, trainer.state.state_dict()
                buffers = Snapshot(state, "s", False, {}, HostGroup(alone=True), {}).copies
                self.copies.append(seconds(lambda: Snapshot(state, "s", False, {}, HostGroup(alone=True), buffers)))
                self.saves.append(seconds(lambda: manager.save(state, f"now_{trainer.global_step}", False, {})))
        elif len(self.saves) == self.rounds:
            trainer.request_stop("measured")
        else:
            self.quiet_steps += 1
            if self.quiet_steps % QUIET == 0:
                state = trainer.state.state_dict()
                name = f"step_{trainer.global_step}"
                self.calls.append(seconds(lambda: manager.save_in_background(state, name, False, {})))
                self.is_saving, self.waited_before = True, waited()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--width", type=int, default=384)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = prose(400_000)
    tokenizer = create_tokenizer("char", text)
    shape = ModelConfig(tokenizer.get_vocab_size(), d_model=options.width, num_layers=8)
    saves = Saves(options.rounds + 1)
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
    # The first save gets its memory from the system.
    rounds = list(zip(saves.calls, saves.copies, saves.waits, saves.saves, strict=False))[1:]
    print(f"{size / 1e6:,.0f} MB of state\n\n| | median, ms | from | to |\n| --- | --- | --- | --- |")
    titles = ("the call", "a copy", "waited until it is written", "saved in the foreground")
    for title, times in zip(titles, zip(*rounds, strict=True), strict=True):
        low, middle, high = (value * 1e3 for value in (min(times), statistics.median(times), max(times)))
        print(f"| {title} | {middle:,.1f} | {low:,.1f} | {high:,.1f} |")
    ratios = [(call - copy + wait) / save for call, copy, wait, save in rounds]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"\nlost beyond the copy / saved in the foreground: {middle:.1%} (from {low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main()
