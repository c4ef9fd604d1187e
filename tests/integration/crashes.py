"""Kills a real run at many instants and starts it again by the same command: it must end as if nothing had happened.

By hand: `python -m tests.integration.crashes --kills 200 [--processes 2] [--seed N]`, or `--windows`. Linux only.

A run is killed by SIGKILL at the n-th event (see `trap`) or after a time. After each kill no checkpoint may be gone or
damaged. In the end weights, state and metrics.jsonl are those of an uninterrupted run, to the bit, and no unfinished
files are left. Starts are forked from this interpreter, which has imported everything (0.1 s instead of 2).
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # with the next ones, what a start imports only when it needs it
from transformers import Qwen3Config, Qwen3ForCausalLM

import fundamentallm.train
import fundamentallm.training.trainer
from fundamentallm import CheckpointManager, create_tokenizer
from fundamentallm.checkpoint.manifest import verify
from fundamentallm.checkpoint.reading import load_checkpoint
from fundamentallm.errors import START_AGAIN
from fundamentallm.training.metrics import MEASURED
from tests.integration.runs import lines, prose, timeless
from tests.integration.trap import LAST_STEP, VALIDATION_FORWARD, Instant, Trap

COMMAND = ["--config", "config.yaml"]
# 6,000 characters, 90 % of them for training, in windows of 16 and batches of 64 make 6 steps an epoch. The largest
# validation loss counts as the best here, which is the first: a start that forgets it takes a later one.
WHOLE = "model: {d_model: 16, num_heads: 2, num_layers: 1, dropout: 0.2}"
ADAPTER = "model: {pretrained: base, lora: {dropout: 0.2, targets: all-linear}}"
TEXT = "data: {source: text.txt, sequence_length: 16, cache_dir: cache}"
# A pass over the two files takes a little more than 5 steps.
STREAM = """data:
  {source: "part*.txt", streaming: true, tokenizer: byte, sequence_length: 16,
   shuffle_buffer: 20, validation_tokens: 600}"""
CONFIG = f"""
output_dir: run
{WHOLE}
{TEXT}
training:
  batch_size: 64
  micro_batch_size: 40
  max_steps: {LAST_STEP}
  learning_rate: 0.3
  lr_scheduler: constant
  warmup_steps: 3
  log_every_n_steps: 2
  eval_every_n_steps: 4
  eval_every_n_epochs: 1
  save_every_n_steps: 3
  save_every_n_epochs: null
  keep_last_n: 2
  early_stopping_patience: 50
  early_stopping_mode: max
