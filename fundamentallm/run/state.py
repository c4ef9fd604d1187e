"""Everything that training changes, by name: what a checkpoint holds, when it is saved, how a run takes it up again."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.checkpoint.optimizer_state import NamedOptimizerState
from fundamentallm.checkpoint.reading import Like, explained
from fundamentallm.checkpoint.snapshot import ADAPTER_KEY, AVERAGE_KEY, MODEL_KEY, OPTIMIZER_KEY, encode, plan
from fundamentallm.config.saved import flat_settings
from fundamentallm.config.schema import FREE_ON_RESUME, NEVER_ON_RESUME, TrainingConfig
from fundamentallm.distributed.dtensor import is_sharded, local
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.errors import CheckpointError, ConfigError, Problem, raise_all
from fundamentallm.run.folder import versions
from fundamentallm.run.progress import Progress

SUFFIX = "_state_dict"
OPTIONAL_PARTS = {"average", "early_stopping", "scaler", "micro_batch"}  # that a run has only with some settings


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

    def load(self, saved: dict[str, Any], where: Path, may_change: Collection[str]) -> tuple[list[str], set[str]]:
        """Gives every part its state from the checkpoint at `where`.

        `may_change` names settings or sections that the user allows to differ although they change the run. Returns
        lines for the user, and the names of settings and facts of the data that differ. Raises CheckpointError if a
        part is missing, unknown, or does not fit; ConfigError with each setting that may not differ.
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
        _refuse_changes(changed, may_change, where)
        new = [*missing, *["optimizer"] * ("training.optimizer" in changed and is_another)]
        restored = [name for name in self.parts if name not in new]
        for name in restored:
            with explained(where, f"its {name} does not fit this run"):
                if name == "optimizer" and "training.parameter_groups" in changed:  # some may have been frozen
                    before, now = saved[OPTIMIZER_KEY]["state"], self.optimizer.state_dict()["state"]
                    saved[OPTIMIZER_KEY]["state"] = {each: before.get(each, state) for each, state in now.items()}
                self.parts[name].load_state_dict(saved[f"{name}{SUFFIX}"])
        self.loaded_from = where
        messages = [f"{name} starts new: the checkpoint has no state for it" for name in new]
        messages += [f"{name} is in the checkpoint, and this run has none" for name in unknown]
        messages.append(f"resumed from {where} at step {self.progress.step}: {', '.join(restored)}")
        for name, (before, now) in changed.items():
            messages.append(f"setting changed since the checkpoint: {name} {_short(before)} -> {_short(now)}")
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


def _refuse_changes(changed: dict[str, tuple[Any, Any]], may_change: Collection[str], where: Path) -> None:
    allowed = {name for name in changed if {name, name.partition(".")[0]} & {*may_change}} - NEVER_ON_RESUME
    refused = [name for name in changed if name not in allowed | FREE_ON_RESUME]
    names = ", ".join(name for name in refused if name not in NEVER_ON_RESUME)
    new_run = "model.init_from starts a new run from these weights"
    advice = f"Set it back, or allow the change by --training.resume_changes '[{names}]'. ({new_run}.)"
    fixed, reason = "Set it back: the weights have that shape.", f"and {where} was trained with another value"
    problems = [
        Problem(name, changed[name][1], _short(changed[name][0]), fixed if name in NEVER_ON_RESUME else advice, reason)
        for name in refused
    ]
    raise_all(problems)


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 60 else f"{text[:57]}..."


