"""What a checkpoint of a run holds, and how a run goes on from one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fundamentallm.checkpoint.manifest import read_manifest
from fundamentallm.checkpoint.optimizer_state import NamedOptimizerState
from fundamentallm.checkpoint.reading import check_checkpoint, load_checkpoint, load_parts
from fundamentallm.checkpoint.snapshot import AVERAGE_KEY, MODEL_KEY, OPTIMIZER_KEY
from fundamentallm.checkpoint.state_json import MALFORMED
from fundamentallm.config.schema import flat_settings
from fundamentallm.config.validation import expand_user
from fundamentallm.errors import CheckpointError, ConfigError
from fundamentallm.run.folder import LOCK
from fundamentallm.run.state import exchange, like_of, stored_config
from fundamentallm.training.schedulers import describe_curve

if TYPE_CHECKING:
    from fundamentallm.training.trainer import Trainer

FREE = {
    *("model.init_from", "model.pretrained", "model.zero_init_residual"),
    *("output_dir", "callbacks", "callback_options", "trackers", "tracker_options", "sample_tokens"),
    *("data.source", "data.num_workers", "data.cache_dir", "training.peak_tflops"),
    *("training.micro_batch_size", "training.activation_checkpointing", "training.compile"),
    *("training.checkpoint_dir", "training.keep_last_n", "training.max_bad_steps"),
    *("training.save_every_n_epochs", "training.save_every_n_steps", "training.log_every_n_steps"),
    *("training.eval_every_n_epochs", "training.eval_every_n_steps", "training.max_minutes"),
    *("training.early_stopping_patience", "training.early_stopping_metric", "training.early_stopping_mode"),
    *(
        "training.validation_metrics",
        "training.early_stopping_min_delta",
        "training.hang_minutes",
        "training.resume",
        "training.resume_changes",
    ),
}
"""Settings that change no weight (the text may move; its content counts): a resumed run may change them at will."""

HORIZON = {
    *("training.max_steps", "training.max_epochs", "training.learning_rate", "training.lr_scheduler"),
    *("training.lr_scheduler_options", "training.warmup_steps", "training.min_lr_ratio"),
    *("training.batch_size", "training.batch_size_schedule", "data.num_samples"),
}
"""Those that bend the learning rate's curve."""


class Choice(NamedTuple):
    """Where a start of a run goes on from."""

    path: Path | None = None
    """The checkpoint, verified; None: nowhere, it begins."""
    sha256: str | None = None
    """Of its manifest, and so of everything in it."""
    passed_over: tuple[str, ...] = ()
    """Why newer ones were."""
    origin: Path | None = None
    """The checkpoint that `resume` names, from which the run in the checkpoint folder went on."""
    is_rewound: bool = False
    """Whether the run goes back to an earlier one of its own."""


def resume(trainer: Trainer) -> Path | None:
    """Restore what `config.resume` says, if anything, on all processes together; returns the checkpoint.

    Raises:
        ConfigError: if it says 'never' and the checkpoint folder is in use, or a setting has changed that must not.
        CheckpointError: if there are checkpoints but none can be restored.
        FundamentaLLMError: on the other processes, if one of them failed.
    """
    choice = trainer.team.from_first(lambda: _choose(trainer))
    for reason in choice.passed_over:
        trainer.say(f"passed over {reason}")
    if choice.path is None:
        return None
    with trainer.team.together():
        if read_manifest(choice.path)["sha256"] != choice.sha256:
            raise CheckpointError(
                f"{choice.path} is another checkpoint here than on the first machine; training.checkpoint_dir has to "
                "be a folder that all of them see."
            )
        restore(trainer, load_checkpoint(choice.path, like_of(trainer), is_verified=True), choice.path)
    if choice.origin is not None:
        trainer.state["progress"].origin = str(choice.origin)
    trainer.was_rewound = choice.is_rewound
    return choice.path


