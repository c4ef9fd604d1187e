"""What a run starts from: a checkpoint that it resumes, the weights of one (`init_from`), or a pretrained model."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.checkpoint.manifest import STATE, is_ours, read_manifest, verify
from fundamentallm.checkpoint.reading import Like, explained, load_checkpoint, load_parts, load_weights
from fundamentallm.config.schema import END_OF_TEXT, Config, DataConfig, ModelConfig
from fundamentallm.config.validation import expand_user
from fundamentallm.data.tokenizers import create_tokenizer, read_tokenizer, same_tokenizer
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import CheckpointError, ConfigError, Problem, printable, raise_all
from fundamentallm.models.adapters import add_lora
from fundamentallm.models.transformers_format import TOKENIZER, WEIGHTS, Pretrained, find_pretrained, transformers_model
from fundamentallm.run.folder import LOCK, LOGS
from fundamentallm.run.state import RunState


def choose_checkpoint(
    wanted: str, manager: CheckpointManager | None, say: Callable[[str], None]
) -> tuple[Path | None, Path | None, bool]:
    """Chooses the checkpoint to resume from; `wanted` is `training.resume`: auto, never, or a path.

    The same command launches and relaunches a run, so a path applies only until the run has saved a checkpoint of its
    own. Returns the verified checkpoint (None: the run begins), the one that `resume` names, and whether the run
    returns to an earlier checkpoint of its own. Raises ConfigError if the folder is in use, or holds another run, whose
    checkpoints would be rotated away; CheckpointError if there are checkpoints but none is intact.
    """
    if wanted == "never":
        if manager is not None:
            folder, url = manager.checkpoint_dir, manager.mirror.url
            is_used = any(path.name != LOCK for path in folder.glob("*"))
            with explained(url, "the mirror cannot be read"):
                if is_used or (url and manager.mirror.newest_first([], say)):
                    advice = "Choose another output_dir (and mirror), or set resume: auto to resume that run."
                    reason = f"and {folder if is_used else url} already holds a run"
                    raise ConfigError(Problem("training.resume", "never", advice=advice, reason=reason))
        return None, None, False
    newest, skipped = manager.newest_anywhere(say) if manager is not None else (None, [])
    for reason in skipped:
        say(f"skipping checkpoint {reason}")
    if wanted == "auto":
        if newest is None and skipped and manager is not None:
            advice = "Choose another output_dir (and mirror), or move the checkpoints away."
            raise CheckpointError("\n  ".join([f"All checkpoints of this run are damaged. {advice}", *skipped]))
        return newest, None, False
    path = Path(expand_user(wanted)).absolute()
    if manager is not None and newest is not None:
        progress = load_parts(newest, ["progress_state_dict"]).get("progress_state_dict")
        if isinstance(progress, dict) and progress.get("origin") == str(path):
            return newest, path, False
        if path.parent.resolve() != manager.checkpoint_dir.resolve():
            advice = "Choose another output_dir (and mirror)."
            reason = f"and {manager.checkpoint_dir} holds another run, whose checkpoints would be rotated away"
            raise ConfigError(Problem("training.resume", str(path), advice=advice, reason=reason))
    verify(path)
    return path, path, newest is not None


def fetch_lost(config: Config) -> None:
    """Copies the newest checkpoint of the mirror if the run's folder has none, before anything reads it."""
    manager, training = CheckpointManager(config.folder_of_checkpoints()), config.training
    if training.mirror is not None and training.resume != "never" and manager.get_latest() is None:
        manager.mirror.set_url(training.mirror, {Path(config.output_dir, name) for name in LOGS})
        manager.newest_anywhere(lambda text: print(printable(text), flush=True))


def resume(
    wanted: str,
    manager: CheckpointManager | None,
    group: HostGroup,
    like: Callable[[], Like | None],
    restore: Callable[[dict[str, Any], Path], None],
    say: Callable[[str], None],
) -> tuple[Path | None, Path | None, bool]:
    """Chooses the checkpoint to resume from and restores it, on all processes together. See `choose_checkpoint`.

    `like` returns which shards of the tensors to read (see `RunState.like`). `restore` gives the run what was read.
    """
    choice = group.from_main(lambda: choose_checkpoint(wanted, manager, say))
    path = choice[0]
    if path is None:
        return choice
    sha256 = group.from_main(lambda: read_manifest(path)["sha256"])
    with group.barrier_with_errors():
        if read_manifest(path)["sha256"] != sha256:
            advice = "training.checkpoint_dir has to be a folder that all machines share."
            raise CheckpointError(f"{path} differs between this machine and the first one; {advice}")
        restore(load_checkpoint(path, like(), hashed=()), path)
    if manager is not None:
        # A process that was killed after its save may not have rotated. All processes call this, whatever they see.
        group.from_main(lambda: manager.rotate() if path == manager.get_latest() else None)
        group.from_main(manager.mirror.request)
    return choice