class Saver:
    """Saves the state of a run: on request, when due, and at its end.

    A sharded state is saved by all processes together, each writing its shards. Otherwise the main process saves alone.
    Without a checkpoint_dir nothing is saved. `files` returns further text files of a checkpoint, by name.

    Attributes:
        requested: whether to save a checkpoint at the end of this step.
        saved_step: step whose state is on disk, or on its way there; -1: that of none.
    """

    def __init__(
        self,
        config: TrainingConfig,
        state: RunState,
        group: HostGroup,
        is_sharded: bool,
        files: Callable[[], dict[str, str]],
        logs: set[Path],
    ) -> None:
        self.state, self.group, self.is_sharded, self.files = state, group, is_sharded, files
        self.requested, self.saved_step, self._is_best = False, -1, False
        self._shapes: dict[str, Any] | None = None  # of the model, before the first step of a launch
        folder, self.manager = config.checkpoint_dir, None
        if folder is not None:
            # Processes that save together need a group of their own, because they save in another thread.
            self.manager = CheckpointManager(folder, config.keep_last_n, HostGroup() if is_sharded else None)
        if config.mirror is not None:
            if self.manager is None:
                raise ConfigError(Problem("training.mirror", config.mirror, "null without a training.checkpoint_dir"))
            self.manager.mirror.set_url(config.mirror, logs)

    def request(self, is_best: bool = False) -> None:
        """Asks for a checkpoint at the end of this step. All processes have to ask alike."""
        self.requested, self._is_best = True, self._is_best or is_best

    def save(self, name: str | None = None, is_best: bool = False) -> Path:
        """Saves now, on every process together; see `Trainer.save_checkpoint`."""
        manager = self.manager
        if manager is None:
            raise ConfigError("There is no checkpoint_dir; set training.checkpoint_dir.")
        path = manager.checkpoint_dir / (name or self._name)
        self._on_savers(lambda: manager.save(self.state.state_dict(), path.name, is_best, self.files()))
        if path.name == self._name:
            self.saved_step = self.state.progress.step
        return path

    def save_in_background(self) -> None:
        """Saves the present state in the background, unless it is saved already and is not the best."""
        manager, step = self.manager, self.state.progress.step
        # If a sharded save failed, it failed on all processes, so all of them raise here together.
        saves = self.is_sharded or (self.group.rank == 0 and manager is not None and manager.error is None)
        if manager is not None and saves and (self.saved_step != step or self._is_best):
            manager.save_in_background(self.state.state_dict(), self._name, self._is_best, self.files())
        self.saved_step, self.requested, self._is_best = step, False, False

    def finish(self) -> None:
        """Saves the present state and waits until it is on disk. Raises CheckpointError if it cannot be written."""
        if self.manager is not None:
            self.save_in_background()
            self.saved_step = -1  # if waiting raises
            self._on_savers(self.manager.wait)
            self.saved_step = self.state.progress.step

    def begin(self) -> None:
        """Starts a launch: drops requests. Raises CheckpointError if its state cannot be saved."""
        self.requested = self._is_best = False
        if self.manager is not None:
            self._plan()
            self._shapes = self._shapes_of_model()

    def check_first_step(self) -> None:
        """Raises CheckpointError if the state after a launch's first step cannot be saved, or the disk has no room."""
        manager, before, self._shapes = self.manager, self._shapes, None
        if before is None or manager is None:
            return
        now = self._shapes_of_model()
        if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            what = f"The first step made or reshaped {', '.join(changed)}, so that no checkpoint would fit a new model"
            raise CheckpointError(f"{what}. Register each in its final shape, or with persistent=False.")
        num_bytes = sum({(local(t).data_ptr(), t.nbytes): t.nbytes for t in self._plan()}.values())  # tied: once
        self.group.from_main(lambda: manager.check_space(num_bytes))

    def _plan(self) -> list[Tensor]:
        """Returns the tensors of a checkpoint. Raises CheckpointError on all processes if it cannot be made."""
        # On all: reading its state makes a sharded model drop what a validation left gathered, which all have to do.
        with self.group.barrier_with_errors():
            return list(plan(self.state.state_dict(), self.files())[1].values())

    def _shapes_of_model(self) -> dict[str, Any]:
        return {name: getattr(value, "shape", None) for name, value in self.state.model.state_dict().items()}

    def _on_savers(self, action: Callable[[], object]) -> None:
        if self.is_sharded:
            action()
        else:
            self.group.from_main(action)

    @property
    def _name(self) -> str:
        return f"step_{self.state.progress.step:08d}"