def _choose(trainer: Trainer) -> Choice:
    """What `config.resume` means now: a path is the first start and every restart alike, so where the run has gone
    on from there already, its newest checkpoint is meant.

    Raises:
        ConfigError: if it says 'never' and the folder is in use, or a path and the folder holds another run, whose
            checkpoints would go as new ones come.
        CheckpointError: if there are checkpoints but none is intact.
    """
    manager, wanted = trainer.checkpoint_manager, trainer.config.training.resume
    if wanted == "never":
        folder = manager.checkpoint_dir if manager is not None else None
        if folder is not None and folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
            raise ConfigError(
                f"resume is 'never' and {folder} holds a run already; choose another output_dir "
                "(or checkpoint_dir), or resume: auto to go on with it."
            )
        return Choice()
    newest, passed_over = manager.newest_intact() if manager is not None else (None, [])
    if wanted == "auto":
        if newest is None and passed_over and manager is not None:
            raise CheckpointError(
                f"none of the checkpoints in {manager.checkpoint_dir} is intact, and starting afresh among them "
                "would mix two runs; choose another output_dir, or move them away."
                + "".join(f"\n  {reason}" for reason in passed_over)
            )
        return Choice(newest, _sha256(newest), tuple(passed_over))
    path = Path(expand_user(wanted)).absolute()
    if manager is not None and newest is not None:
        progress = load_parts(newest, ["progress_state_dict"]).get("progress_state_dict")
        if isinstance(progress, dict) and progress.get("origin") == str(path):
            manager.origin = path
            return Choice(newest, _sha256(newest), origin=path)
        if path.parent.resolve() != manager.checkpoint_dir.resolve():
            raise ConfigError(
                f"training.resume is {str(path)!r} and {manager.checkpoint_dir} holds another run, whose checkpoints "
                "would go as new ones come; choose another output_dir (or checkpoint_dir)."
            )
        manager.origin = manager.checkpoint_dir / path.name
    check_checkpoint(path)
    return Choice(path, _sha256(path), origin=path, is_rewound=newest is not None)


def _sha256(checkpoint: Path | None) -> str | None:
    return None if checkpoint is None else read_manifest(checkpoint)["sha256"]


