"""Measure a trained model on text: loss, perplexity and bits per byte."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm

from fundamentallm.checkpoint.manifest import is_ours
from fundamentallm.checkpoint.reading import explained, load_parts
from fundamentallm.commands.options import BASE_HELP, add_checkpoint, option_problems
from fundamentallm.commands.output import say, say_table
from fundamentallm.config.files import find_source
from fundamentallm.config.schema import IGNORE_INDEX, DataConfig
from fundamentallm.config.validation import AT_LEAST_ONE
from fundamentallm.data.datasets import TokenDataset
from fundamentallm.data.encoding import encode_pieces
from fundamentallm.data.loaders import collate, corpus_samples
from fundamentallm.data.sources import read_pieces
from fundamentallm.data.tokenizers import num_bytes, with_unknown
from fundamentallm.errors import ConfigError, Problem
from fundamentallm.inference.generation import row_problem
from fundamentallm.inference.loading import CHECKPOINT_HELP, LoadedModel, load_model
from fundamentallm.inference.scoring import Window, score, windows
from fundamentallm.models.transformer import Transformer
from fundamentallm.run.step_samples import corpus_of_run

OTHER_TEXT = "Give a text with --source."


Text = tuple[str, DataLoader[Any], int | None]
"""A text's name, its inputs and targets (B, T), and the UTF-8 bytes of all targets (None: unknown)."""


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add_checkpoint(parser, CHECKPOINT_HELP)
    add("--base", metavar="DIR", help=BASE_HELP)
    source = "text files, folders or globs; each file is a text by itself [the run's own validation text]"
    add("--source", nargs="+", metavar="TEXT", help=source)
    add("--context", type=int, metavar="INT", help="tokens the model sees at once [the run's, or the model's maximum]")
    stride = "tokens from one window to the next; less than the context gives tokens more context, but takes longer"
    add("--stride", type=int, metavar="INT", help=f"{stride} [the context, as in validation]")
    add("--batch_size", type=int, default=8, metavar="INT", help="windows computed at once [8]")
    add("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if problems := option_problems(options, context=AT_LEAST_ONE, stride=AT_LEAST_ONE, batch_size=AT_LEAST_ONE):
        raise ConfigError(problems)
    loaded = load_model(options.checkpoint, options.base)
    with explained(loaded.folder):
        name, loader, size = (_text_of_files if options.source else _text_of_run)(loaded, options)
        total, count = _score(loaded.model, loader)
    if count == 0:
        raise ConfigError(Problem("--source", name, "at least two tokens", reason="which has no target"))
    loss, num_windows = total / count, len(loader.dataset)  # type: ignore[arg-type]
    result = {"checkpoint": str(loaded.folder), "text": name, "targets": count, "bytes": size, "windows": num_windows}
    result |= {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
    if size:
        result["bits_per_byte"] = total / math.log(2) / size
    if options.json:
        print(json.dumps(result))
        return 0
    say(f"{loaded.folder} on {name}: {count:,} tokens in {num_windows:,} windows")
    units = {"loss": "nats per token", "perplexity": "", "bits_per_byte": ""}
    say_table([(name.replace("_", " "), f"{result[name]:.4f}", units[name]) for name in units if name in result], "<><")
    return 0


def _score(model: nn.Module, loader: DataLoader[Any]) -> tuple[float, int]:
    """Returns the sum of the losses of all targets, and their number."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    for inputs, targets in tqdm(loader, unit="batch", disable=not sys.stderr.isatty()):
        total += float(score(model, inputs.to(device), targets.to(device)).sum(dtype=torch.float64))
        count += int((targets != IGNORE_INDEX).sum())
    return total, count


def _text_of_run(loaded: LoadedModel, options: argparse.Namespace) -> Text:
    """Returns the validation text of the run that made the checkpoint."""

    def refusal(reason: str) -> ConfigError:
        return ConfigError(Problem("--checkpoint", str(loaded.folder), "", OTHER_TEXT, reason))

    saved = load_parts(loaded.folder, ("config", "progress_state_dict")) if is_ours(loaded.folder) else {}
    if not isinstance(saved.get("config"), dict) or not isinstance(saved["config"].get("data"), dict):
        raise refusal("which does not record its text")
    try:
        data, corpus = corpus_of_run(loaded.folder, saved["config"]["data"])
        _, dataset = corpus_samples(corpus, data.sequence_length, data.train_split < 1)
    except ConfigError as error:
        raise ConfigError([*error.problems, Problem("", advice=f"If the text has moved: {OTHER_TEXT}")]) from error
    if dataset is None:
        raise refusal("whose run had no validation text")
    name = ", ".join(data.sources())
    segments = saved.get("progress_state_dict", {}).get("stretches") or [{}]
    if segments[-1].get("content", [None, None])[1] not in (None, dataset.fingerprint()):
        raise refusal(f"whose validation text was another than {name} is now")
    if data.mask_documents and isinstance(loaded.model, Transformer):
        loaded.model.document_start = corpus.end_of_text
    if isinstance(dataset, TokenDataset):
        return _windowed(loaded, options, name, [dataset.tokens], dataset.num_bytes, data.sequence_length)
    if options.context or options.stride:
        raise ConfigError("Omit --context and --stride: validation samples of pairs or several sources have one size.")
    return name, DataLoader(dataset, options.batch_size, collate_fn=collate), dataset.num_bytes


def _text_of_files(loaded: LoadedModel, options: argparse.Namespace) -> Text:
    """Returns text files, each a text by itself."""
    paths, texts, size = list[Path](), [], 0
    for source in options.source:
        found = None
        with suppress(ConfigError):
            found = find_source(DataConfig(), source)
        if found is None or found.kind != "text":
            raise ConfigError(Problem("--source", source, "text files, folders with .txt or .md files, and globs"))
        paths += found.files
    for path in paths:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                pieces = list(encode_pieces(with_unknown(loaded.tokenizer), read_pieces(file)))
        except (OSError, UnicodeError) as error:
            raise ConfigError(Problem("--source", str(path), reason=f"which cannot be encoded: {error}")) from error
        if lacking := [piece for piece in pieces if piece.unknown]:
            reason = f"which has {lacking[0].unknown[0][1]!r}"
            raise ConfigError(Problem("--source", str(path), "text that the model's vocabulary has", reason=reason))
        ids = np.concatenate([np.empty(0, np.uint16), *(piece.ids for piece in pieces)])
        if problem := row_problem(loaded.model, "--source", str(path), ids.tolist()):
            raise ConfigError(problem)
        texts.append(ids)
        size += sum(len(piece.text.encode()) for piece in pieces) - num_bytes(loaded.tokenizer, ids[:1])
    name = options.source[0] if len(options.source) == 1 else f"{len(paths)} files"
    return _windowed(loaded, options, name, texts, size, loaded.context or max(map(len, texts)))


def _windowed(
    loaded: LoadedModel,
    options: argparse.Namespace,
    name: str,
    texts: Sequence[NDArray[np.integer]],
    num_bytes: int | None,
    context: int,
) -> Text:
    """Split texts, given as token ids, into windows of `context` tokens, unless the options say otherwise."""
    context, problems = options.context or context, []
    stride = options.stride or context
    if loaded.context is not None and context > loaded.context:
        problems.append(Problem("--context", context, f"at most {loaded.context}, which the model was trained with"))
    if stride > context:
        problems.append(Problem("--stride", stride, f"at most the context, {context}, so that no token is skipped"))
    if problems:
        raise ConfigError(problems)
    found: Any = [(ids, window) for ids in texts for window in windows(len(ids), context, stride)]
    return name, DataLoader(found, options.batch_size, collate_fn=_padded), num_bytes


def _padded(found: Sequence[tuple[NDArray[np.integer], Window]]) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets of windows over token ids, padded at the end, which a causal model does not see."""
    tokens = [torch.from_numpy(ids[window.start : window.end + 1].astype("int64")) for ids, window in found]
    inputs = pad_sequence([part[:-1] for part in tokens], batch_first=True)
    targets = pad_sequence([part[1:] for part in tokens], batch_first=True, padding_value=IGNORE_INDEX)
    for row, (_, window) in zip(targets, found, strict=True):
        row[: window.counted] = IGNORE_INDEX
    return inputs, targets
