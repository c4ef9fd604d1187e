"""Everything that training changes, by name: what a checkpoint holds, and how a run takes it up again."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fundamentallm.checkpoint.optimizer_state import NamedOptimizerState
from fundamentallm.checkpoint.reading import explained
from fundamentallm.checkpoint.snapshot import ADAPTER_KEY, AVERAGE_KEY, MODEL_KEY, OPTIMIZER_KEY, encode
from fundamentallm.checkpoint.tensor_files import Like
from fundamentallm.config.schema import NEVER_ON_RESUME, flat_settings
from fundamentallm.distributed.dtensor import is_sharded
from fundamentallm.errors import CheckpointError, ConfigError, FundamentaLLMError, Problem
from fundamentallm.run.folder import versions
from fundamentallm.run.progress import Progress

SUFFIX = "_state_dict"
OPTIONAL_PARTS = {
    "average": ("training.ema_decay", "training.optimizer"),
    "early_stopping": ("training.early_stopping_patience",),
    "scaler": ("training.mixed_precision",),
    "micro_batch": ("training.micro_batch_size",),
}
"""Parts that a run may lack, and the settings that decide it."""


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

    def load(
        self, saved: dict[str, Any], where: Path, may_change: Collection[str], free: Collection[str]
    ) -> tuple[list[str], set[str]]:
        """Gives every part its state from the checkpoint at `where`.

        `may_change` names settings or sections that the user allows to differ although they change the run, and `free`
        those that change no weight. Returns lines for the user, and the names of settings and facts of the data that
        differ. Raises CheckpointError if a part is missing, unknown, or does not fit; ConfigError with each setting
        that may not differ.
        """
        if "adapter" in self.parts:
            saved.setdefault(ADAPTER_KEY, {})  # earlier versions saved adapters with their whole model
        with explained(where, "it does not hold a run"):
            changed = self._changes(saved)
            exchange(saved)
            reset, messages = self._parts_to_reset(saved, changed.keys(), where)
        _refuse_changes(changed, may_change, free, where)
        restored = [name for name in self.parts if name not in reset]
        for name in restored:
            try:
                if "training.parameter_groups" in changed:
                    self._refit(name, saved)
                self.parts[name].load_state_dict(saved[f"{name}{SUFFIX}"])
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a checkpoint from elsewhere may hold anything
                reason = error if isinstance(error, FundamentaLLMError) else f"{type(error).__name__}: {error}"
                raise CheckpointError(f"{where}: its {name} does not fit this run: {reason}") from error
        self.loaded_from = where
        messages.append(f"resumed from {where} at step {self.progress.step}: {', '.join(restored)}")
        messages += [
            f"setting changed since the checkpoint: {name} {_short(before)} -> {_short(now)}"
            for name, (before, now) in changed.items()
        ]
        return messages, {*changed}

    def like(self) -> Like | None:
        """Returns which shards of the checkpoint's tensors this process reads; None: it reads all in full."""
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
        """Returns the parts that a changed setting makes new, and messages. Others may not be missing or unknown."""
        had = {key.removesuffix(SUFFIX) for key in saved.keys() - {"config", "versions"}}
        missing, unknown = sorted(self.parts.keys() - had), sorted(had - self.parts.keys())
        explained = {name for name, settings in OPTIONAL_PARTS.items() if {*settings} & {*changed}}
        if not {*missing, *unknown} <= explained:
            raise CheckpointError(f"{where} does not fit this run: missing {missing}, not expected {unknown}.")
        reset, saved_type = {*missing}, saved[OPTIMIZER_KEY].get("type")
        if "training.optimizer" in changed and saved_type != type(self.optimizer.optimizer).__name__:
            reset.add("optimizer")
        messages = [f"{name} starts new: the checkpoint has no state for it" for name in sorted(reset)]
        return reset, messages + [f"{name} is in the checkpoint, and this run has none" for name in unknown]

    def _refit(self, name: str, saved: dict[str, Any]) -> None:
        """Fits the state of a part to the parameters that are trained from here on: some may have been frozen."""
        if name == "optimizer":
            saved[OPTIMIZER_KEY] = self.optimizer.refit(saved[OPTIMIZER_KEY])
        elif name == "average":
            saved[AVERAGE_KEY] = self.parts[name].refit(saved[AVERAGE_KEY], saved[MODEL_KEY])


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
        problems.append(Problem(name, now, _short(before), advice, reason))
    if problems:
        raise ConfigError(problems)


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 60 else f"{text[:57]}..."
