"""Measure a trained model on text: loss, perplexity and bits per byte, each with a confidence interval."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fundamentallm.commands.output import say, say_table
from fundamentallm.config.validation import AT_LEAST_ONE, Interval
from fundamentallm.errors import ConfigError
from fundamentallm.inference.loading import CHECKPOINT_HELP, open_model

if TYPE_CHECKING:
    from torch import Tensor

    from fundamentallm.inference.loading import Opened

CONFIDENCE = Interval(low=0, high=1, open_low=True, open_high=True)


class Text(NamedTuple):
    """What is evaluated."""

    name: str
    batches: Iterator[tuple[Tensor, Tensor]]
    """Inputs and targets, each (B, T), in the order of the text; a target that does not count is `IGNORE_INDEX`."""
    num_windows: int
    num_bytes: int | None
    """UTF-8 bytes of all targets; None where they are not known."""


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line; returns the exit code.

    Raises:
        FundamentaLLMError: if the checkpoint or the text cannot be opened, or a value is outside its range.
    """
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help=CHECKPOINT_HELP)
    parser.add_argument(
        "--source", nargs="+", metavar="TEXT",
        help="text files, folders or globs, each file a text by itself; without it, the run's own validation text",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens the model sees at once [the run's, or the model's longest]"
    )
    parser.add_argument(
        "--stride", type=int, metavar="N",
        help="tokens from one window to the next; fewer than the context: each token is judged with more text before "
        "it, for more time [the context, as in validation]",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="windows computed at once [8]")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="P", help="of the intervals [0.95]")
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    tasks = parser.add_argument_group("tasks of lm-eval, in place of a text (needs the extra 'eval')")
    tasks.add_argument("--tasks", nargs="+", metavar="TASK", help="their names, as `lm-eval ls tasks` lists them")
    tasks.add_argument("--include_path", type=Path, metavar="DIR", help="a folder of further tasks, as YAML")
    tasks.add_argument("--limit", type=int, metavar="N", help="documents of each task [all]")
    options = parser.parse_args(arguments)
    _check(options)
    if options.tasks is not None:
        from fundamentallm.inference.lm_eval_model import run_tasks

        opened = open_model(options.checkpoint)
        results = run_tasks(opened, options.tasks, options.include_path, options.limit, options.batch_size)
        _show_tasks(results, options.json)
        return 0
    _show(_evaluate(open_model(options.checkpoint), options), options.json)
    return 0


def _check(options: argparse.Namespace) -> None:
    ranges = {
        **dict.fromkeys(("context", "stride", "batch_size", "limit"), AT_LEAST_ONE),
        "confidence": CONFIDENCE,
    }
    problems = [
        f"--{name} is {value}; allowed: {allowed}."
        for name, allowed in ranges.items()
        if (value := getattr(options, name)) is not None and value not in allowed
    ]
    if options.tasks is not None:
        problems += [
            f"--{name} is given and so is --tasks; give one of them."
            for name in ("source", "context", "stride")
            if getattr(options, name) is not None
        ]
    else:
        problems += [
            f"--{name} is given and --tasks is not; name the tasks."
            for name in ("include_path", "limit")
            if getattr(options, name) is not None
        ]
    if problems:
        raise ConfigError(problems)