callbacks: ["tests.integration.trap:Marks"]
sample_tokens: 0
"""
FORK = multiprocessing.get_context("fork")
ROOT = Path(__file__).parents[2]
START_LIMIT = 60.0
"""Seconds that a start may take; far more than it does, for busy machines."""
GRACE = 10.0
"""Seconds that a process has to end by itself after another of its group was killed, and then to end on SIGTERM."""
LOCK = ".fundamentallm.lock"
IN_OUTPUT_DIR = {
    *(LOCK, "checkpoints", "metrics.jsonl", "status.json", "starts.jsonl", "curves.png"),
    # Drawings that a kill left unfinished. The next drawing, which forked starts lack, overwrites them.
    *(".curves.png", "curves.png.new"),
}


class CrashError(AssertionError):
    """What a run must never do."""


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def train_here(folder: Path, environment: dict[str, str], log: Path, instant: Instant | None, last: Any) -> None:
    """Train in this forked process."""
    die_with_parent()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))  # not pytest's
    os.chdir(folder)
    os.environ.update(environment)
    faulthandler.dump_traceback_later(START_LIMIT / 2)  # where it hangs, if it does
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # drawing would take most of the time
    trap = Trap(folder, instant, last)
    trap.arm()
    try:
        code = fundamentallm.train.main(COMMAND)
    finally:
        trap.disarm(log.with_suffix(".counts"))
    sys.exit(code)


# ---- in the harness ----------------------------------------------------------------------------------------


class Case:
    """A run in its own folder, started until it is finished."""

    def __init__(self, folder: Path, processes: int, kind: str = "") -> None:
        """`kind` is adapter (of peft), stream, or "" for a whole model and a text in the cache."""
        self.folder, self.processes = folder.resolve(), processes
        self.hits: list[str] = []
        """Where kills found it."""
        self.starts, self.seconds, self.was_stopped, self.has_lost = 0, 0.0, False, False
        self.counts: list[Counter[str]] = []
        self._newest = -1
        self.folder.mkdir(parents=True)
        config, text = CONFIG, prose()
        if kind == "adapter":
            config = config.replace(WHOLE, ADAPTER)
            write_base(self.folder / "base")
        if kind == "stream":
            config = config.replace(TEXT, STREAM).replace("eval_every_n_epochs: 1", "eval_every_n_epochs: null")
        (self.folder / "config.yaml").write_text(config)
        for name, part in {"text": text, "part1": text[:2000], "part2": text[2000:]}.items():
            (self.folder / f"{name}.txt").write_text(part)
        self._logs = self.folder.with_name(self.folder.name + ".logs")
        self._logs.mkdir()

    def start(self, instant: Instant | None = None, as_launcher: bool = True) -> bool:
        """Start the run on all its processes and wait until they have ended; returns True if the run is finished.

        Args:
            instant: when it is killed.
            as_launcher: send the other processes SIGTERM at once when one is killed, as a launcher does. Otherwise
                they have to notice by themselves.

        Raises:
            CrashError: if it ends neither killed nor finished, does not end, or a kill cost a checkpoint.
        """
        self.starts += 1
        began = time.monotonic()
        lasts = [FORK.RawArray("c", 256) for _ in range(self.processes)]
        started = self._launch(instant, lasts)
        victim = started[instant.rank if instant else 0]
        try:
            victim.join(START_LIMIT if instant is None or instant.label is not None else instant.nth / 1000)
            if victim.exitcode is None and instant is not None and instant.label is None:
                _send(victim, instant.number)
                victim.join(START_LIMIT)
            if victim.exitcode is None:
                self.fail(f"still running after {START_LIMIT:.0f} s")
            was_killed = victim.exitcode in (-signal.SIGKILL, -signal.SIGTERM)
            for process in started:
                if not (was_killed and as_launcher):
                    process.join(GRACE if was_killed else START_LIMIT)
                _send(process, signal.SIGTERM)
                process.join(GRACE)
        finally:
            for process in started:
                _send(process, signal.SIGKILL)
                process.join(START_LIMIT)
        self.seconds += time.monotonic() - began
        codes = [process.exitcode for process in started]
        if was_killed:
            assert instant is not None
            last = lasts[instant.rank].value.decode(errors="replace") or "nothing"
            where = last if instant.label is not None else f"some time after: {last}"
            self.hits.append(where)
        elif any(code not in (0, START_AGAIN) for code in codes):
            self.fail(f"exit codes {codes}")
        else:
            self.counts = [Counter(json.loads(self._log(rank, "counts").read_text())) for rank in range(self.processes)]
        self.was_stopped |= START_AGAIN in codes
        self._check_checkpoints()
        return not any(codes)

    def _launch(self, instant: Instant | None, lasts: list[Any]) -> list[ForkProcess]:
        port, started = _free_port(), []
        for rank in range(self.processes):
            environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            if self.processes > 1:
                environment |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.processes),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
                }  # fmt: skip
            mine = instant if instant is not None and instant.rank == rank else None
            arguments = (self.folder, environment, self._log(rank), mine, lasts[rank])
            started.append(FORK.Process(target=train_here, args=arguments))
            started[-1].start()
        return started

    def _log(self, rank: int, suffix: str = "log") -> Path:
        return self._logs / f"start_{self.starts:03d}_rank_{rank}.{suffix}"

    def _check_checkpoints(self) -> None:
        """Check that every checkpoint is intact, and that the newest is not older than before."""
        folder, newest = self.folder / "run" / "checkpoints", -1
        # One that was being replaced is in a hidden folder, and is restored by the next start.
        for path in [*folder.glob("step_*"), *folder.glob(".replaced-step_*")]:
            try:
                newest = max(newest, verify(path)["step"])
            except Exception as error:
                self.fail(f"{path.name} is damaged: {error}")
        if newest < self._newest:
            self.fail(f"the newest checkpoint was of step {self._newest}, and now is of step {newest}")
        self._newest = newest

    def check(self, reference: Case) -> None:
        """Compare a finished run with the uninterrupted one."""
        mine, other = (case.folder / "run" for case in (self, reference))
        if timeless(lines(mine)) != timeless(lines(other)):
            self.fail(f"metrics.jsonl differs from {other}'s")
        best, best_of_other = (CheckpointManager(run / "checkpoints").get_best() for run in (mine, other))
        assert best_of_other is not None
        if best is None or best.name != best_of_other.name:
            self.fail(f"the best checkpoint is {best and best.name}, not {best_of_other.name}")
        found, expected = ({path.name for path in (run / "checkpoints").iterdir()} for run in (mine, other))
        # A run that was stopped has saved at other steps too, which count among the last.
        # From a mirror come only the newest and the best, perhaps of a run that was at its end already.
        if not self.was_stopped and not (found == expected or (self.has_lost and found < expected)):
            self.fail(f"the checkpoint folder holds {sorted(found)}, not {sorted(expected)}")
        if odd := {name for name in found if not name.startswith("step_")} - {LOCK}:
            self.fail(f"left in the checkpoint folder: {sorted(odd)}")
        if max(found) != max(expected):
            self.fail(f"the last checkpoint is {max(found)}, not {max(expected)}")
        for name in sorted(found & expected - {LOCK}):
            one, another = (load_checkpoint(run / "checkpoints" / name) for run in (mine, other))
            if different := differences(one, another):
                self.fail(f"{name} differs in {different[:5]}")
        if odd := {re.sub(r"\d+", "N", path.name) for path in mine.iterdir()} - IN_OUTPUT_DIR:
            self.fail(f"left in the output folder: {sorted(odd)}")
        status = json.loads((mine / "status.json").read_text())
        if status["state"] != "finished":
            self.fail(f"status.json is {status}")
        texts = "".join(path.read_text(errors="replace") for path in self._logs.glob("*.log"))
        if self.processes > 1 and f"{self.processes} processes on cpu" not in texts:
            self.fail(f"it was not a group of {self.processes} processes")

    def lose_disk(self) -> None:
        """Delete everything that the run has written."""
        shutil.rmtree(self.folder / "run")
        self._newest, self.has_lost = -1, True

    def remove(self) -> None:
        shutil.rmtree(self.folder)
        shutil.rmtree(self._logs)

    def fail(self, what: str) -> None:
        texts = "".join(
            f"---- {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self._logs.glob(f"start_{self.starts:03d}*.log"))
        )
        history = "\n".join(f"  killed: {hit}" for hit in self.hits)
        raise CrashError(f"{self.folder}, start {self.starts}: {what}\n{history}\n{texts}")


def write_base(folder: Path) -> None:
    """Write a tiny model of transformers."""
    tokenizer = create_tokenizer("char", prose())
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = Qwen3Config(vocab_size=tokenizer.get_vocab_size(), num_key_value_heads=2, head_dim=8, **sizes)
    torch.manual_seed(0)
    Qwen3ForCausalLM(shape).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def _send(process: ForkProcess, number: signal.Signals) -> None:
    if process.exitcode is None:
        assert process.pid is not None
        os.kill(process.pid, number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def differences(one: object, other: object, path: str = "") -> list[str]:
    """Returns the paths at which two checkpoints differ, except for measured times and the place of the mirror."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = (one.keys() | other.keys()) - MEASURED - {"mirror"}
        return [found for key in sorted(keys) for found in differences(one.get(key), other.get(key), f"{path}/{key}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)  # NaN is NaN
    else:
        same = one == other
    return [] if same else [path]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---- chosen instants ---------------------------------------------------------------------------------------

METRICS, CHECKPOINTS = "run/metrics.jsonl", "run/checkpoints"
STAGED, SAVED, DELETING = (f"{CHECKPOINTS}/{name}step_N" for name in (".staging-", "", ".deleting-"))
PUBLISHES = f"rename {STAGED} -> {SAVED}"
WINDOWS: dict[str, tuple[int, str, list[Instant]]] = {
    "whole": (1, "", [
        Instant("rename cache/.staging -> cache/KEY"),
        Instant(PUBLISHES),  # the first checkpoint gets its name
        Instant(f"rename {METRICS}.new -> {METRICS}"),  # lines without a checkpoint were moved
        Instant(f"write {METRICS}", 3),
        Instant(f"write {STAGED}/manifest.json"),
        Instant(f"rename {METRICS}.new -> {METRICS}"),  # the log was rewound
        Instant(VALIDATION_FORWARD, 2),
        Instant(f"remove {DELETING}/model.safetensors"),  # an old checkpoint is half deleted
        Instant(f"read {CHECKPOINTS}/step_LAST/manifest.json"),
        Instant(f"rename {SAVED} -> {DELETING}"),  # by a run that is finished
    ]),
    # A run that is stopped while it validates saves. The next start validates, finds its best, and saves the same step.
    "replacing": (1, "", [
        Instant(VALIDATION_FORWARD, number=signal.SIGTERM),
        Instant(PUBLISHES),
        Instant(f"rename {CHECKPOINTS}/.replaced-step_N -> {SAVED}"),
    ]),
    "adapter": (1, "adapter", [Instant(PUBLISHES, 2), Instant(VALIDATION_FORWARD, 2)]),
    "stream": (1, "stream", [Instant(PUBLISHES, 2), Instant(VALIDATION_FORWARD, 2)]),
    "two processes": (2, "", [
        Instant(PUBLISHES, 2),
        Instant(f"read {SAVED}/manifest.json", rank=1),
        Instant(VALIDATION_FORWARD, rank=1),
    ]),
}  # fmt: skip
"""Processes, kind of run, and instants: changes of names, and what a kill there leaves to the next start.

The kills of a row hit one run, each in a start of its own. Random instants find the others."""


def kill_in_windows(folder: Path, name: str) -> Case:
    """Kill a run at each of the chosen instants.

    Raises:
        CrashError: if one is not reached, or the run does not end as the uninterrupted one.
    """
    processes, kind, instants = WINDOWS[name]
    reference, case = uninterrupted(folder, processes, kind), Case(folder / "case", processes, kind)
    for index, instant in enumerate(instants):
        before = len(case.hits)
        done = case.start(instant, as_launcher=index % 3 != 1)
        if done or (instant.number == signal.SIGKILL and len(case.hits) == before):
            case.fail(f"it was not killed in the window: {instant}")
    if not case.start():
        case.fail("it is not finished")
    case.check(reference)
    return case


# ---- random instants ---------------------------------------------------------------------------------------


def draw(chance: random.Random, counts: list[Counter[str]], seconds: float) -> Instant:
    """Returns an instant of a start that has these events on each of its processes and takes this long.

    Half of them are uniform over time or over all events, which is where a run spends its time. The others choose the
    label first, so that what happens once is hit as often as what happens at every step.
    """
    rank = chance.randrange(len(counts))
    # A run that is stopped by SIGTERM while it validates saves the same step twice, which replaces a checkpoint.
    number = signal.SIGTERM if chance.random() < 0.1 else signal.SIGKILL
    kind = chance.choices(("time", "any event", "one event"), (0.35, 0.15, 0.5))[0]
    if kind == "time" or not counts[rank]:
        return Instant(None, chance.randrange(1, int(seconds * 1000)), rank, number)
    label = "" if kind == "any event" else chance.choice(sorted(counts[rank]))
    total = counts[rank][label] if label else sum(counts[rank].values())
    return Instant(label, chance.randint(1, total), rank, number)


def kill_at_random(folder: Path, processes: int, kind: str, kills: int, seed: int) -> list[Case]:
    """Kill runs at random instants until they are finished, one run after the other.

    Raises:
        CrashError: if one of them does not end as the uninterrupted run.
    """
    chance, cases = random.Random(seed), list[Case]()
    reference = uninterrupted(folder, processes, kind)
    counts, seconds, done = [Counter(count) for count in reference.counts], reference.seconds, 0
    while done < kills:
        case = Case(folder / f"case_{len(cases):03d}", processes, kind)
        while True:
            instant = draw(chance, counts, seconds) if len(case.hits) < 15 else None
            if case.start(instant, as_launcher=chance.random() < 0.7):
                break
        case.check(reference)
        for known, seen in zip(counts, case.counts, strict=False):
            known |= seen  # the events of a start that resumes
        done += len(case.hits)
        cases.append(case)
        print(f"run {len(cases)}: {len(case.hits)} kills in {case.starts} starts; {done} kills", flush=True)
        case.remove()
    return cases


def uninterrupted(folder: Path, processes: int, kind: str) -> Case:
    case = Case(folder / "uninterrupted", processes, kind)
    if not case.start():
        raise CrashError("the uninterrupted run is not finished")
    return case


def summary(cases: list[Case]) -> str:
    hits = Counter(hit for case in cases for hit in case.hits)
    starts, seconds = sum(case.starts for case in cases), sum(case.seconds for case in cases)
    return "\n".join(
        [
            *(f"{count:5d}  {where}" for where, count in hits.most_common()),
            f"{sum(hits.values())} kills; {len(cases)} runs, {starts} starts, {seconds:.0f} s: "
            "each ended as the uninterrupted one, to the bit",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", action="store_true", help="kill at chosen instants of all kinds of runs instead")
    parser.add_argument("--kills", type=int, default=200, help="at random, at least")
    kinds = "train an adapter of peft, or read a stream, instead of a whole model and a text in the cache"
    parser.add_argument("--kind", choices=("adapter", "stream"), default="", help=kinds)
    parser.add_argument("--processes", type=int, default=1, help="of each run, in a gloo group")
    parser.add_argument("--seed", type=int, default=None, help="of the instants")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.kind == "adapter":
        import peft  # noqa: F401  # once here, rather than in every process that is forked
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    folder = Path(tempfile.mkdtemp(prefix="crashes-"))
    print(f"{'' if arguments.windows else f'seed {seed}, '}in {folder} (kept if a run fails)", flush=True)
    if arguments.windows:
        cases = [kill_in_windows(folder / name, name) for name in WINDOWS]
    else:
        cases = kill_at_random(folder, arguments.processes, arguments.kind, arguments.kills, seed)
    print(summary(cases))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
