"""The trainer: one pass of its loop is one batch is one optimizer step (which `step.py` shows).

`Accelerator` owns the hardware: placement, precision, gradient exchange, clipping, process identity.
Accumulation, schedule, data order and file format are plain code here, since accelerate's own weigh tokens by
where they were computed, step the schedule once for each process, and pickle.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader
from tqdm import tqdm

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.checkpoint.optimizer_state import NamedOptimizerState
from fundamentallm.checkpoint.reading import load_checkpoint
from fundamentallm.config.schema import Config, TrainingConfig, unknown_metric
from fundamentallm.data.datasets import fingerprint
from fundamentallm.data.loaders import device_batches, step_sampler
from fundamentallm.distributed.accelerator import check_accelerator, create_accelerator, kept_groups
from fundamentallm.distributed.compilation import is_compiled
from fundamentallm.distributed.host_group import Team
from fundamentallm.distributed.prepare import place_model, prepare_model
from fundamentallm.errors import CheckpointError, ConfigError, TrainingError
from fundamentallm.models.transformers_format import model_files
from fundamentallm.run.progress import Progress
from fundamentallm.run.resume import restore
from fundamentallm.run.session import session
from fundamentallm.run.state import like_of, run_state
from fundamentallm.run.stopping import Stop, StopSwitch
from fundamentallm.training.callbacks.base import Callback, CallbackList
from fundamentallm.training.callbacks.from_config import default_callbacks
from fundamentallm.training.callbacks.trackers import TrackerCallback, tracker_names
from fundamentallm.training.early_stopping import make_early_stopping
from fundamentallm.training.ema import make_average
from fundamentallm.training.evaluation import evaluate, metric_names
from fundamentallm.training.guard import Guard
from fundamentallm.training.loss import create_loss
from fundamentallm.training.metrics import Metric, MetricTracker, further_metrics, peak_memory_gb
from fundamentallm.training.micro_batch import make_micro_batch
from fundamentallm.training.optimizers import freeze, make_optimizer
from fundamentallm.training.schedulers import CallersSchedule, StepSchedule, make_schedule
from fundamentallm.training.step import OptimizerStep
from fundamentallm.training.throughput import Throughput, make_throughput


class Trainer:
    """Trains a model.

    Args:
        model: maps inputs to logits (a tensor, or an output with `.logits`, as transformers' models give).
        config: how to train. A whole `Config` is stored with the checkpoints, and its `output_dir` gets them.
        train_loader: of `(inputs, targets)` over a map-style dataset; its batch size is the batch of one
            optimizer step over all devices, and shuffle=True means the order that follows from the seed.
        val_loader: likewise, for validation; its batch size changes no result.
        callbacks: all callbacks; None for a progress bar, log lines (in `output_dir` with a whole `Config`), and
            keeping the best checkpoint.
        optimizer: instead of the config's; over this model's parameters.
        scheduler: instead of the config's; over that optimizer, stepped after every optimizer step.
        loss_fn: instead of the config's; maps (logits, targets) to the sum over targets.
        validation_metrics: besides the config's: functions of (logits, targets) to (sum, count), by name; each is
            logged as val_ and its name.
        accelerator: instead of one made here.

    Raises:
        ConfigError: listing what does not fit together.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from fundamentallm import Trainer, TrainingConfig
        >>> numbers = torch.arange(64).reshape(8, 8) % 10  # 0 to 9, again and again
        >>> loader = DataLoader(TensorDataset(numbers, (numbers + 1) % 10), batch_size=4, shuffle=True)
        >>> model = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 10))
        >>> config = TrainingConfig(max_steps=40, learning_rate=0.1, log_every_n_steps=10)
        >>> trainer = Trainer(model, config, loader)
        >>> history = trainer.train()  # pandas.DataFrame(history) is a table
        330 parameters, 1 process on cpu, 40 steps of 4 sequences
        step 10  ...
        >>> history["step"], history["train_loss"][-1] < 0.1
        ([10, 20, 30, 40], True)
        >>> trainer
        Trainer at step 40 of 40, epoch 20
          model      Sequential, 330 parameters, precision no
        ...
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config | TrainingConfig,
        train_loader: DataLoader[Any],
        val_loader: DataLoader[Any] | None = None,
        callbacks: list[Callback] | None = None,
        *,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        validation_metrics: Mapping[str, Metric] | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        if isinstance(config, Config) and config.training.batch_size is None:
            size = getattr(train_loader, "batch_size", None)
            config = replace(config, training=replace(config.training, batch_size=size))
        self.output_dir = Path(config.output_dir) if isinstance(config, Config) else None
        config = config.resolved() if isinstance(config, Config) else Config(training=config.resolved())
        training = config.training
        smallest = training.smallest_batch_size(getattr(train_loader, "batch_size", None))
        launch = training.mixed_precision, smallest, training.compile
        if accelerator is not None:
            check_accelerator(accelerator, *launch)
        folder = None if self.output_dir is None else str(self.output_dir)
        self.accelerator = accelerator or create_accelerator(*launch, config.trackers, folder)
        # What the launcher said about it is a part of the run as if the config had.
        training = replace(
            training,
            mixed_precision=self.accelerator.mixed_precision,
            compile=is_compiled(self.accelerator, training.compile),
        )
        self.config = replace(config, training=training)
        self.micro_batch = make_micro_batch(training, self.accelerator)
        at_once = None if training.micro_batch_size == "auto" else training.micro_batch_size
        place = self.accelerator.process_index, self.accelerator.num_processes, at_once
        self.train_loader, self.val_loader = train_loader, val_loader
        even = bool(training.compile)  # so that it is for one shape
        sizes = training.batch_size_schedule
        self.samples = step_sampler("train_loader", train_loader, training.seed, *place, even, sizes)
        self.val_samples = step_sampler("val_loader", val_loader, 0, *place, even) if val_loader is not None else None
        self.batch_size, self.steps_per_epoch = self.samples.batch_size, self.samples.steps_per_epoch
        self.total_steps = self._total_steps()
        self.validation_metrics = further_metrics(training.validation_metrics, validation_metrics)
        self._check(optimizer, scheduler)

        freeze(model, training.parameter_groups)
        self.model, loss_fn = model, loss_fn or create_loss(training.loss, **training.loss_options)
        place_model(self.accelerator, model, training.seed, training.activation_checkpointing)
        self.optimizer = optimizer or make_optimizer(training, model)
        self._step_model = prepare_model(self.accelerator, model, loss_fn, self.optimizer, bool(training.compile))
        self.average = make_average(training, model, self.optimizer)
        self._own_schedule = scheduler is None
        self.scheduler = scheduler or make_schedule(training, self.optimizer, self.total_steps)
        self._guard = Guard(self.accelerator.device, training.max_bad_steps, training.skip_spikes_above)
        self._step = OptimizerStep(
            self.accelerator,
            self._step_model,
            self.optimizer,
            self._guard,
            training.gradient_clip_norm,
            training.seed,
        )

        self.team = Team()
        self.metrics = MetricTracker()
        self.early_stopping = make_early_stopping(training)
        self.checkpoint_manager: CheckpointManager | None = None
        if training.checkpoint_dir is not None:
            together = Team() if self.is_sharded else None  # another one: it speaks from a thread of its own
            self.checkpoint_manager = CheckpointManager(training.checkpoint_dir, training.keep_last_n, together)
        self.callbacks = CallbackList(
            default_callbacks(self.config, self.output_dir, val_loader is not None) if callbacks is None else callbacks
        )
        if self.accelerator.log_with:
            self.callbacks.add(TrackerCallback())
        content = [None if loader is None else fingerprint(loader.dataset) for loader in (train_loader, val_loader)]
        self._progress = Progress(self.samples, content, self.accelerator.device)
        self.state: dict[str, Any] = {  # all that changes because of training, by name
            "progress": self._progress,
            "model": self.model,  # first, which makes sharded parameters of those that a validation has left gathered
            "optimizer": NamedOptimizerState(self.model, self.optimizer),
            "scheduler": self.scheduler if self._own_schedule else CallersSchedule(self.scheduler),
            "guard": self._guard,
            "metrics": self.metrics,
            "callbacks": self.callbacks,
        }
        there_or_not = {
            "average": self.average,
            "early_stopping": self.early_stopping,
            "scaler": self.accelerator.scaler,
            "micro_batch": self.micro_batch,
        }
        self.state |= {name: part for name, part in there_or_not.items() if part is not None}
        self.files: dict[str, str] = {}
        """Further text files of each checkpoint, by name; in place of those that are made for it."""
        self.stop_switch = StopSwitch(training.max_minutes)
        self._started = False
        self._start_step = 0
        self._save_requested: bool | None = None  # and whether as the best
        self._saved_at = -1
        self.was_rewound = False
        """Whether this run went back to an earlier checkpoint, so that what came after it is another course."""
        self._throughput = Throughput()
        self._has_compiled: set[str] = set()  # what was reported as compiled: training, validation

    def _check(self, optimizer: Optimizer | None, scheduler: LRScheduler | None) -> None:
        """Refuse arguments and settings that contradict each other."""
        problems, training = [], self.config.training
        if training.batch_size not in (None, self.batch_size):
            problems.append(
                f"training.batch_size is {training.batch_size} and the train_loader's batch_size is {self.batch_size}; "
                "set one of them, or both alike."
            )
        if scheduler is not None and scheduler.optimizer is not optimizer:
            problems.append("the scheduler was made for another optimizer; pass its optimizer too.")
        if isinstance(scheduler, ReduceLROnPlateau):
            problems.append(
                "the scheduler is a ReduceLROnPlateau, which wants to be told a metric; allowed: schedules that follow "
                "from the step."
            )
        if optimizer is not None and training.parameter_groups:
            problems.append("parameter_groups is set and an optimizer is given; give it the groups, or set it to [].")
        metrics = metric_names(self.val_loader, self.validation_metrics)
        if training.early_stopping_metric not in metrics:
            problems.append(unknown_metric(training.early_stopping_metric, metrics))
        if training.early_stopping_patience and self.val_loader is None:
            problems.append("early_stopping_patience is set and there is no val_loader; give one, or set it to null.")
        wanted = self.config.trackers
        given = tracker_names(self.accelerator)
        if not set(wanted) <= set(given):
            problems.append(
                f"trackers is {wanted} and the Accelerator was made with log_with={given}; make it with all of them "
                "(create_accelerator does), or set trackers to []."
            )
        if problems:
            raise ConfigError(problems)

    def _total_steps(self) -> int:
        training, start = self.config.training, self.samples.start
        ends = [math.inf if training.max_steps is None else training.max_steps]
        if training.max_epochs is not None:
            # Where as many passes were made before the batches begin, the run ends there.
            is_ahead = training.max_epochs > start.epoch
            ends.append(self.samples.steps_before_epoch(training.max_epochs) if is_ahead else start.step)
        return int(min(ends))

    def set_horizon(self) -> None:
        """Fit the run's length, and its schedule, to where its batches begin (see `StepSampler.start`)."""
        total_steps, self.total_steps = self.total_steps, self._total_steps()
        if self._own_schedule and total_steps != self.total_steps:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"]
            self.scheduler = self.state["scheduler"] = make_schedule(
                self.config.training, self.optimizer, self.total_steps
            )

    # ---- where the run is --------------------------------------------------------------------------------

    @property
    def global_step(self) -> int:
        """Optimizer steps done."""
        return self._progress.step

    @property
    def current_epoch(self) -> int:
        """Index of the epoch the next step belongs to, from 0."""
        return self.samples.place(self.global_step)[0]

    @property
    def epochs_done(self) -> float:
        """Passes over the training data done, in samples."""
        return self.samples.epochs_before(self.global_step)

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that prints, draws and writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds slices of the weights only."""
        return bool(self.accelerator.is_fsdp2)

    @property
    def is_finished(self) -> bool:
        """Whether the run has reached its last step, or patience ran out."""
        out_of_patience = self.early_stopping is not None and self.early_stopping.should_stop
        return (self.global_step >= self.total_steps and not self._progress.validation_due) or out_of_patience

    @property
    def seconds_left(self) -> float:
        """To the last step, at the pace of this start; NaN before its second log line."""
        return self._throughput.seconds_left(self.total_steps - self.global_step)

    @property
    def was_interrupted(self) -> bool:
        """Whether a signal or `max_minutes` ended the last `train()`: the same command goes on where it was."""
        return not self.is_finished and self.stop_switch.agreed in (Stop.SIGNAL, Stop.OUT_OF_TIME)

    @property
    def history(self) -> dict[str, list[float]]:
        """The numbers of the run so far, as `pandas.DataFrame(trainer.history)` takes them: columns of one length, with
        a row for each step that was logged or validated, and NaN where such a row has no value.
        """
        return self.metrics.by_step()

    def __repr__(self) -> str:
        return summary(self)

    # ---- the loop ----------------------------------------------------------------------------------------

    def train(self) -> dict[str, list[float]]:
        """Train to the end of the run and return its history; goes on from a checkpoint as `config.resume` says.

        SIGTERM, SIGINT and SIGUSR1 stop it after the step, saved; a second Ctrl-C at once.

        Raises:
            ConfigError: if `resume` is 'never' and the checkpoint folder is in use, or settings that change the
                course of the run are not those of the checkpoint.
            CheckpointError: if there are checkpoints but none can be restored, one cannot be written, or an exception
                has ended the last step within the optimizer's update.
            RunInProgressError: if another process trains in the same folders.
            TrainingError: after `max_bad_steps` steps in a row whose loss or gradient was not finite.
        """
        self._check_whole()
        with session(self, is_first=not self._started):
            self._started = True
            if self.is_finished:
                if self.checkpoint_manager is not None and self._saved_at != self.global_step:
                    self.save_checkpoint()  # which failed when the run ended
                longer = (
                    "training.max_steps or max_epochs and name it in training.resume_changes"
                    if self.early_stopping is None or not self.early_stopping.should_stop
                    else "training.early_stopping_patience, which has run out"
                )
                self.say(
                    f"this run is finished, at step {self.global_step} of {self.total_steps}; choose another "
                    f"output_dir, or raise {longer}."
                )
            else:
                try:
                    self._begin()
                    self._train()
                    self._finish()
                except BaseException:
                    self.callbacks.on_train_abort(self)
                    raise
        return self.history

    def _train(self) -> None:
        """The steps, up to the last one or to a stop."""
        progress = self._progress
        if progress.validation_due and self._close_step():
            return
        share = self.train_loader, self.samples, progress.step, self.total_steps, self.accelerator.device
        for inputs, targets, parts, _ in device_batches(*share):
            if self._is_at_epoch or progress.step == self._start_step:
                self.callbacks.on_epoch_begin(self)
            self.callbacks.on_step_begin(self)
            learning_rate = float(self.scheduler.get_last_lr()[0])
            started = time.perf_counter()
            loss, count, norm = self._step(progress.step, inputs, targets, parts)
            self._report_compilation("step", time.perf_counter() - started)
            self.scheduler.step()
            progress.step += 1
            progress.tokens += count
            progress.loss.add(loss, count)
            self._step.is_updating = False
            if self.callbacks.wants_step_loss:  # for which the host waits
                self.callbacks.on_step_end(self, (loss / count).item())
            if self._end_of_step(norm, learning_rate):
                return

    def _end_of_step(self, norm: Tensor, learning_rate: float) -> bool:
        """Whatever is due after a step: log line, validation, checkpoint. True if the run stops here."""
        logged = self.global_step == self.total_steps or self.global_step % self.config.training.log_every_n_steps == 0
        if logged:
            self._log(norm, learning_rate)
        return self._close_step(logged)

    def _close_step(self, logged: bool = True) -> bool:
        config, progress = self.config.training, self._progress
        started = time.perf_counter()
        validates = self.val_loader is not None and (
            progress.validation_due
            or self.global_step == self.total_steps
            or self._due(config.eval_every_n_steps, config.eval_every_n_epochs)
        )
        if validates and not self._validate_in_training():
            return True
        progress.validation_due = False  # also where there is nothing to validate on any more
        if self._is_at_epoch:
            self.callbacks.on_epoch_end(self)
        if self._save_requested is not None or self._due(config.save_every_n_steps, config.save_every_n_epochs):
            self._end_if_diverged(int(self._guard.counts[0]))  # before it is saved
            self._save_if_possible()
        self._throughput.pause(time.perf_counter() - started)
        if self.checkpoint_manager is not None:
            self.stop_switch.seconds_to_save = self.checkpoint_manager.seconds
            if self.checkpoint_manager.has_failed:
                self.stop_switch.request(Stop.FAILED, "a checkpoint could not be written")
        # What hooks ask for at these steps takes effect at once, on every process; else at the next step.
        return (
            self.stop_switch.settle() if logged or validates or self._is_at_epoch else self.stop_switch.poll()
        ) != Stop.NO

    @property
    def _is_at_epoch(self) -> bool:
        """Whether the next step begins an epoch."""
        return self.samples.place(self.global_step)[1] == 0

    def _due(self, every_n_steps: int | None, every_n_epochs: int | None) -> bool:
        by_step = every_n_steps is not None and self.global_step % every_n_steps == 0
        return by_step or (
            every_n_epochs is not None and self._is_at_epoch and self.current_epoch % every_n_epochs == 0
        )

    def _log(self, norm: Tensor, learning_rate: float) -> None:
        """One line of numbers over the steps since the last one. The host waits for the device here."""
        tokens, bad_in_a_row, bad, spikes = torch.stack((self._progress.tokens, *self._guard.counts)).tolist()
        total, count = self._progress.loss.totals.tolist()
        self._progress.loss.reset()
        speed = self._throughput.log(self.global_step, tokens)
        memory = peak_memory_gb(self.accelerator.device)
        line = {
            "step": self.global_step,
            "epoch": self.epochs_done,
            "samples": self.samples.samples_before(self.global_step),
            "tokens": tokens,
            "train_loss": total / count if count else math.nan,
            "learning_rate": learning_rate,
            "grad_norm": norm.item(),
            "tokens_per_second": speed.pop("tokens_per_second"),
            "bad_steps": bad,
            **({"skipped_spikes": spikes} if self.config.training.skip_spikes_above is not None else {}),
        }
        self.metrics.update(line)
        # What the machine or an observer says is no part of the state: a checkpoint is the same with it and without.
        line |= speed | ({} if memory is None else {"memory_gb": memory}) | self.callbacks.measure(self)
        self.callbacks.on_log(self, line)
        self._end_if_diverged(bad_in_a_row)

    def _report_compilation(self, what: str, seconds: float) -> None:
        """Print how long the first step and the first validation took, if they were compiled."""
        if self.config.training.compile and what not in self._has_compiled:
            self._has_compiled.add(what)
            self.say(f"the first {what} took {seconds:.1f} s, with compilation")

    def _end_if_diverged(self, bad_in_a_row: int) -> None:
        """Raise TrainingError if the guard has stopped the run; such a state is never saved."""
        if bad_in_a_row >= (most := self.config.training.max_bad_steps):
            raise TrainingError(
                f"the loss or the gradient was not finite in {most} optimizer steps in a row; "
                "none of them changed the weights. Lower training.learning_rate, check the data, and look at the loss "
                "and the gradient norm before."
            )

    # ---- validation --------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """Loss over every target of the validation data, whatever its batch size and the number of processes.

        With `training.ema_decay`, of the averaged weights.

        Returns:
            `val_loss` (mean per target, in nats for our losses), `val_perplexity` (its exponential), for text
            `val_bits_per_byte`, and the further metrics.

        Raises:
            ConfigError: if there is no val_loader, or no target in it.
        """
        if self.val_loader is None:
            raise ConfigError("there is no val_loader; give the Trainer one.")
        metrics = self._evaluate(lambda: False)
        assert metrics is not None  # nothing interrupts it
        return metrics

    def _evaluate(self, is_interrupted: Callable[[], bool]) -> dict[str, float] | None:
        assert self.val_loader is not None
        assert self.val_samples is not None
        data = self.val_loader, self.val_samples, self.accelerator
        with self.averaged_weights():
            return evaluate(self._step_model, *data, is_interrupted, self.validation_metrics)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Meanwhile, `model` has the averaged weights; its own, where `training.ema_decay` is not set."""
        return self.average.applied() if self.average is not None else nullcontext()

    def _validate_in_training(self) -> bool:
        """Validate; False if a signal or the clock broke it off, to be done first when the run goes on."""
        # The clock does not break off the same validation twice, or no start would ever get beyond it.
        gravest = Stop.SIGNAL if self._progress.validation_due else Stop.OUT_OF_TIME
        self._progress.validation_due = True  # also where an exception ends it
        started = time.perf_counter()
        metrics = self._evaluate(is_interrupted=lambda: self.stop_switch.poll() >= gravest)
        self._report_compilation("validation", time.perf_counter() - started)
        self._progress.validation_due = metrics is None
        if metrics is None:
            return False
        self.metrics.update({"val_step": self.global_step, **metrics})
        if self.early_stopping is not None:
            name = self.early_stopping.metric
            if self.early_stopping.step(metrics[name]):
                best, patience = self.early_stopping.best_value, self.early_stopping.patience
                self.request_stop(f"early stopping: {name} has not improved on {best:.4g} in {patience} validations")
        self.callbacks.on_validation_end(self, metrics)
        return True

    def find_micro_batch_size(self) -> None:
        """Find the micro-batch size, if it is auto and not known yet, for training and validation."""
        if self.micro_batch is None:
            return
        if self.micro_batch.size is None:
            first, device, largest = self.global_step, self.accelerator.device, self.samples.largest_share
            inputs, targets, *_ = next(device_batches(self.train_loader, self.samples, first, first + 1, device))
            size = self.micro_batch.find(self._step, inputs, targets, largest, self.team, self.validation_metrics)
            self.say(f"micro_batch_size is auto: {size} of {largest} sequences at once fit")
        for sampler in (self.samples, self.val_samples):
            if sampler is not None:
                sampler.micro_batch_size = self.micro_batch.size

    # ---- requests ----------------------------------------------------------------------------------------

    def request_stop(self, reason: str) -> None:
        """Stop at the end of this step, saved, so that the same command goes on later.

        On several processes, a request made in `on_step_end` by some of them takes effect one step later.
        """
        self.stop_switch.request(Stop.REQUESTED, reason)

    def request_save(self, is_best: bool = False) -> None:
        """Save a checkpoint at the end of this step, when all hooks have run. For all processes alike."""
        self._save_requested = bool(self._save_requested) or is_best

    # ---- checkpoints -------------------------------------------------------------------------------------

    def save_checkpoint(self, name: str | None = None, is_best: bool = False) -> Path:
        """Save the whole state, on every process together; the checkpoint is there when this returns.

        Args:
            name: of its directory; default: step_ and the step in eight digits.
            is_best: whether it is the best so far.

        Raises:
            ConfigError: if there is no checkpoint_dir.
            CheckpointError: if it cannot be written.
        """
        manager, name = self.checkpoint_manager, name or self._name
        if manager is None:
            raise ConfigError("there is no checkpoint_dir; set training.checkpoint_dir.")
        self._check_whole()
        self._on_savers(lambda: manager.save(run_state(self), name, is_best, model_files(self)))
        if name == self._name:
            self._saved_at = self.global_step
        return manager.checkpoint_dir / name

    def _check_whole(self) -> None:
        """Raise CheckpointError if an exception came within an update: the next step would be that one once more."""
        if self._step.is_updating:
            raise CheckpointError(
                f"an exception ended step {self.global_step + 1} as the optimizer changed the weights; load a "
                "checkpoint, or make a new Trainer, which goes on from the newest one."
            )

    def mark_saved(self) -> None:
        """Note that the present state is on the disk; but for a validation that is due, after which it is another."""
        self._saved_at = -1 if self._progress.validation_due else self.global_step
        self._step.is_updating = False

    @property
    def _name(self) -> str:
        return f"step_{self.global_step:08d}"

    def _save_if_possible(self) -> None:
        """Save in the background; at the end of the run, `_finish` waits for it."""
        manager, is_best = self.checkpoint_manager, bool(self._save_requested)
        if manager is not None and (self._saved_at != self.global_step or is_best):
            # A sharded state is saved by all, and the one before has failed on all of them or on none.
            if self.is_sharded or (self.is_main_process and not manager.has_failed):
                manager.save_in_background(run_state(self), self._name, is_best, model_files(self))
            self._saved_at = self.global_step
        self._save_requested = None

    def _on_savers(self, action: Callable[[], object]) -> None:
        """Have whoever saves do something: all processes where the state is sharded, else the main one."""
        if self.is_sharded:
            action()
        else:
            self.team.from_first(action)

    def load_checkpoint(self, path: Path | str) -> None:
        """Restore the whole state from a checkpoint; `train()` goes on from there.

        Raises:
            CheckpointError: if the checkpoint is damaged, or has not exactly the parts that this run has.
            ConfigError: if its place in the data has no meaning in this run.
        """
        restore(self, load_checkpoint(Path(path), like_of(self)), Path(path))
        self._started = True

    # ---- beginning and end -------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._start_step, self._save_requested = self.global_step, None
        self._step_model.train()
        self.model.zero_grad()  # what a caller, or a step that raised, may have left
        self.callbacks.on_train_begin(self)
        self._throughput = make_throughput(
            self.config.training, self.accelerator, self.model, self.train_loader.dataset
        )
        self._throughput.begin(self.global_step, int(self._progress.tokens))

    def _finish(self) -> None:
        """Save the end, whatever the reason, and wait until it is saved."""
        manager = self.checkpoint_manager
        if manager is not None:
            self._end_if_diverged(int(self._guard.counts[0]))
            self._save_if_possible()
            saved, self._saved_at = self._saved_at, -1
            self._on_savers(manager.wait)
            self._saved_at = saved
        self.callbacks.on_train_end(self)
        if self.stop_switch.reason:
            go_on = "; start it again to go on" if self.was_interrupted and manager is not None else ""
            self.say(f"stopped at step {self.global_step} of {self.total_steps}: {self.stop_switch.reason}{go_on}")

    def leave_group(self) -> None:
        """Leave the group of processes, for good: nothing can be trained or validated afterwards."""
        # DistributedDataParallel first, which must not be the last to hold the group (see `kept_groups`); and a group
        # left to the end of the interpreter aborts it, if one of its threads is still at work then.
        self._step.model_with_loss = self._step_model = self.accelerator.unwrap_model(self._step_model)
        self.accelerator.free_memory()
        kept_groups.clear()
        self.accelerator.end_training()

    def say(self, text: str) -> None:
        """Print a line, beside the progress bar and on the main process only."""
        if self.is_main_process:
            tqdm.write(text)


