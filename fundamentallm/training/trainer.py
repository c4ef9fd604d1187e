"""The trainer: one pass of its loop is one batch is one optimizer step.

`Accelerator` owns the hardware: placement, precision, gradient exchange, clipping, process identity.
Accumulation, schedule, data order and file format are plain code here, since accelerate's own weigh tokens by
where they were computed, step the schedule once for each process, and pickle.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from fundamentallm.config import IGNORE_INDEX, Config, TrainingConfig
from fundamentallm.data.datasets import TokenDataset
from fundamentallm.data.loaders import StepSampler, derive_seed, step_loader, step_sampler
from fundamentallm.errors import CheckpointError, ConfigError, TrainingError
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.accelerator import check_accelerator, create_accelerator, seed_device
from fundamentallm.training.callbacks import (
    Callback,
    CallbackList,
    LoggingCallback,
    ProgressCallback,
    SaveBestCallback,
)
from fundamentallm.training.checkpoint import CheckpointManager
from fundamentallm.training.early_stopping import EarlyStopping
from fundamentallm.training.loss import create_loss
from fundamentallm.training.metrics import MetricTracker, RunningMean
from fundamentallm.training.optimizers import NamedOptimizerState, create_optimizer
from fundamentallm.training.schedulers import create_scheduler

logger = logging.getLogger(__name__)


class ModelWithLoss(nn.Module):
    """Model and loss in one forward pass, so that the Accelerator wraps both.

    The logits stay inside: accelerate neither casts nor copies them, and DistributedDataParallel sees a scalar.
    """

    def __init__(self, model: nn.Module, loss_fn: Any) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn
        transformers = sys.modules.get("transformers")  # imported already if the model is one of theirs
        is_theirs = transformers is not None and isinstance(model, transformers.PreTrainedModel)
        self._options = {"use_cache": False} if is_theirs else {}

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss, summed over targets."""
        output = self.model(inputs, **self._options)
        return self.loss_fn(output if isinstance(output, Tensor) else output.logits, targets)  # type: ignore[no-any-return]