def learned_tokenizer(config: Config) -> Tokenizer | None:
    """Returns the tokenizer that the run learned from its text when it began, or None. A grown text gives others."""
    wanted, data = config.training.resume, config.data
    manager = CheckpointManager(config.folder_of_checkpoints())
    path = manager.get_latest() or (None if wanted in ("auto", "never") else Path(expand_user(wanted)))
    if path is None or data.tokenizer.endswith(".json"):
        return None
    try:
        verify(path, hashed=[STATE, TOKENIZER])
    except CheckpointError:  # `resume` reports it, and takes an earlier one
        path = manager.newest_intact()[0]
    if path is None or not (path / TOKENIZER).is_file():
        return None
    with explained(path):
        saved = load_parts(path, ["config"])["config"].get("data", {})
        is_same = saved.get("tokenizer") == data.tokenizer and data.end_of_text in ("auto", saved.get("end_of_text"))
        return read_tokenizer(path / TOKENIZER) if is_same else None


def check_tokenizer(checkpoint: Path, tokenizer: Tokenizer | None) -> None:
    """Raises ConfigError if a checkpoint has another tokenizer than the one that the run reads its text with."""
    path = checkpoint / TOKENIZER
    if tokenizer is not None and path.is_file() and not same_tokenizer(saved := read_tokenizer(path), tokenizer):
        has_end, had_end = (each.token_to_id(END_OF_TEXT) is not None for each in (tokenizer, saved))
        back = "Set data.end_of_text to null" if has_end and not had_end else "Set it back"
        text = f"{checkpoint} was trained with another tokenizer or end_of_text"
        advice = f"{back}, or give a copy of {path}: a tokenizer belongs to the weights."
        raise ConfigError(Problem("data.tokenizer", None, advice=advice, text=text))


def open_pretrained(config: Config) -> tuple[Config, Pretrained | None, nn.Module | None]:
    """Opens the folder that `model.pretrained` names, if any, on all processes together; see `completed`.

    Returns the config completed from the folder, the folder, and the model if transformers makes it.
    """
    name, lora = config.model.pretrained, config.model.lora
    if name is None:
        return config, None, None
    with HostGroup().barrier_with_errors():
        config, pretrained = completed(config)
        model = None if pretrained.shape is not None else transformers_model(pretrained)
        if model is not None and lora is not None:
            torch.manual_seed(config.training.seed)
            model = add_lora(model, lora, name, pretrained.folder)
        return config, pretrained, model


def completed(config: Config) -> tuple[Config, Pretrained]:
    """Returns the config with shape and tokenizer of the model folder `model.pretrained`, and the folder.

    Raises CheckpointError if it is damaged; ConfigError if it cannot be used, or contradicts other settings.
    """
    model, data, name = config.model, config.data, config.model.pretrained or ""
    with explained(Path(name)):
        pretrained = find_pretrained(name)
        if model.lora is not None:  # peft adapts transformers' modules
            pretrained = pretrained._replace(shape=None, why_not="model.lora is set")
        folder = pretrained.folder
        if is_ours(folder):
            verify(folder)
        theirs = pretrained.shape or ModelConfig(vocab_size=pretrained.config.get("vocab_size"))
        theirs = dataclasses.replace(theirs, pretrained=name, dropout=model.dropout, lora=model.lora)
        problems, reason = [], f"and model.pretrained sets it: {folder} has its own"
        for entry in dataclasses.fields(ModelConfig):
            value = getattr(model, entry.name)
            if value not in (entry.default, getattr(theirs, entry.name)):
                problems.append(Problem(f"model.{entry.name}", value, "", "Leave it out.", reason))
        if pretrained.shape is None:
            reason = f"and {folder} is trained through transformers, by its own config.json"
            used = {"model.dropout": model.dropout, "data.mask_documents": data.mask_documents}
            problems += [Problem(name, value, "", "Leave it out.", reason) for name, value in used.items() if value]
            if pretrained.context is not None and data.sequence_length > pretrained.context:
                allowed = f"at most {pretrained.context}, the context of {folder}"
                problems.append(Problem("data.sequence_length", data.sequence_length, allowed))
        spec, theirs_file, reason = data.tokenizer, folder / TOKENIZER, ""
        is_file = spec.endswith(".json")
        if not theirs_file.is_file():
            reason = "" if is_file else f"and {folder} has no {TOKENIZER}"
        elif spec == DataConfig.tokenizer:
            spec = str(theirs_file)
        elif not (is_file or spec == "byte") or not same_tokenizer(create_tokenizer(spec), read_tokenizer(theirs_file)):
            reason = f"and {folder} was trained with another tokenizer"
        if reason:
            advice = "Leave it out, or give the tokenizer.json with which it was trained (AutoTokenizer writes one)."
            problems.append(Problem("data.tokenizer", spec, advice=advice, reason=reason))
        raise_all(problems)
        return dataclasses.replace(config, model=theirs, data=dataclasses.replace(data, tokenizer=spec)), pretrained


def begin_from_checkpoint(state: RunState, group: HostGroup, init_from: str, tokenizer: Tokenizer) -> None:
    """Loads the weights of the checkpoint `init_from`. Raises ConfigError if it was trained with another tokenizer."""
    checkpoint = Path(expand_user(init_from))
    group.from_main(lambda: verify(checkpoint))
    with explained(checkpoint):
        check_tokenizer(checkpoint, tokenizer)
    files = [name for name in read_manifest(checkpoint)["files"] if WEIGHTS.fullmatch(name)]
    load_weights(checkpoint, files, state.model, state.like())
