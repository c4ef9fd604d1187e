"""Measure a trained model on text: loss, perplexity and bits per byte."""

import argparse
import json
import math
import sys
from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from fundamentallm.checkpoint.manifest import is_ours
from fundamentallm.checkpoint.reading import explained, load_parts
from fundamentallm.commands.common import BASE_HELP, add_checkpoint, option_problems, say, say_table
from fundamentallm.config.saved import saved_data_settings
from fundamentallm.config.schema import IGNORE_INDEX, DataConfig
from fundamentallm.config.validation import AT_LEAST_ONE, from_dict
from fundamentallm.data.corpus import Corpus, load_validation
from fundamentallm.data.loaders import collate, corpus_samples
from fundamentallm.distributed.batches import to_device
from fundamentallm.errors import ConfigError, Problem, raise_all
from fundamentallm.inference.generation import row_problem
from fundamentallm.inference.loading import LoadedModel, load_model
from fundamentallm.models.transformer import Transformer
from fundamentallm.models.transformers_format import TOKENIZER
from fundamentallm.models.with_loss import ModelWithLoss
from fundamentallm.run.progress import corpus_of_run
from fundamentallm.training.loss import create_loss

OTHER_TEXT = "Give a text with --source."
OF_TRAINING = ("source", "train_split", "streaming", "shuffle_buffer", "validation_tokens", "cache_dir")
"""Settings of a run's data that do not apply to --source."""


def main(arguments: Sequence[str], program: str) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add_checkpoint(parser)
    add("--base", metavar="DIR", help=BASE_HELP)
    add("--source", metavar="TEXT", help="text, as in data.source, all of it [the run's own validation text]")
    add("--context", type=int, metavar="INT", help="tokens the model sees at once [the run's, or the model's maximum]")
    add("--batch_size", type=int, default=8, metavar="INT", help="samples computed at once [8]")
    add("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    raise_all(option_problems(options, context=AT_LEAST_ONE, batch_size=AT_LEAST_ONE))
    loaded, total, count = load_model(options.checkpoint, options.base), 0.0, 0
    if options.context and loaded.context and options.context > loaded.context:
        allowed = f"at most {loaded.context}, which the model was trained with"
        raise ConfigError(Problem("--context", options.context, allowed))
    with explained(loaded.folder), torch.no_grad():
        data, corpus = _held_out(loaded, options.source)
        texts = corpus.validation or corpus.sources
        name, ids = ", ".join(text.name for text in texts), [text.validation.ids for text in texts]
        if unknown := row_problem(loaded.model, "--source", name, [int(part.max(initial=0)) for part in ids]):
            raise ConfigError(unknown)
        context = min(options.context or data.sequence_length, max(map(len, ids)) - 1)
        if context < 1:
            raise ConfigError(Problem("--source", name, "at least two tokens"))
        _, samples = corpus_samples(corpus, context)
        assert samples is not None
        if data.mask_documents and isinstance(loaded.model, Transformer):
            loaded.model.document_start = corpus.end_of_text
        loss_of = ModelWithLoss(loaded.model, create_loss()).eval()
        device = next(loaded.model.parameters()).device
        loader = DataLoader(samples, options.batch_size, collate_fn=collate)
        for batch in tqdm(loader, unit="batch", disable=not sys.stderr.isatty()):
            total += float(loss_of(to_device(batch, device)))
            count += int((batch[1] != IGNORE_INDEX).sum())
    loss, size = total / count, samples.num_bytes
    result = {"checkpoint": str(loaded.folder), "text": name, "targets": count, "bytes": size, "samples": len(samples)}
    result |= {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
    if size:
        result["bits_per_byte"] = total / math.log(2) / size
    if options.json:
        print(json.dumps(result))
        return 0
    say(f"{loaded.folder} on {name}: {count:,} tokens in {len(samples):,} samples")
    units = {"loss": "nats per token", "perplexity": "", "bits_per_byte": ""}
    say_table([(name.replace("_", " "), f"{result[name]:.4f}", units[name]) for name in units if name in result], "<><")
    return 0


def _held_out(loaded: LoadedModel, source: str | None) -> tuple[DataConfig, Corpus]:
    """Returns what a run of this model would validate on: `source`, or the text of the run that made it."""

    def refusal(reason: str) -> ConfigError:
        return ConfigError(Problem("--checkpoint", str(loaded.folder), "", OTHER_TEXT, reason))

    saved = load_parts(loaded.folder, ("config", "progress_state_dict")) if is_ours(loaded.folder) else {}
    settings = (saved.get("config") or {}).get("data")
    if source is not None:
        special = "text" if loaded.tokenizer.encode_special_tokens else "tokens"
        given = {"validation_source": source, "tokenizer": str(loaded.folder / TOKENIZER), "special_tokens": special}
        kept = {name: value for name, value in saved_data_settings(settings or {}).items() if name not in OF_TRAINING}
        length = {"sequence_length": loaded.context or DataConfig.sequence_length}
        data = from_dict(DataConfig, length | kept | given).resolved()
        end = None if data.end_of_text is None else loaded.tokenizer.token_to_id(data.end_of_text)
        try:
            found = load_validation(data, sys.stderr.isatty(), loaded.tokenizer)
        except ConfigError as error:  # its advice is about settings of a run
            of_source = {"setting": "--source", "advice": ""}
            named = [vars(one) | (of_source if one.setting.endswith("source") else {}) for one in error.problems]
            raise ConfigError([Problem(**one) for one in named]) from error
        return data, Corpus(loaded.tokenizer, [], end, found, data.packing)
    if settings is None:
        raise refusal("which does not record its text")
    try:
        data, corpus = corpus_of_run(loaded.folder, settings)
        _, samples = corpus_samples(corpus, data.sequence_length, data.train_split < 1)
    except ConfigError as error:
        raise ConfigError([*error.problems, Problem("", advice=f"If the text has moved: {OTHER_TEXT}")]) from error
    if samples is None:
        raise refusal("whose run had no validation text")
    segments = saved.get("progress_state_dict", {}).get("stretches") or [{}]
    if segments[-1].get("content", [None, None])[1] not in (None, samples.fingerprint()):
        raise refusal("whose validation text was another then")
    return data, corpus