def summary(trainer: Trainer) -> str:
    """Where the run is, what it trains, on what and how; the host does not wait for the device."""
    training, validation = trainer.config.training, trainer.val_samples
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    processes = trainer.accelerator.num_processes
    latest = {name: trainer.metrics.get_latest(name) for name in ("train_loss", "val_loss")}
    rate = f"learning rate {float(trainer.scheduler.get_last_lr()[0]):.3g}"
    is_own = isinstance(trainer.scheduler, StepSchedule)
    schedule = training.lr_scheduler if is_own else type(trainer.scheduler).__name__
    lines = {
        "model": f"{type(trainer.model).__name__}, {parameters:,} parameters, precision {training.mixed_precision}",
        "device": f"{trainer.accelerator.device}, {processes} process{'es' * (processes > 1)}",
        "data": f"{trainer.samples.num_samples:,} samples, {trainer.samples.sizes_from(trainer.global_step)} in a step"
        + ("" if validation is None else f"; validation {validation.num_samples:,}"),
        "optimizer": f"{type(trainer.optimizer).__name__}, {schedule}, {rate}",
        "latest": ", ".join(f"{name} {value:.4g}" for name, value in latest.items() if value is not None) or "nothing",
        "saved in": training.checkpoint_dir or "nothing is saved",
    }
    head = f"Trainer at step {trainer.global_step:,} of {trainer.total_steps:,}, epoch {trainer.epochs_done:.3g}"
    return "\n".join([head, *(f"  {name:9}  {text}" for name, text in lines.items())])