class Progress:
    """How far a run is. The step says where in the data it is; the counts are kept on the device."""

    def __init__(self, samples: StepSampler, device: torch.device) -> None:
        self.samples = samples
        self.step = 0
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)  # targets trained on
        self.bad_steps = torch.zeros(2, dtype=torch.int64, device=device)  # in a row until now, in all
        self.loss = RunningMean(device)  # since the last log line

    def state_dict(self) -> dict[str, Any]:
        """Step, samples and tokens consumed, and what the next log line will sum up."""
        return {
            "step": self.step,
            "samples": self.samples.samples_before(self.step),
            "tokens": self.tokens,
            "bad_steps": self.bad_steps,
            "loss": self.loss.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place.

        Raises:
            ConfigError: if this run's batches are not those of the saved one, so that the place has no meaning.
        """
        if state["samples"] != self.samples.samples_before(state["step"]):
            raise ConfigError(
                f"the checkpoint's step {state['step']} came after {state['samples']} samples, and with this run's "
                f"data and batch_size {self.samples.batch_size} it would come after "
                f"{self.samples.samples_before(state['step'])}; resume with the same data and batch_size."
            )
        self.step = state["step"]
        self.tokens.copy_(state["tokens"])
        self.bad_steps.copy_(state["bad_steps"])
        self.loss.load_state_dict(state["loss"])


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
        accelerator: instead of one made here.

    Raises:
        ConfigError: listing what does not fit together.
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
        loss_fn: Any = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.run_config = config.resolved()
        self.config = training = self.run_config.training if isinstance(self.run_config, Config) else self.run_config
        if accelerator is not None:
            check_accelerator(accelerator)
        self.accelerator = accelerator or create_accelerator(training.mixed_precision)
        place = self.accelerator.process_index, self.accelerator.num_processes, training.micro_batch_size
        self.train_loader, self.val_loader = train_loader, val_loader
        self.samples = step_sampler("train_loader", train_loader, training.seed, *place)
        self.val_samples = step_sampler("val_loader", val_loader, 0, *place) if val_loader is not None else None
        self.batch_size, self.steps_per_epoch = self.samples.batch_size, self.samples.steps_per_epoch
        by_epochs = (training.max_epochs or math.inf) * self.steps_per_epoch
        self.total_steps = int(min(by_epochs, training.max_steps or math.inf))
        self._check(optimizer, scheduler)

        self.model = model.to(self.accelerator.device)
        self.optimizer = optimizer or create_optimizer(
            self.model,
            training.optimizer,
            training.learning_rate,
            training.weight_decay,
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            adam_epsilon=training.adam_epsilon,
            momentum=training.momentum,
            **training.optimizer_options,
        )
        self.scheduler = scheduler or create_scheduler(
            self.optimizer,
            training.lr_scheduler,
            max_epochs=1,
            steps_per_epoch=self.total_steps,
            warmup_steps=training.warmup_steps,
            min_lr_ratio=training.min_lr_ratio,
            **training.lr_scheduler_options,
        )
        # `self.model` and `self.optimizer` stay the caller's own objects, so that names and state carry no
        # wrapper; what accelerate wraps around them serves to compute only.
        with_loss = ModelWithLoss(self.model, loss_fn or create_loss(training.loss, **training.loss_options))
        self._step_model, self._scaled_optimizer = self.accelerator.prepare(with_loss, self.optimizer)
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

        self.metrics = MetricTracker()
        self.early_stopping: EarlyStopping | None = None
        if training.early_stopping_patience is not None:
            self.early_stopping = EarlyStopping(
                training.early_stopping_patience,
                training.early_stopping_metric,
                training.early_stopping_mode,
                training.early_stopping_min_delta,
            )
        self.checkpoint_manager: CheckpointManager | None = None
        if training.checkpoint_dir is not None:
            self.checkpoint_manager = CheckpointManager(training.checkpoint_dir, training.keep_last_n)
        self.callbacks = CallbackList(self._default_callbacks() if callbacks is None else callbacks)
        self._progress = Progress(self.samples, self.accelerator.device)
        self._state = {  # all that changes because of training, by name
            "model": self.model,
            "optimizer": NamedOptimizerState(self.model, self.optimizer),
            "scheduler": self.scheduler,
            "progress": self._progress,
            "metrics": self.metrics,
            **({"early_stopping": self.early_stopping} if self.early_stopping else {}),
            **({"scaler": self.accelerator.scaler} if self.accelerator.scaler else {}),
        }
        self._started = False
        self._start_step = 0
        self._stop_reason: str | None = None
        self._save_requested: bool | None = None  # and whether as the best
        self._saved_at = -1
        self._log_mark = (0.0, 0)  # when the window of the next log line began, and at how many tokens

    def _check(self, optimizer: Optimizer | None, scheduler: LRScheduler | None) -> None:
        """Refuse arguments and settings that contradict each other."""
        problems, training = [], self.config
        if training.batch_size not in (None, self.batch_size):
            problems.append(
                f"training.batch_size is {training.batch_size} and the train_loader's batch_size is {self.batch_size}; "
                "set one of them, or both alike."
            )
        if scheduler is not None and scheduler.optimizer is not optimizer:
            problems.append("the scheduler was made for another optimizer; pass its optimizer too.")
        if training.early_stopping_patience and self.val_loader is None:
            problems.append("early_stopping_patience is set and there is no val_loader; give one, or set it to null.")
        if problems:
            raise ConfigError(problems)

    def _default_callbacks(self) -> list[Callback]:
        whole = self.run_config if isinstance(self.run_config, Config) else None
        log = LoggingCallback(Path(whole.output_dir) / "metrics.jsonl" if whole else None)
        callbacks: list[Callback] = [ProgressCallback(), log]
        if self.val_loader is not None and self.checkpoint_manager is not None:
            callbacks.append(SaveBestCallback(self.config.early_stopping_metric, self.config.early_stopping_mode))
        return callbacks

    # ---- where the run is --------------------------------------------------------------------------------

    @property
    def global_step(self) -> int:
        """Optimizer steps done."""
        return self._progress.step

    @property
    def current_epoch(self) -> int:
        """Index of the epoch the next step belongs to, from 0."""
        return self.global_step // self.steps_per_epoch

    @property
    def epochs_done(self) -> float:
        """Passes over the training data done, in samples."""
        per_epoch = self.samples.samples_before(self.steps_per_epoch)
        return self.samples.samples_before(self.global_step) / per_epoch

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that prints, draws and writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def is_finished(self) -> bool:
        """Whether the run has reached its last step, or patience ran out."""
        out_of_patience = self.early_stopping is not None and self.early_stopping.should_stop
        return self.global_step >= self.total_steps or out_of_patience

    # ---- the loop ----------------------------------------------------------------------------------------

    def train(self) -> dict[str, list[float]]:
        """Train to the end of the run and return its history; goes on from a checkpoint as `config.resume` says.

        Raises:
            ConfigError: if `resume` is 'never' and the checkpoint folder is in use.
            CheckpointError: if there are checkpoints but none can be restored.
            TrainingError: after `max_bad_steps` steps in a row whose loss or gradient was not finite.
        """
        if not self._begin():
            return self.metrics.get_history()
        accelerator, config, progress = self.accelerator, self.config, self._progress
        max_norm = math.inf if config.gradient_clip_norm is None else config.gradient_clip_norm

        for inputs, targets, parts in self._batches(self.train_loader, self.samples, progress.step, self.total_steps):
            if progress.step % self.steps_per_epoch == 0 or progress.step == self._start_step:
                self.callbacks.on_epoch_begin(self)
            # Derived, not carried: a resumed run draws the same dropout masks.
            seed_device(derive_seed(config.seed, progress.step, accelerator.process_index), accelerator.device)

            # Losses are sums over targets, divided once by the number of targets of the whole step: over all
            # micro-batches and processes. DistributedDataParallel averages, which num_processes undoes.
            count = accelerator.reduce((targets != IGNORE_INDEX).sum(), "sum")
            scale = accelerator.num_processes / count.clamp(min=1)
            loss = torch.zeros((), device=accelerator.device)
            pairs = zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True)
            for part, (x, y) in enumerate(pairs, start=1):
                with nullcontext() if part == parts else accelerator.no_sync(self._step_model):
                    loss_sum = self._step_model(x, y)
                    accelerator.backward(loss_sum * scale)
                loss += loss_sum.detach()
            loss = accelerator.reduce(loss, "sum")
            norm = accelerator.clip_grad_norm_(self._parameters, max_norm)
            learning_rate = float(self.scheduler.get_last_lr()[0])
            self._optimizer_step(bad=~(loss.isfinite() & norm.isfinite()))
            self.scheduler.step()
            self.optimizer.zero_grad()

            progress.step += 1
            progress.tokens += count
            progress.loss.add(loss, count)
            if self._end_of_step(loss / count, norm, learning_rate):
                break
        return self._finish()

    def _batches(
        self, loader: DataLoader[Any], sampler: StepSampler, start: int, stop: int
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        """This process's share of each step's batch on its device, and in how many micro-batches to compute it."""
        device = self.accelerator.device
        batches = step_loader(loader, sampler, start, stop, pin_memory=device.type == "cuda")
        for step, batch in zip(range(start, stop), batches, strict=True):
            if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
                raise ConfigError(f"the loader gives {type(batch).__name__}; allowed: (inputs, targets), two tensors.")
            inputs, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
            rows = sampler.rows(step)
            if rows < len(targets):  # filling, so that every process has something to compute
                targets = targets.clone()
                targets[rows:] = IGNORE_INDEX
            yield inputs, targets, sampler.micro_batches(step)

    def _optimizer_step(self, bad: Tensor) -> None:
        """Step, unless `bad` (a boolean scalar): then no weight and no moment changes. Decided on the device."""
        in_a_row, in_all = self._progress.bad_steps.unbind()
        self._progress.bad_steps = torch.stack(((in_a_row + 1) * bad, in_all + bad))
        if self.accelerator.scaler is not None:  # fp16: the scaler finds the same, and adapts its scale
            self._scaled_optimizer.step()
        elif getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # read by torch's fused kernels
            self.optimizer.step()
        elif not bad:  # an optimizer that cannot skip by itself makes the host wait
            self.optimizer.step()

    def _end_of_step(self, loss: Tensor, norm: Tensor, learning_rate: float) -> bool:
        """Whatever is due after a step: hooks, log line, validation, checkpoint. True if the run should stop."""
        config, step = self.config, self.global_step
        at_end, epoch_ended = step == self.total_steps, step % self.steps_per_epoch == 0
        if self.callbacks.wants_step_loss:
            self.callbacks.on_step_end(self, loss.item())
        logged = at_end or step % config.log_every_n_steps == 0
        if logged:
            self._log(norm, learning_rate)
        validated = self.val_loader is not None and (
            at_end or self._due(config.eval_every_n_steps, config.eval_every_n_epochs)
        )
        started = time.perf_counter()
        if validated:
            self._validate_in_training()
        if epoch_ended:
            self.callbacks.on_epoch_end(self)
        if self._save_requested is not None or self._due(config.save_every_n_steps, config.save_every_n_epochs):
            self._save_if_possible()
        self._log_mark = (self._log_mark[0] + time.perf_counter() - started, self._log_mark[1])
        # A request made on one process alone is agreed on where the host waits for the device anyway.
        if self.accelerator.num_processes > 1 and (logged or validated or epoch_ended):
            if self._stop_reason:
                self.accelerator.set_trigger()
            if self.accelerator.check_trigger():
                self._stop_reason = self._stop_reason or "another process asked for it"
                return True
            return False
        return self._stop_reason is not None and self.accelerator.num_processes == 1

    def _due(self, every_n_steps: int | None, every_n_epochs: int | None) -> bool:
        by_step = every_n_steps is not None and self.global_step % every_n_steps == 0
        return by_step or (
            every_n_epochs is not None and self.global_step % (every_n_epochs * self.steps_per_epoch) == 0
        )

    def _log(self, norm: Tensor, learning_rate: float) -> None:
        """One line of numbers over the steps since the last one. The host waits for the device here."""
        tokens, bad_in_a_row, bad_in_all = torch.stack((self._progress.tokens, *self._progress.bad_steps)).tolist()
        total, count = self._progress.loss.totals.tolist()
        self._progress.loss.reset()
        now, (since, tokens_then) = time.perf_counter(), self._log_mark
        self._log_mark = now, tokens
        line = {
            "step": self.global_step,
            "epoch": self.epochs_done,
            "samples": self.samples.samples_before(self.global_step),
            "tokens": tokens,
            "train_loss": total / count if count else math.nan,
            "learning_rate": learning_rate,
            "grad_norm": norm.item(),
            "tokens_per_second": (tokens - tokens_then) / (now - since),
            "bad_steps": bad_in_all,
        }
        self.metrics.update(line)
        self.callbacks.on_log(self, line)
        if bad_in_a_row >= self.config.max_bad_steps:
            raise TrainingError(
                f"the loss or the gradient was not finite in the last {bad_in_a_row} optimizer steps; none of them "
                "changed the weights. Lower training.learning_rate, check the data, and look at the loss and the "
                "gradient norm before."
            )

    # ---- validation --------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """Loss over every target of the validation data, whatever its batch size and the number of processes.

        Returns:
            `val_loss` (mean per target, in nats for our losses), `val_perplexity` (its exponential), and for text
            `val_bits_per_byte`.

        Raises:
            ConfigError: if there is no val_loader, or no target in it.
        """
        if self.val_loader is None or self.val_samples is None:
            raise ConfigError("there is no val_loader; give the Trainer one.")
        was_training = self._step_model.training
        self._step_model.eval()
        mean = RunningMean(self.accelerator.device)
        with torch.no_grad():
            steps = self.val_samples.steps_per_epoch
            for inputs, targets, parts in self._batches(self.val_loader, self.val_samples, 0, steps):
                for x, y in zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True):
                    mean.add(self._step_model(x, y), (y != IGNORE_INDEX).sum())
        self._step_model.train(was_training)
        total, count = self.accelerator.reduce(mean.totals, "sum").tolist()
        if count == 0:
            raise ConfigError("val_loader has no target that counts; give it some.")
        loss = total / count
        metrics = {"val_loss": loss, "val_perplexity": math.exp(loss) if loss < 700 else math.inf}
        dataset = self.val_loader.dataset
        if isinstance(dataset, TokenDataset) and dataset.num_bytes:
            metrics["val_bits_per_byte"] = total / math.log(2) / dataset.num_bytes
        return metrics

    def _validate_in_training(self) -> None:
        metrics = self.validate()
        self.metrics.update({"val_step": self.global_step, **metrics})
        if self.early_stopping is not None:
            name = self.early_stopping.metric
            if name not in metrics:
                raise ConfigError(f"early_stopping_metric is {name!r}; allowed: {', '.join(metrics)}.")
            if self.early_stopping.step(metrics[name]):
                best, patience = self.early_stopping.best_value, self.early_stopping.patience
                self.request_stop(f"early stopping: {name} has not improved on {best:.4g} in {patience} validations")
        self.callbacks.on_validation_end(self, metrics)

    # ---- requests ----------------------------------------------------------------------------------------

    def request_stop(self, reason: str) -> None:
        """Stop at the end of this step, saved, so that the same command goes on later.

        On several processes, a request made in `on_step_end` takes effect at the next log line.
        """
        self._stop_reason = self._stop_reason or reason

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
        manager, name = self.checkpoint_manager, name or f"step_{self.global_step:08d}"
        if manager is None:
            raise ConfigError("there is no checkpoint_dir; set training.checkpoint_dir.")
        if self.is_main_process:
            state = {f"{part}_state_dict": holder.state_dict() for part, holder in self._state.items()}
            state |= {"callbacks_state_dict": self.callbacks.state_dict()}
            state |= {"config": dataclasses.asdict(self.run_config), "versions": _versions()}
            manager.save(state, name, is_best, self._model_files())
        self.accelerator.wait_for_everyone()
        self._saved_at, self._save_requested = self.global_step, None
        return manager.checkpoint_dir / name

    def _save_if_possible(self) -> None:
        if self.checkpoint_manager is not None and (self._saved_at != self.global_step or self._save_requested):
            self.save_checkpoint(is_best=bool(self._save_requested))
        self._save_requested = None

    def _model_files(self) -> dict[str, str]:
        """What transformers needs beside the weights, as far as it is known."""
        files, dataset = {}, self.train_loader.dataset
        if isinstance(dataset, TokenDataset) and dataset.tokenizer is not None:
            files["tokenizer.json"] = dataset.tokenizer.to_str()
        if isinstance(self.model, Transformer):
            context = len(dataset[0][0])
            files["config.json"] = json.dumps(self.model.transformers_config(context), indent=2)
        elif to_json := getattr(getattr(self.model, "config", None), "to_json_string", None):
            files["config.json"] = to_json(use_diff=False)
        return files

    def load_checkpoint(self, path: Path | str) -> None:
        """Restore the whole state from a checkpoint; `train()` goes on from there.

        Raises:
            CheckpointError: if the checkpoint is damaged, or has not exactly the parts that this run has.
            ConfigError: if its place in the data has no meaning in this run.
        """
        self._restore(CheckpointManager(Path(path).parent).load(path), str(path))

    def _restore(self, saved: dict[str, Any], where: str) -> None:
        expected = {f"{part}_state_dict" for part in self._state} | {"callbacks_state_dict", "config", "versions"}
        if saved.keys() != expected:
            missing, unknown = sorted(expected - saved.keys()), sorted(saved.keys() - expected)
            raise CheckpointError(f"{where} does not fit this run: it lacks {missing}, and has besides {unknown}.")
        for part, holder in self._state.items():
            try:
                holder.load_state_dict(saved[f"{part}_state_dict"])
            except (RuntimeError, KeyError, TypeError, ValueError) as error:
                if isinstance(error, ConfigError):
                    raise
                raise CheckpointError(f"{where}: its {part} does not fit this run: {error}") from error
        notes = self.callbacks.load_state_dict(saved["callbacks_state_dict"])
        for group, lr in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
        before, now = _flat(saved["config"]), _flat(dataclasses.asdict(self.run_config))
        notes += [f"{name}: {before.get(name)!r} -> {now[name]!r}" for name in now if now[name] != before.get(name)]
        self._say(f"resumed from {where} at step {self.global_step}")
        if notes:
            self._say("changed since: " + "; ".join(notes))
        self._started, self._saved_at = True, self.global_step

    def _resume(self) -> None:
        """Restore what `config.resume` says, if anything."""
        manager, resume = self.checkpoint_manager, self.config.resume
        if resume not in ("auto", "never"):
            self.load_checkpoint(Path(resume).expanduser())
        elif manager is not None and resume == "never":
            if manager.checkpoint_dir.is_dir() and any(manager.checkpoint_dir.iterdir()):
                raise ConfigError(
                    f"resume is 'never' and {manager.checkpoint_dir} holds a run already; choose another output_dir "
                    "(or checkpoint_dir), or resume: auto to go on with it."
                )
        elif manager is not None:
            saved, path, passed_over = manager.load_latest()
            for reason in passed_over:
                self._say(f"passed over {reason}")
            if saved is not None:
                self._restore(saved, str(path))
            elif passed_over:
                raise CheckpointError(
                    f"none of the checkpoints in {manager.checkpoint_dir} is intact, and starting afresh among them "
                    "would mix two runs; choose another output_dir, or move them away."
                )

    # ---- beginning and end -------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """Restore and announce; False if there is nothing left to do."""
        if not self._started:
            self._resume()
            self._started = True
        if self.is_finished:
            self._say(
                f"this run is finished, at step {self.global_step} of {self.total_steps}; "
                "raise training.max_steps or max_epochs to go on, or choose another output_dir."
            )
            return False
        if self.checkpoint_manager is None and self.is_main_process:
            logger.warning("training.checkpoint_dir is not set: nothing will be saved.")
        self._start_step, self._stop_reason, self._save_requested = self.global_step, None, None
        self._step_model.train()
        self.callbacks.on_train_begin(self)
        self._log_mark = time.perf_counter(), int(self._progress.tokens)
        return True

    def _finish(self) -> dict[str, list[float]]:
        """Save the end, whatever the reason, and return the history."""
        self._save_if_possible()
        self.callbacks.on_train_end(self)
        if self._stop_reason:
            self._say(f"stopped at step {self.global_step} of {self.total_steps}: {self._stop_reason}")
        return self.metrics.get_history()

    def _say(self, text: str) -> None:
        if self.is_main_process:
            tqdm.write(text)


def _versions() -> dict[str, str]:
    packages = ("fundamentallm", "torch", "accelerate", "safetensors", "tokenizers")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} of nested settings."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
