"""Everything that training changes, by name: what a checkpoint holds, and how a run takes it up again."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fundamentallm.checkpoint.optimizer_state import NamedOptimizerState
from fundamentallm.checkpoint.reading import explained
from fundamentallm.checkpoint.snapshot import ADAPTER_KEY, AVERAGE_KEY, MODEL_KEY, OPTIMIZER_KEY
from fundamentallm.checkpoint.state_json import encode
from fundamentallm.checkpoint.tensor_files import Like
from fundamentallm.config.schema import NEVER_ON_RESUME, flat_settings
from fundamentallm.distributed.dtensor import is_sharded
from fundamentallm.errors import CheckpointError, ConfigError, FundamentaLLMError, Problem
from fundamentallm.run.environment import versions
from fundamentallm.run.progress import Progress

SUFFIX = "_state_dict"
OPTIONAL_PARTS = {
    "average": ("training.ema_decay", "training.optimizer"),
    "early_stopping": ("training.early_stopping_patience",),
    "scaler": ("training.mixed_precision",),
    "micro_batch": ("training.micro_batch_size",),
}
"""Parts that a run may lack, and the settings that decide it."""


class Restored(NamedTuple):
    """What loading a checkpoint did."""

    messages: list[str]  # one line for the user for each thing worth knowing
    changed: frozenset[str]  # dotted names of settings, and facts of the data, that differ from the checkpoint's


class RunState:
    """Every stateful part of a run by name, with the settings it was made with, as a plain dict.

    Parts have state_dict() and load_state_dict(), and are loaded in their order. "progress", "model", "optimizer" and
    "scheduler" are always among them.
    """

    def __init__(self, parts: dict[str, Any], config: dict[str, Any]) -> None:
        self.parts, self.config = parts, config
        self.progress: Progress = parts["progress"]
        self.optimizer: NamedOptimizerState = parts["optimizer"]
        self.model: nn.Module = self.optimizer.model  # without any wrapper
        self.loaded_from: Path | None = None  # a checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of every part under NAME_state_dict, the config and the versions of the libraries."""
        state = {f"{name}{SUFFIX}": part.state_dict() for name, part in self.parts.items()}
        exchange(state)
        return {**state, "config": self.config, "versions": versions()}

    def load(self, saved: dict[str, Any], where: Path, may_change: Collection[str], free: Collection[str]) -> Restored:
        """Gives every part its saved state.

        Args:
            saved: what `state_dict` returned, as read from a checkpoint.
            where: the checkpoint, for messages.
            may_change: settings or sections that the user allows to differ although they change the run.
            free: settings that change no weight, and may always differ.

        Raises:
            CheckpointError: if a part is missing, unknown, or does not fit.
            ConfigError: naming each setting that differs, changes the run, and is not in `may_change`.
        """
        if "adapter" in self.parts:
            saved.setdefault(ADAPTER_KEY, {})  # earlier versions saved adapters with their whole model
        with explained(where, "it does not hold a run"):
            changed = self._changes(saved)
            exchange(saved)
            reset, messages = self._parts_to_reset(saved, changed.keys(), where)
        _refuse_changes(changed, may_change, free, where)
        for name, part in self.parts.items():
            if name in reset:
                continue
            try:
                if "training.parameter_groups" in changed:
                    self._refit(name, saved)
                part.load_state_dict(saved[f"{name}{SUFFIX}"])
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a checkpoint from elsewhere may hold anything
                reason = error if isinstance(error, FundamentaLLMError) else f"{type(error).__name__}: {error}"
                raise CheckpointError(f"{where}: its {name} does not fit this run: {reason}") from error
        self.loaded_from = where
        inventory = self._inventory(saved, reset, where)
        messages.append(f"resumed from {where} at step {self.progress.step}: {inventory}")
        messages += [
            f"setting changed since the checkpoint: {name} {_short(before)} -> {_short(now)}"
            for name, (before, now) in changed.items()
        ]
        return Restored(messages, frozenset(changed))

    def like(self) -> Like | None:
        """Returns a function from a stored tensor's name and shape to the DTensor whose local shard is to be read.

        The function returns None for a tensor that is read in full. If all are, there is no function.
        """
        weights = self.model.state_dict()
        if not any(is_sharded(tensor) for tensor in weights.values()):
            return None
        tensors: dict[str, Tensor] = {}
        # Averages, which this run may have given up, are sharded as the weights are: a checkpoint swaps the two.
        encode({MODEL_KEY: weights, AVERAGE_KEY: {"weights": weights}}, (), tensors)
        parameters: dict[str, Tensor] = {}
        encode({OPTIMIZER_KEY: {"state": dict(self.model.named_parameters())}}, (), parameters)

        def like(name: str, shape: tuple[int, ...]) -> Tensor | None:
            # What an optimizer keeps of a parameter is sharded as the parameter is.
            tensor = tensors.get(name, parameters.get(name.rpartition("/")[0]))
            return tensor if tensor is not None and is_sharded(tensor) and tensor.shape == shape else None

        return like

    def _changes(self, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Returns {dotted name: (value in the checkpoint, value now)} of what differs."""
        before = flat_settings(saved["config"]) | _data_facts(saved[f"progress{SUFFIX}"]["stretches"][-1])
        now = flat_settings(self.config) | _data_facts(self.progress.segments[-1])
        names = sorted(before.keys() & now.keys())
        return {name: (before[name], now[name]) for name in names if before[name] != now[name]}

    def _parts_to_reset(
        self, saved: dict[str, Any], changed: Collection[str], where: Path
    ) -> tuple[set[str], list[str]]:
        """Returns the parts that a changed setting makes new, and a message for each.

        Raises CheckpointError if a part is missing or unknown and no setting explains it.
        """
        expected = {f"{name}{SUFFIX}" for name in self.parts} | {"config", "versions"}
        explained = {f"{name}{SUFFIX}" for name, settings in OPTIONAL_PARTS.items() if {*settings} & {*changed}}
        missing, unknown = expected - saved.keys(), saved.keys() - expected
        if not missing | unknown <= explained:
            raise CheckpointError(
                f"{where} does not fit this run: missing {sorted(missing)}, not expected {sorted(unknown)}."
            )
        reset = {name.removesuffix(SUFFIX) for name in missing}
        saved_type = saved[OPTIMIZER_KEY].get("type")
        if "training.optimizer" in changed and saved_type != type(self.optimizer.optimizer).__name__:
            reset.add("optimizer")
        messages = [f"{name} starts new: the checkpoint has no state for it" for name in sorted(reset)]
        messages += [
            f"{name.removesuffix(SUFFIX)} is in the checkpoint, and this run has none" for name in sorted(unknown)
        ]
        return reset, messages

    def _refit(self, name: str, saved: dict[str, Any]) -> None:
        """Fits the state of a part to the parameters that are trained from here on: some may have been frozen."""
        if name == "optimizer":
            saved[OPTIMIZER_KEY] = self.optimizer.refit(saved[OPTIMIZER_KEY])
        elif name == "average":
            saved[AVERAGE_KEY] = self.parts[name].refit(saved[AVERAGE_KEY], saved[MODEL_KEY])

    def _inventory(self, saved: dict[str, Any], reset: set[str], where: Path) -> str:
        """Returns what was restored: counts of weights and of parameters with optimizer state, then the other parts.

        Raises CheckpointError if the optimizer took less than the checkpoint holds.
        """
        words = [f"weights {len(saved[MODEL_KEY])}/{len(self.parts['model'].state_dict())}"]
        if "optimizer" not in reset:
            held, given = self.optimizer.state_dict()["state"], saved[OPTIMIZER_KEY]["state"]
            if lost := [name for name in given if given[name].keys() != held[name].keys()]:
                raise CheckpointError(f"{where}: the optimizer did not take the state of {', '.join(lost[:5])}.")
            words.append(f"optimizer {sum(map(bool, held.values()))}/{len(held)}")
        return ", ".join([*words, *(name for name in self.parts if name not in ("model", "optimizer", *reset))])


def exchange(state: dict[str, Any]) -> None:
    """Swaps weights and averaged weights of a run's state, if it has any: a checkpoint opens as the averages."""
    if AVERAGE_KEY in state:
        model, averages = state[MODEL_KEY], state[AVERAGE_KEY]["weights"]
        state[AVERAGE_KEY]["weights"] = {name: model[name] for name in averages}
        state[MODEL_KEY] = {**model, **averages}


def _data_facts(segment: dict[str, Any]) -> dict[str, Any]:
    facts = {f"data.{name}": segment[name] for name in ("num_samples", "drop_last", "content")}
    facts["data.sampler"] = segment.get("sampler")
    return facts | {"data.shuffle": segment["seed"] is not None, "training.batch_size": segment["batch_size"]}


def _refuse_changes(
    changed: dict[str, tuple[Any, Any]], may_change: Collection[str], free: Collection[str], where: Path
) -> None:
    """Raises ConfigError for each changed setting that neither is free nor was allowed by name or by section."""
    allowed = {name for name in changed if {name, name.partition(".")[0]} & {*may_change}} - NEVER_ON_RESUME
    refused = [name for name in changed if name not in free and name not in allowed]
    names = ", ".join(name for name in refused if name not in NEVER_ON_RESUME)
    allow = (
        f"Set it back, or allow the change by --training.resume_changes '[{names}]'. "
        "(model.init_from starts a new run from these weights.)"
    )
    reason = f"and {where} was trained with another value"
    problems = []
    for name in refused:
        before, now = changed[name]
        advice = "Set it back: the weights have that shape." if name in NEVER_ON_RESUME else allow
        if name == "data.content" and "data.special_tokens" in changed:
            special_tokens = changed["data.special_tokens"][0] or "null"
            advice = f"Set data.special_tokens: {special_tokens}, as in the checkpoint. {advice}"
        problems.append(Problem(name, now, _short(before), advice, reason))
    if problems:
        raise ConfigError(problems)


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 60 else f"{text[:57]}..."
