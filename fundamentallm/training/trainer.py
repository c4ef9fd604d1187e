"""The trainer: one pass of its loop is one batch is one optimizer step, which `step.py` shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from fundamentallm.checkpoint.optimizer_state import NamedOptimizerState
from fundamentallm.checkpoint.reading import load_checkpoint
from fundamentallm.config.schema import Config, TrainingConfig
from fundamentallm.data.datasets import fingerprint
from fundamentallm.data.loaders import ValidationLoaders, named_loaders, step_sampler
from fundamentallm.distributed.accelerator import leave_group
from fundamentallm.distributed.dtensor import device_name
from fundamentallm.distributed.host_group import HostGroup
from fundamentallm.distributed.prepare import place_model, prepare_model
from fundamentallm.distributed.watchdog import Phase, Watchdog
from fundamentallm.errors import ConfigError
from fundamentallm.models.adapters import weight_parts
from fundamentallm.models.transformers_format import model_files
from fundamentallm.models.with_loss import ModelWithLoss, Objective
from fundamentallm.run.folder import LOGS, environment
from fundamentallm.run.progress import Progress
from fundamentallm.run.resume import check_tokenizer, resume
from fundamentallm.run.session import Stop, StopSwitch, record_launch, session
from fundamentallm.run.state import RunState, Saver
from fundamentallm.training.arguments import check_alike, check_setup, complete, count_steps
from fundamentallm.training.callbacks import Callback, CallbackList, default_callbacks, log_path
from fundamentallm.training.callbacks.trackers import TrackerCallback
from fundamentallm.training.early_stopping import make_early_stopping
from fundamentallm.training.ema import make_average, switch_to_training
from fundamentallm.training.first_batch import FirstBatches
from fundamentallm.training.loss import make_objective
from fundamentallm.training.metrics import Metric, MetricTracker, evaluate, further_metrics, peak_memory_gb
from fundamentallm.training.micro_batch import MicroBatch
from fundamentallm.training.optimizers import check_optimizer, freeze, make_optimizer
from fundamentallm.training.schedulers import advance, callers_schedule, make_schedule
from fundamentallm.training.step import OptimizerStep
from fundamentallm.training.throughput import Throughput, peak_speed
from fundamentallm.training.view import TrainerView


class Trainer(TrainerView):
    """Trains a model.

    Args:
        model: maps inputs to logits (a tensor, or an output with `.logits`, as transformers' models give), or mappings
            to an output with a loss.
        config: how to train. A whole `Config` is stored in the checkpoints, and its `output_dir` gets everything
            that the run writes. With a `TrainingConfig` only `checkpoint_dir` is written to.
        train_loader: yields `(inputs, targets)`, mappings with `labels`, or what `objective` takes, from a map-style
            dataset. Its batch size is that of one optimizer step over all devices. shuffle=True means the order that
            follows from the seed.
        val_loader: the same for validation. Its batch size changes no result. Or several by name, each of which has a
            loss of its own, val_NAME_loss, besides the metrics over all of them.
        callbacks: all callbacks; None: a progress bar, log lines (in `output_dir`, if there is one), and
            a checkpoint of the best validation.
        optimizer: replaces the config's; over this model's parameters.
        scheduler: replaces the config's; over that optimizer, stepped after each step (ReduceLROnPlateau: validation).
        loss_fn: replaces the config's; maps (logits, targets) to the sum over targets.
        objective: replaces the loss: maps (model, batch) to the sum over targets, or to (sum, outputs). Its method
            `num_targets(batch)` counts the targets; without one, each sample is a target.
        validation_metrics: functions of (outputs, batch), of (logits, targets) for pairs, to (sum, count), by name,
            besides the config's. Each is logged as val_NAME.
        accelerator: replaces the one that the Trainer would make.

    Raises:
        ConfigError: listing all arguments and settings that do not fit together.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from fundamentallm import Trainer, TrainingConfig
        >>> numbers = torch.arange(64).reshape(8, 8) % 10  # 0 to 9, repeatedly
        >>> loader = DataLoader(TensorDataset(numbers, (numbers + 1) % 10), batch_size=4, shuffle=True)
        >>> model = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 10))
        >>> config = TrainingConfig(max_steps=40, learning_rate=0.1, log_every_n_steps=10)
        >>> trainer = Trainer(model, config, loader)
        >>> history = trainer.train()  # pandas.DataFrame(history) is a table
        training.checkpoint_dir is not set: nothing will be saved.
        ...
        step 10/40 | loss ...
        >>> history["step"], history["train_loss"][-1] < 0.1
        ([10, 20, 30, 40], True)
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config | TrainingConfig,
        train_loader: DataLoader[Any],
        val_loader: ValidationLoaders | None = None,
        callbacks: list[Callback] | None = None,
        *,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        objective: Objective | None = None,
        validation_metrics: Mapping[str, Metric] | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.config, accelerator, self.output_dir = complete(config, accelerator, train_loader)
        self.accelerator, training = accelerator, self.config.training
        self.train_loader, self.val_loader = train_loader, val_loader
        self.group = HostGroup()
        self.micro_batch = MicroBatch(accelerator) if training.micro_batch_size == "auto" else None
        at_once = None if training.micro_batch_size == "auto" else training.micro_batch_size
        # With compile, micro-batches are padded to one size, so that a compiled model sees one shape.
        layout = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
        layout |= {"micro_batch_size": at_once, "pad": bool(training.compile)}
        with self.group.barrier_with_errors():
            later: dict[str, Any] = {"schedule": training.batch_size_schedule, "skip": self.config.data.skip}
            self.samples = step_sampler("train_loader", train_loader, training.seed, **later, **layout)
            most, sets = training.eval_max_samples, named_loaders(val_loader)
            self.val_samples = {k: step_sampler(k or "val_loader", v, 0, most, **layout) for k, v in sets.items()}
        content = [fingerprint(train_loader.dataset), fingerprint(*(loader.dataset for loader in sets.values()))]
        check_alike(self.group, self.config, optimizer, [{"": self.samples}, self.val_samples], content)
        self.batch_size, self.steps_per_epoch = self.samples.batch_size, self.samples.steps_per_epoch
        self.validation_metrics = further_metrics(training.validation_metrics, validation_metrics, sets)
        check_setup(self.config, accelerator, self.samples, sets, self.validation_metrics, optimizer, scheduler)
        self.total_steps = count_steps(training, self.samples)

        freeze(model, training.parameter_groups)
        self.model, with_loss = model, ModelWithLoss(model, *make_objective(training, loss_fn, objective))
        place_model(accelerator, model, training.seed, training.activation_checkpointing, self.say)
        self._weights = weight_parts(model, self.group, self.say)
        self.optimizer = check_optimizer(model, optimizer or make_optimizer(training, model))
        self.model_with_loss = prepare_model(accelerator, with_loss, self.optimizer, bool(training.compile))
        self.average, self._has_own_schedule = make_average(training, model, self.optimizer), scheduler is None
        self.scheduler = scheduler or make_schedule(training, self.optimizer, self.total_steps)
        self.optimizer_step = OptimizerStep(accelerator, self.model_with_loss, self.optimizer, training)
        self._first_batches = FirstBatches(with_loss, accelerator, self.group, self.say)
        self.early_stopping = make_early_stopping(training)
        default = default_callbacks(self.config, self.output_dir, bool(sets))
        self.callbacks = CallbackList(default if callbacks is None else callbacks)
        self.metrics = MetricTracker(log_path(self.callbacks.callbacks))
        if accelerator.log_with:
            self.callbacks.add(TrackerCallback())
        self.files: dict[str, str] = {}  # further text files of each checkpoint, which replace those made for it
        self.state = RunState(self._parts(content), asdict(self.config if self.output_dir else training))
        files = lambda: model_files(model, self.samples.data, self._weights) | self.files  # noqa: E731
        logs = {self.output_dir / name for name in LOGS} if self.output_dir else {*filter(None, [self.metrics.log])}
        self.saver = Saver(training, self.state, self.group, self.is_sharded, files, logs)
        self.stop_switch, self.phase = StopSwitch(training.max_minutes), Phase.STARTING
        self._own_folder = self.output_dir if self.is_main_process else None
        self._throughput, self._started, self.was_rewound = Throughput(), False, False  # rewound: it replaces steps

    def _parts(self, content: list[str | None]) -> dict[str, Any]:
        """Returns everything that changes because of training, by name. `content`: the fingerprint of each dataset."""
        parts = {
            "progress": Progress(self.samples, content, self.accelerator.device),
            **self._weights,  # before the optimizer: reading them reshards what a validation has left gathered
            "optimizer": NamedOptimizerState(self.model, self.optimizer),
            "scheduler": self.scheduler if self._has_own_schedule else callers_schedule(self.scheduler),
            "guard": self.optimizer_step.guard,
            "metrics": self.metrics,
            "callbacks": self.callbacks,
            "average": self.average,
            "early_stopping": self.early_stopping,
            "scaler": self.accelerator.scaler,
            "micro_batch": self.micro_batch,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def train(self, max_steps: int | None = None) -> dict[str, list[float]]:
        """Trains to the end of the run and returns its history. Resumes from a checkpoint as `config.resume` says.

        `max_steps` replaces the config's, so that a finished run can be trained longer.
        SIGTERM, SIGINT and SIGUSR1 stop the run after the present step, saved. A second Ctrl-C stops it at once.

        Raises:
            ConfigError: if settings that change the run differ from the checkpoint's, or `resume` forbids it.
            CheckpointError: if no checkpoint can be restored or one cannot be written.
            RunInProgressError: if another process trains in the same folders.
            TrainingError: after `max_bad_steps` consecutive steps whose loss or gradient was not finite.
        """
        self.optimizer_step.raise_if_updating()
        place = lambda: (self.global_step, self.stop_switch.polls, self.phase)  # noqa: E731
        watchdog = Watchdog(place, self.config.training.hang_minutes, self.group)
        folder, manager = self._own_folder, self.checkpoint_manager
        with session(folder, self._position, manager, self.group, watchdog, self.say) as launch:
            resumed_from = None if self._started else self._resume()
            self._started = True
            if max_steps is not None:
                self._set_max_steps(max_steps)
                self._fit_schedule()
            if self.is_finished:
                self.stop_switch.begin()  # forgets why an earlier train() stopped
                if self.checkpoint_manager is not None and self.saver.saved_step != self.global_step:
                    self.save_checkpoint()  # which failed when the run ended
                self.say(self._describe_finished_run())
                return self.history
            if self.micro_batch is not None:
                self._settle_micro_batch(self.micro_batch)
            if folder is not None:
                accelerator, content = self.accelerator, self._progress.segments[-1]["content"]
                device = device_name(accelerator.device)
                about = environment(device, accelerator.num_processes, accelerator.mixed_precision)
                config = asdict(self.config)
                record_launch(folder, self._position(), resumed_from, environment=about, config=config, data=content)
            self.stop_switch.begin()
            launch.enter_context(self.stop_switch.handling_signals())
            try:
                self._begin()
                self._train()
                self._finish()
            except BaseException:
                self.callbacks.on_train_abort(self)
                raise
        return self.history

    def _settle_micro_batch(self, micro_batch: MicroBatch) -> None:
        first, largest = self.global_step, self.samples.largest_rank_batch(max(self.samples.sizes))
        self.samples.micro_batch_size = 1  # so that the check of the first batch fits
        batches = self._first_batches.load(self.train_loader, self.samples, first, max(self.total_steps, first + 1))
        size = micro_batch.settle(self.optimizer_step, batches, largest, self.group, bool(self.validation_metrics))
        for sampler in (self.samples, *self.val_samples.values()):
            sampler.micro_batch_size = size
        self.say(f"micro_batch_size is auto: {size} of {largest} sequences at once fit")

    def _train(self) -> None:
        """Takes optimizer steps to the last one, or until all processes agree to stop."""
        progress, callbacks, step = self._progress, self.callbacks, self.optimizer_step
        if progress.step == 0 and self.config.training.eval_at_start and self.metrics.get_latest("val_step") is None:
            progress.validation_due = True
        is_at_epoch = progress.step > 0 and self._is_at_epoch
        if progress.validation_due and self._finish_step(is_logged=True, is_at_epoch=is_at_epoch):
            return
        log_every = self.config.training.log_every_n_steps
        is_at_epoch = True  # or resumes within one
        self.phase = Phase.LOADING
        for batch in self._first_batches.load(self.train_loader, self.samples, progress.step, self.total_steps):
            self.phase = Phase.COMPUTING
            if is_at_epoch:
                callbacks.on_epoch_begin(self)
            callbacks.on_step_begin(self)
            learning_rate = float(self.scheduler.get_last_lr()[0])
            result = step(progress.step, batch)
            advance(self.scheduler)
            progress.count(result.loss, result.num_targets)
            step.is_updating = False
            self.saver.check_first_step()
            if callbacks.wants_step_loss:  # the host waits for the device
                callbacks.on_step_end(self, (result.loss / result.num_targets).item())
            is_logged = progress.step % log_every == 0 or progress.step == self.total_steps
            if is_logged:
                self._log(result.norm, learning_rate)
            is_at_epoch = self._is_at_epoch
            if self._finish_step(is_logged, is_at_epoch):
                return
            self.phase = Phase.LOADING

    def _finish_step(self, is_logged: bool, is_at_epoch: bool) -> bool:
        """Validates and saves, if due. Returns True if all processes have agreed to stop."""
        training, progress, manager = self.config.training, self._progress, self.checkpoint_manager
        started = time.perf_counter()
        is_due = self._is_due(training.eval_every_n_steps, training.eval_every_n_epochs)
        is_due = is_due or progress.validation_due or progress.step == self.total_steps
        validates = is_due and self.val_loader is not None
        self.phase = Phase.FINISHING
        if validates and not self._validate_in_training():
            return True
        progress.validation_due = False  # it may have been due in a checkpoint, and this run has no val_loader
        if is_at_epoch:
            self.callbacks.on_epoch_end(self)
        if self.saver.requested or self._is_due(training.save_every_n_steps, training.save_every_n_epochs):
            self.optimizer_step.guard.raise_if_stopped()
            self.saver.save_in_background()
        self._throughput.pause(time.perf_counter() - started)
        if manager is not None:
            self.stop_switch.seconds_to_save = manager.seconds
            if manager.error is not None:
                self.stop_switch.request(Stop.FAILED, "a checkpoint could not be written")
        # A stop that hooks ask for at these steps takes effect at once on all processes, otherwise one step later.
        if is_logged or validates or is_at_epoch:
            return self.stop_switch.settle() != Stop.NO
        return self.stop_switch.poll() != Stop.NO

    def _log(self, grad_norm: Tensor, learning_rate: float) -> None:
        """Logs the numbers of the steps since the last line. The host waits for the device here."""
        step, (tokens, loss), guard = self.global_step, self._progress.read(), self.optimizer_step.guard
        _, bad, spikes = guard.counts.tolist()
        speed, memory = self._throughput.log(step, tokens), peak_memory_gb(self.accelerator.device)
        line = {
            "step": step,
            "epoch": self.epochs_done,
            "samples": self.samples.samples_seen(step),
            "tokens": tokens,
            "train_loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm.item(),
            "tokens_per_second": speed.pop("tokens_per_second"),
            "bad_steps": bad,
            **({"skipped_spikes": spikes} if self.config.training.skip_spikes_above is not None else {}),
        }
        self.metrics.update(line)
        # What the machine or a callback measures is not part of the state: checkpoints do not depend on it.
        line |= speed | ({} if memory is None else {"memory_gb": memory}) | self.callbacks.measure(self)
        self.callbacks.on_log(self, line)
        if self.checkpoint_manager is not None:
            self.checkpoint_manager.mirror.say_news(self.say)
        guard.raise_if_stopped()

    def validate(self) -> dict[str, float]:
        """Returns the metrics of the validation data, whatever its batch size and the device count.

        These are `val_loss` (mean per target, in nats for our losses), `val_perplexity` (its exponential), for text
        `val_bits_per_byte` (not with `training.eval_max_samples`), `val_NAME_loss` of each named set, and further
        metrics over all sets. With `training.ema_decay`, the averaged weights are validated.

        Raises:
            ConfigError: if there is no val_loader, or no target in it.
        """
        metrics = self._evaluate(is_interrupted=lambda: False)
        assert metrics is not None
        return metrics

    def _evaluate(self, is_interrupted: Callable[[], bool]) -> dict[str, float] | None:
        if not (loaders := named_loaders(self.val_loader)):
            raise ConfigError("There is no val_loader; give the Trainer one.")
        batches = (
            (name, batch)
            for name, samples in self.val_samples.items()
            for batch in self._first_batches.load(loaders[name], samples, 0, samples.steps_per_epoch)
        )
        model, metrics, most = self.model_with_loss, self.validation_metrics, self.config.training.eval_max_samples
        with self.averaged_weights():
            return evaluate(model, loaders, batches, self.accelerator, metrics, is_interrupted, most)

    def _validate_in_training(self) -> bool:
        """Validates. Returns False if a signal or the clock interrupted it; it then comes first on resume."""
        # The clock does not interrupt the same validation twice: otherwise no launch would ever get past it.
        interrupting = Stop.SIGNAL if self._progress.validation_due else Stop.OUT_OF_TIME
        self._progress.validation_due = True  # also if an exception ends it
        self.saver.saved_step = -1
        metrics = self._evaluate(is_interrupted=lambda: self.stop_switch.poll() >= interrupting)
        if metrics is None:
            return False
        self._progress.validation_due = False
        self.metrics.update({"val_step": self.global_step, **metrics})
        advance(self.scheduler, metrics[self.config.training.early_stopping_metric])
        patience = self.early_stopping
        if patience is not None and patience.step(metrics[patience.metric]):
            self.request_stop(patience.describe())
        self.callbacks.on_validation_end(self, metrics)
        return True

    def save_checkpoint(self, name: str | None = None, is_best: bool = False) -> Path:
        """Saves the whole state, on every process together. The checkpoint is complete when this returns.

        Args:
            name: of its directory; default: step_ and the step in eight digits.
            is_best: whether it is the best so far.

        Raises:
            CheckpointError: if it cannot be written. (ConfigError: if there is no checkpoint_dir.)
        """
        self.optimizer_step.raise_if_updating()
        return self.saver.save(name, is_best)

    def load_checkpoint(self, path: Path | str) -> None:
        """Restores the whole state from a checkpoint. `train()` then continues from there.

        Raises:
            CheckpointError: if the checkpoint is damaged, or does not have exactly the parts that this run has.
            ConfigError: if settings that change the run differ from the checkpoint's.
        """
        self._restore(load_checkpoint(Path(path), self.state.like()), Path(path))
        self._started = True

    def _resume(self) -> Path | None:
        """Restores what `training.resume` says. Returns the checkpoint, or None if the run begins."""
        wanted, manager = self.config.training.resume, self.checkpoint_manager
        path, origin, self.was_rewound = resume(wanted, manager, self.group, self.state.like, self._restore, self.say)
        if origin is not None:
            self._progress.origin = str(origin)
        return path

    def _restore(self, saved: dict[str, Any], where: Path) -> None:
        check_tokenizer(where, getattr(self.train_loader.dataset, "tokenizer", None))
        messages, changed = self.state.load(saved, where, self.config.training.resume_changes)
        self.say("\n".join(messages))
        self._fit_schedule()
        if self.micro_batch is not None and changed:
            self.micro_batch.size = None  # another one may fit
        self.saver.saved_step = -1 if self.validation_due else self.global_step  # a validation changes the state
        self.optimizer_step.is_updating = False

    def _fit_schedule(self) -> None:
        """Fits the run's length and its schedule to where its batches begin: another batch size changes both."""
        self.total_steps = count_steps(self.config.training, self.samples)
        if self._has_own_schedule:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"]
            schedule = make_schedule(self.config.training, self.optimizer, self.total_steps)
            schedule.load_state_dict(self.scheduler.state_dict())
            self.scheduler = self.state.parts["scheduler"] = schedule
        for group, lr in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = lr

    def _begin(self) -> None:
        self.saver.begin()
        self.model_with_loss.train()
        switch_to_training(self.optimizer)
        self.model.zero_grad()  # what a caller, or a step that raised, may have left
        self.callbacks.on_train_begin(self)
        peak = peak_speed(self.config.training, self.accelerator, self.model, self.samples.data)
        self._throughput = Throughput(int(self._progress.tokens), peak)

    def _finish(self) -> None:
        """Saves the last state, and waits until it is on disk."""
        if self.checkpoint_manager is not None:
            self.optimizer_step.guard.raise_if_stopped()
            self.saver.finish()
        self.callbacks.on_train_end(self)
        if self.stop_switch.reason:
            self.say(self.describe_stop())

    def leave_group(self) -> None:
        """Leaves the process group for good: nothing can be trained or validated afterwards."""
        self.model_with_loss = leave_group(self.accelerator, self.model_with_loss)
        self.optimizer_step.model_with_loss = self.model_with_loss
