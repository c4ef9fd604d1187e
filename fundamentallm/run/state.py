"""Everything that training changes, by name: what a checkpoint holds, and how a run takes it up again."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fundamentallm.checkpoint.optimizer_state import NamedOptimizerState
from fundamentallm.checkpoint.reading import explained
from fundamentallm.checkpoint.snapshot import ADAPTER_KEY, AVERAGE_KEY, MODEL_KEY, OPTIMIZER_KEY, encode
from fundamentallm.checkpoint.tensor_files import Like
from fundamentallm.config.schema import NEVER_ON_RESUME, flat_settings
from fundamentallm.distributed.dtensor import is_sharded
from fundamentallm.errors import CheckpointError, ConfigError, Problem
from fundamentallm.run.folder import versions
from fundamentallm.run.progress import Progress

SUFFIX = "_state_dict"
OPTIONAL_PARTS = {"average", "early_stopping", "scaler", "micro_batch"}
"""Parts that a run has only with some settings."""


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
            had = {key.removesuffix(SUFFIX) for key in saved.keys() - {"config", "versions"}}
            missing, unknown = sorted(self.parts.keys() - had), sorted(had - self.parts.keys())
            if not {*missing, *unknown} <= OPTIONAL_PARTS:
                raise CheckpointError(f"{where} does not fit this run: missing {missing}, not expected {unknown}.")
            is_another = saved[OPTIMIZER_KEY].get("type") != type(self.optimizer.optimizer).__name__
        _refuse_changes(changed, may_change, free, where)
        new = [*missing, *["optimizer"] * ("training.optimizer" in changed and is_another)]
        restored = [name for name in self.parts if name not in new]
        for name in restored:
            with explained(where, f"its {name} does not fit this run"):
                if name == "optimizer" and "training.parameter_groups" in changed:  # some may have been frozen
                    saved[OPTIMIZER_KEY] = self.optimizer.refit(saved[OPTIMIZER_KEY])
                self.parts[name].load_state_dict(saved[f"{name}{SUFFIX}"])
        self.loaded_from = where
        messages = [f"{name} starts new: the checkpoint has no state for it" for name in new]
        messages += [f"{name} is in the checkpoint, and this run has none" for name in unknown]
        messages.append(f"resumed from {where} at step {self.progress.step}: {', '.join(restored)}")
        messages += [
            f"setting changed since the checkpoint: {name} {_short(before)} -> {_short(now)}"
            for name, (before, now) in changed.items()
        ]
        return messages, {*changed}

    def like(self) -> Like | None:
        """Returns which shards of the checkpoint's tensors this process reads; None: it reads all in full."""
        weights = {name: tensor for name, tensor in self.model.state_dict().items() if is_sharded(tensor)}
        if not weights:
            return None
        tensors: dict[str, Tensor] = {}
        # Averages, which this run may have given up, are sharded as the weights are: a checkpoint swaps the two.
        encode({MODEL_KEY: weights, AVERAGE_KEY: {"weights": weights}, OPTIMIZER_KEY: {"state": weights}}, (), tensors)

        def like(name: str, shape: tuple[int, ...]) -> Tensor | None:
            # What an optimizer keeps of a parameter is sharded as the parameter is.
            tensor = tensors.get(name, tensors.get(name.rpartition("/")[0]))
            return tensor if tensor is not None and tensor.shape == shape else None

        return like

    def _changes(self, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Returns {dotted name: (value in the checkpoint, value now)} of what differs."""
        before = flat_settings(saved["config"]) | _data_facts(saved[f"progress{SUFFIX}"]["stretches"][-1])
        now = flat_settings(self.config) | _data_facts(self.progress.segments[-1])
        names = sorted(before.keys() & now.keys())
        return {name: (before[name], now[name]) for name in names if before[name] != now[name]}


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
    allowed = {name for name in changed if {name, name.partition(".")[0]} & {*may_change}} - NEVER_ON_RESUME
    refused = [name for name in changed if name not in free and name not in allowed]
    names = ", ".join(name for name in refused if name not in NEVER_ON_RESUME)
    allow = (
        f"Set it back, or allow the change by --training.resume_changes '[{names}]'. "
        "(model.init_from starts a new run from these weights.)"
    )
    problems = []
    for name in refused:
        before, now = changed[name]
        advice = "Set it back: the weights have that shape." if name in NEVER_ON_RESUME else allow
        problems.append(Problem(name, now, _short(before), advice, f"and {where} was trained with another value"))
    if problems:
        raise ConfigError(problems)


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 60 else f"{text[:57]}..."