def _evaluate(opened: Opened, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from tqdm import tqdm

    from fundamentallm.config.schema import IGNORE_INDEX
    from fundamentallm.inference.scoring import interval, score

    text = _of_files(opened, options) if options.source else _of_run(opened, options)
    device = next(opened.model.parameters()).device
    losses: list[float] = []
    counts: list[int] = []
    with tqdm(total=text.num_windows, unit="window", disable=not sys.stderr.isatty()) as bar:
        for inputs, targets in text.batches:
            inputs, targets = inputs.to(device), targets.to(device)
            of_windows = score(opened.model, inputs, targets).losses.sum(-1, dtype=torch.float64)
            losses += of_windows.tolist()
            counts += (targets != IGNORE_INDEX).sum(-1).tolist()
            bar.update(len(inputs))
    count = sum(counts)
    if count == 0:
        raise ConfigError(f"{text.name} has no token after the first, which is what the model is judged by; give more.")
    loss = math.fsum(losses) / count
    found = interval(losses, counts, options.confidence)

    def all_measures(loss: float) -> dict[str, float]:
        measures = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
        return measures | ({"bits_per_byte": loss * count / math.log(2) / text.num_bytes} if text.num_bytes else {})

    bounds = [] if found is None else [all_measures(bound) for bound in found]
    measures = all_measures(loss)
    return {
        "checkpoint": str(opened.folder),
        "text": text.name,
        "targets": count,
        "bytes": text.num_bytes,
        "windows": len(losses),
        **measures,
        "confidence": options.confidence,
        "intervals": {name: [bound[name] for bound in bounds] for name in measures} if bounds else None,
    }


def _of_run(opened: Opened, options: argparse.Namespace) -> Text:
    """The validation text of the run that made the checkpoint."""
    from torch.utils.data import DataLoader

    from fundamentallm.checkpoint.manifest import MANIFEST
    from fundamentallm.checkpoint.reading import load_parts
    from fundamentallm.data.datasets import TokenDataset
    from fundamentallm.data.loaders import as_is, corpus_samples
    from fundamentallm.models.transformer import Transformer
    from fundamentallm.run.step_samples import corpus_of_run

    way_out = "name a text with --source."
    is_ours = (opened.folder / MANIFEST).exists()
    saved = load_parts(opened.folder, ("config", "progress_state_dict")) if is_ours else {}
    if not isinstance(saved.get("config"), dict) or not isinstance(saved["config"].get("data"), dict):
        raise ConfigError(f"{opened.folder} is of no run that names its text; {way_out}")
    try:
        data, corpus = corpus_of_run(opened.folder, saved["config"]["data"])
        _, dataset = corpus_samples(corpus, data.sequence_length, data.train_split < 1)
    except ConfigError as error:
        raise ConfigError([f"{problem} If the text has moved, {way_out}" for problem in error.problems]) from error
    if dataset is None:
        raise ConfigError(f"{opened.folder} is of a run without a validation text; {way_out}")
    name = ", ".join(data.sources())
    if data.mask_documents and isinstance(opened.model, Transformer):
        opened.model.document_start = corpus.end_of_text
    stretches = saved.get("progress_state_dict", {}).get("stretches") or [{}]
    if stretches[-1].get("content", [None, None])[1] not in (None, dataset.fingerprint()):
        raise ConfigError(f"{name} is another text than {opened.folder} was validated on; {way_out}")
    if options.context is not None or options.stride is not None:
        context = options.context or data.sequence_length
        if not isinstance(dataset, TokenDataset):
            raise ConfigError(
                f"--context or --stride is given, and {opened.folder} was validated on pairs or on several sources, "
                "whose samples are what they are; leave both out."
            )
        return _of_texts(opened, options, name, [dataset.tokens], dataset.num_bytes, context)
    batches = DataLoader(dataset, batch_size=options.batch_size, collate_fn=as_is)
    return Text(f"{name} (validation)", iter(batches), len(dataset), dataset.num_bytes)


def _of_files(opened: Opened, options: argparse.Namespace) -> Text:
    """Text files, each by itself."""
    import numpy as np

    from fundamentallm.config.files import kind_of_file, source_files
    from fundamentallm.config.schema import DataConfig
    from fundamentallm.data.encoding import encode_pieces
    from fundamentallm.data.sources import read_pieces
    from fundamentallm.data.tokenizers import num_bytes

    paths, texts, size = [], [], 0
    for source in options.source:
        try:
            found = source_files(DataConfig(), source)
        except ConfigError:
            found = []
        if not found or any(kind_of_file(path) != "text" for path in found):  # whose bytes are not the text
            raise ConfigError(
                f"--source is {source!r}; allowed: text files, folders with .txt or .md files, and globs."
            )
        paths += found
    for path in paths:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                pieces = list(encode_pieces(opened.tokenizer, read_pieces(file)))
        except ConfigError as error:
            raise ConfigError(f"--source has {str(path)!r}: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--source has {str(path)!r}, which cannot be read as UTF-8 text: {error}.") from error
        ids = np.concatenate([np.empty(0, np.uint16), *(ids for _, ids in pieces)])
        texts.append(ids)
        size += sum(len(piece.encode()) for piece, _ in pieces) - num_bytes(opened.tokenizer, ids[:1])
    name = options.source[0] if len(options.source) == 1 else f"{len(paths)} files"
    context = options.context or opened.context
    return _of_texts(opened, options, name, texts, size, context or max(map(len, texts)))


def _of_texts(
    opened: Opened, options: argparse.Namespace, name: str, texts: Sequence[Any], num_bytes: int | None, context: int
) -> Text:
    """Token ids of texts, in windows."""
    from fundamentallm.inference.scoring import windows

    stride, problems = options.stride or context, []
    if opened.context is not None and context > opened.context:
        problems.append(f"--context is {context}; allowed: at most {opened.context}, which the model was trained with.")
    if stride > context:
        problems.append(f"--stride is {stride}; allowed: at most the context, {context}, or tokens would be left out.")
    if problems:
        raise ConfigError(problems)
    found = [(ids, window) for ids in texts for window in windows(len(ids), context, stride)]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        import torch

        from fundamentallm.config.schema import IGNORE_INDEX

        for first in range(0, len(found), options.batch_size):
            some = found[first : first + options.batch_size]
            longest = max(window.end - window.start for _, window in some)
            # Shorter ones are filled up behind their tokens, which no causal model sees from there.
            inputs = torch.zeros(len(some), longest, dtype=torch.int64)
            targets = torch.full_like(inputs, IGNORE_INDEX)
            for row, (ids, window) in enumerate(some):
                tokens = torch.from_numpy(ids[window.start : window.end + 1].astype("int64"))
                inputs[row, : len(tokens) - 1] = tokens[:-1]
                targets[row, window.counted : len(tokens) - 1] = tokens[1 + window.counted :]
            yield inputs, targets

    return Text(name, batches(), len(found), num_bytes)


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    say(f"{result['checkpoint']} on {result['text']}: {result['targets']:,} tokens in {result['windows']:,} windows")
    units = {"loss": "nats per token", "perplexity": "", "bits_per_byte": ""}
    rows = []
    for name, unit in units.items():
        if name in result:
            bounds = result["intervals"] and result["intervals"][name]
            sure = f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else ""
            rows.append((name.replace("_", " "), f"{result[name]:.4f}", sure, unit))
    say_table([("", "", f"{result['confidence']:.0%} interval" if result["intervals"] else "", ""), *rows], "<><<")
    if not result["intervals"]:
        say("no intervals: the text is too short for them")


def _show_tasks(results: dict[str, dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(results))
        return
    rows = [
        (task, name, f"{value:.4f}" if isinstance(value, float) else str(value))
        for task, measures in results.items()
        for name, value in measures.items()
    ]
    say_table([("task", "measure", ""), *rows], "<<>")