def restore(trainer: Trainer, saved: dict[str, Any], where: Path) -> None:
    """Give every part its saved state; say what was restored and which settings have changed.

    Raises:
        CheckpointError: if a part is missing, unknown, or does not fit.
        ConfigError: naming each setting that changes the course of the run and is not in `resume_changes`.
    """
    try:
        changed = changes(saved, stored_config(trainer), trainer.state["progress"].stretches[-1])
        exchange(saved)
    except MALFORMED as error:
        raise CheckpointError(f"{where} holds no run ({type(error).__name__}: {error}).") from error
    allowed = trainer.config.training.resume_changes
    # A tokenizer's file may move with the folder it is in; where it is another, the samples are.
    free = FREE if "data.content" in changed else FREE | {"data.tokenizer"}
    refused = [name for name in changed if name not in free and not {name, name.partition(".")[0]} & set(allowed)]
    if refused:
        way_out = (
            "which changes the course of the run; set it back, or allow it by training.resume_changes: "
            f"[{', '.join(refused)}]. (To begin a new run from these weights: model.init_from.)"
        )
        raise ConfigError(
            [
                f"{name} is {_short(now)} and {where} was trained with {_short(before)}, {way_out}"
                for name, (before, now) in changed.items()
                if name in refused
            ]
        )
    afresh = _parts_afresh(trainer, saved, set(changed), where)
    if "training.parameter_groups" in changed:
        _refit(trainer, saved, afresh, where)
    for part, holder in trainer.state.items():
        if part in afresh:
            continue
        try:
            holder.load_state_dict(saved[f"{part}_state_dict"])
        except Exception as error:  # a stranger's checkpoint may hold anything
            raise CheckpointError(f"{where}: its {part} does not fit this run: {error}") from error
        if part == "progress":
            trainer.set_horizon()  # with another batch size, an epoch has another number of steps
    if trainer.micro_batch is not None:
        trainer.micro_batch.settings_changed(changed)
    trainer.mark_saved()
    for group, lr in zip(trainer.optimizer.param_groups, trainer.scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
    trainer.say(f"resumed from {where} at step {trainer.global_step}: {_inventory(trainer, saved, afresh, where)}")
    for name, (before, now) in changed.items():
        trainer.say(f"changed since: {name} {_short(before)} -> {_short(now)}")
    if changed.keys() & HORIZON:
        rate = trainer.metrics.get_latest("learning_rate")
        trainer.say(describe_curve(trainer.scheduler, trainer.global_step, trainer.total_steps, rate))


def changes(saved: dict[str, Any], config: dict[str, Any], stretch: dict[str, Any]) -> dict[str, Any]:
    """{dotted name: (value in the checkpoint, value now)} of the settings, and facts of the data, that differ."""
    before, now = flat_settings(saved["config"]), flat_settings(config)
    before |= _facts(saved["progress_state_dict"]["stretches"][-1])
    now |= _facts(stretch)
    return {name: (before[name], now[name]) for name in sorted(before.keys() & now.keys()) if before[name] != now[name]}


def _facts(stretch: dict[str, Any]) -> dict[str, Any]:
    facts = {f"data.{name}": stretch[name] for name in ("num_samples", "drop_last", "content")}
    return facts | {"data.shuffle": stretch["seed"] is not None, "training.batch_size": stretch["batch_size"]}


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 60 else f"{text[:57]}..."


def _parts_afresh(trainer: Trainer, saved: dict[str, Any], changed: set[str], where: Path) -> set[str]:
    """Parts that begin anew since a changed setting makes them other parts; says so.

    Raises:
        CheckpointError: if a part is missing or unknown and no setting explains it.
    """
    expected = {f"{part}_state_dict" for part in trainer.state} | {"config", "versions"}
    explained = {
        "average": "training.ema_decay",
        "early_stopping": "training.early_stopping_patience",
        "scaler": "training.mixed_precision",
        "micro_batch": "training.micro_batch_size",
    }
    without = {f"{part}_state_dict" for part, setting in explained.items() if setting in changed}
    lacks, besides = sorted(expected - saved.keys()), sorted(saved.keys() - expected)
    if not {*lacks, *besides} <= without:
        raise CheckpointError(f"{where} does not fit this run: it lacks {lacks}, and has besides {besides}.")
    afresh = {part.removesuffix("_state_dict") for part in lacks}
    optimizer = saved["optimizer_state_dict"]
    if "training.optimizer" in changed and optimizer.get("type") != type(trainer.optimizer).__name__:
        afresh.add("optimizer")
    for part in sorted(afresh):
        trainer.say(f"{part} starts afresh: the checkpoint has none of this run's kind")
    for part in besides:
        trainer.say(f"{part.removesuffix('_state_dict')} is in the checkpoint and not in this run")
    return afresh


def _refit(trainer: Trainer, saved: dict[str, Any], afresh: set[str], where: Path) -> None:
    """Bring a saved state to the parameters that are trained from here on, some of which may have been frozen.

    Raises:
        CheckpointError: if the state is none of a run's.
    """
    optimizer, average = trainer.state["optimizer"], trainer.average
    try:
        if "optimizer" not in afresh:
            saved[OPTIMIZER_KEY] = optimizer.refit(saved[OPTIMIZER_KEY])
        if average is not None and "average" not in afresh:
            saved[AVERAGE_KEY] = average.refit(saved[AVERAGE_KEY], saved[MODEL_KEY])
    except MALFORMED as error:
        raise CheckpointError(f"{where} holds no run ({type(error).__name__}: {error}).") from error


def _inventory(trainer: Trainer, saved: dict[str, Any], afresh: set[str], where: Path) -> str:
    """What was restored: weights, and parameters whose optimizer state was, of those that there are.

    Raises:
        CheckpointError: if the optimizer took less than the checkpoint holds.
    """
    words = [f"weights {len(saved['model_state_dict'])}/{len(trainer.model.state_dict())}"]
    if "optimizer" not in afresh:
        holder = trainer.state["optimizer"]
        assert isinstance(holder, NamedOptimizerState)
        held, given = holder.state_dict()["state"], saved["optimizer_state_dict"]["state"]
        if lost := [name for name in given if given[name].keys() != held[name].keys()]:
            raise CheckpointError(f"{where}: the optimizer did not take the state of {', '.join(lost[:5])}.")
        words.append(f"optimizer {sum(map(bool, held.values()))}/{len(held)}")
    others = (part for part in trainer.state if part not in ("model", "optimizer", *afresh))
    return ", ".join([*words, *others])
