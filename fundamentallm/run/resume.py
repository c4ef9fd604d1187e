"""Which checkpoint a run resumes from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.checkpoint.manifest import read_manifest, verify
from fundamentallm.checkpoint.reading import Like, load_checkpoint, load_parts
from fundamentallm.config.schema import Config
from fundamentallm.config.validation import expand_user
from fundamentallm.data.tokenizers import read_tokenizer, same_tokenizer
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import CheckpointError, ConfigError, Problem
from fundamentallm.models.transformers_format import TOKENIZER
from fundamentallm.run.folder import LOCK


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
        folder = None if manager is None else manager.checkpoint_dir
        if folder is not None and folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
            advice = "Choose another output_dir (or checkpoint_dir), or set resume: auto to resume that run."
            reason = f"and {folder} already holds a run"
            raise ConfigError(Problem("training.resume", "never", advice=advice, reason=reason))
        return None, None, False
    newest, skipped = manager.newest_intact() if manager is not None else (None, [])
    for reason in skipped:
        say(f"skipping checkpoint {reason}")
    if wanted == "auto":
        if newest is None and skipped and manager is not None:
            advice = "Choose another output_dir, or move the checkpoints away."
            text = "\n  ".join([f"All checkpoints in {manager.checkpoint_dir} are damaged. {advice}", *skipped])
            raise CheckpointError(text)
        return newest, None, False
    path = Path(expand_user(wanted)).absolute()
    if manager is not None and newest is not None:
        progress = load_parts(newest, ["progress_state_dict"]).get("progress_state_dict")
        if isinstance(progress, dict) and progress.get("origin") == str(path):
            return newest, path, False
        if path.parent.resolve() != manager.checkpoint_dir.resolve():
            advice = "Choose another output_dir (or checkpoint_dir)."
            reason = f"and {manager.checkpoint_dir} holds another run, whose checkpoints would be rotated away"
            raise ConfigError(Problem("training.resume", str(path), advice=advice, reason=reason))
    verify(path)
    return path, path, newest is not None


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
    return choice


def learned_tokenizer(config: Config) -> Tokenizer | None:
    """Returns the tokenizer that the run learned from its text when it began, or None if it has not.

    A text that has grown since would give others, with other meanings of the same ids.
    """
    wanted, manager = config.training.resume, CheckpointManager(config.folder_of_checkpoints())
    path = manager.get_latest() or (None if wanted in ("auto", "never") else Path(expand_user(wanted)))
    if path is None or config.data.tokenizer.endswith(".json"):
        return None
    try:
        verify(path, hashed=[TOKENIZER])
    except CheckpointError:  # `resume` reports it
        path = manager.newest_intact()[0]
    if path is None or not (path / TOKENIZER).is_file():
        return None
    data = load_parts(path, ["config"])["config"].get("data", {})
    is_same = all(data.get(name) == getattr(config.data, name) for name in ("tokenizer", "end_of_text"))
    return read_tokenizer(path / TOKENIZER) if is_same else None


def check_tokenizer(checkpoint: Path, tokenizer: Tokenizer | None) -> None:
    """Raises ConfigError if a checkpoint has another tokenizer than the one that the run reads its text with."""
    path = checkpoint / TOKENIZER
    if tokenizer is not None and path.is_file() and not same_tokenizer(read_tokenizer(path), tokenizer):
        text = f"{checkpoint} was trained with another tokenizer or end_of_text"
        advice = f"Set it back, or give a copy of {path}: a tokenizer belongs to the weights."
        raise ConfigError(Problem("data.tokenizer", None, advice=advice, text=text))
