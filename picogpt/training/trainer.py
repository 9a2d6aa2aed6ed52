"""The training loop. Progress displays and signals are attached through `Observer` and `stop`.

No state of a random generator is saved. The initial weights depend on the seed, and dropout's seed on the run's seed, the rank
and the step. The batch of step k depends on the seed and k, and for a stream also on its pool of sequences, which is part of
the checkpoint. So with a length in epochs or characters, a resumed run is bit-identical to an uninterrupted one on the same
machine. With minutes, the number of steps and the learning rates also depend on measured times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import Source, Stop, WaitInterrupted
from picogpt.device import CPU, torch_threads
from picogpt.errors import DataError, TrainingError, file_of_error
from picogpt.files import atomic_write
from picogpt.kernels.compiled import Kernels
from picogpt.runs.checkpoint import Checkpoint
from picogpt.runs.folder import RunFolder
from picogpt.runs.loss_log import LossLog
from picogpt.runs.tensor_file import Tensors
from picogpt.schedule import Schedule, epochs_since_best, fraction_of_peak, lr_at_step
from picogpt.training.averaging import WeightAverage
from picogpt.training.history import History, target_probabilities
from picogpt.training.pacing import Pacer
from picogpt.training.state import TrainState, strip_prefix
from picogpt.wording import Notify, plural, say_nothing

__all__ = ["Observer", "StepReport", "Trainer", "time_call"]

SAVE_INTERVAL = 300.0
"""Seconds of training after which a checkpoint is written in the middle of an epoch."""
HINT_EPOCHS = 3
"""Epochs without a better validation loss after which a run without patience prints a hint."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Result of one optimizer step."""

    step: int
    """Steps taken so far, this one included."""
    loss: float
    """Mean loss of the step's batch in nats per character, before the update."""
    chars: int
    """Characters of the step's batch."""


class Observer(Protocol):
    """Receiver of a run's events: every step, and every epoch after it has been saved."""

    def on_step(self, report: StepReport) -> None:
        """Called after each step."""

    def on_epoch(self, trainer: Trainer) -> None:
        """Called after each epoch; `trainer.log` has its entry."""


class Trainer(TrainState):
    """A training state with its data, loss log and checkpoints.

    Rank 0 of several processes extends this class: see `picogpt.training.rank_zero`.

    Args:
        model_config: shape of the model.
        config: training settings.
        source: source of the batches.
        dtype: type of the GEMMs; bfloat16 is used through autocast, weights and sums stay float32.
        device: device of the weights.
        kernels: native kernels that compute the blocks; None computes them with torch.
    """

    def __init__(
        self,
        model_config: GPTConfig,
        config: TrainConfig,
        source: Source,
        dtype: torch.dtype,
        *,
        device: torch.device = CPU,
        kernels: Kernels | None = None,
    ) -> None:
        super().__init__(model_config, config, dtype, device=device, kernels=kernels)
        self.source = source
        self.log = LossLog()
        self.history = History()
        """Samples and probabilities of each epoch, for the run's page."""
        self.seconds = 0.0
        """Seconds spent training, validation included, over all starts of the run."""
        self.schedule: Schedule | None = None
        """Steps of the run and their division into epochs, from now on."""
        self.pacer: Pacer | None = None
        """Fits the schedule to a budget of minutes; None for other runs."""
        self.patience: int | None = None
        """Epochs without a better validation loss after which the run ends; None trains to the end."""
        self.stored_schedule: dict[str, Any] | None = None
        """Schedule in the loaded checkpoint, with the pacer's state; None for a run with neither a pacer nor patience."""
        # Steps and characters of an imported run, which the log counts but the schedule does not.
        self._steps_before, self._chars_before = 0, 0
        # Sum of the losses and number of steps since the last log entry.
        self._epoch_loss, self._epoch_steps = 0.0, 0

    def set_patience(self, patience: int | None) -> None:
        """End the run after so many epochs without a better validation loss, that of the weights' mean; None trains to the end.

        Call it before `restore`, which restores the mean.
        """
        self.patience = patience
        self.average = None if patience is None else WeightAverage(self.model)

    @property
    def chars_per_step(self) -> int:
        """Characters of one step over all processes (nanoGPT's `tokens_per_iter`)."""
        return self.config.batch_size * self.config.windows * self.model.config.context_len

    @property
    def imported_epochs(self) -> int:
        """Epochs at the start of the log that an imported run had on its own text; their losses say nothing about this one."""
        return sum(chars <= self._chars_before for chars in self.log.chars) if self._chars_before else 0

    @property
    def epoch_is_open(self) -> bool:
        """Whether steps have been taken that the log does not contain yet."""
        return self._epoch_steps > 0

    def fit(self, run: RunFolder, schedule: Schedule, observer: Observer, stop: Stop, *, notify: Notify = say_nothing) -> bool:
        """Train to the end of `schedule`, saving into `run` after every epoch, every few minutes and when stopped.

        Args:
            run: the run's folder, created and locked.
            schedule: number of steps and their division into epochs; a pacer or patience replaces it during the run.
            observer: receives the run's events.
            stop: polled after every step and validation batch; once it returns True, the run is saved and the loop ends.
            notify: receives warnings about files that could not be written, which do not end the run, and lines about patience.

        Returns:
            Whether the schedule was finished.

        Raises:
            TrainingError: loss or gradient are not finite; the state before that step is saved.
            DataError: no more data can be read; the state before that step is saved.
            OSError: a file cannot be saved.
        """
        # Here and not in the constructor, which has no folder.
        self.history = History.read(run.path)
        try:
            return self._train_to_end(run, schedule, observer, stop, notify)
        finally:
            # Also after an error: a page that says that the run is in training would reload itself forever.
            if self.log.val:
                self._write_history(run, notify, in_training=False)

    def _train_to_end(self, run: RunFolder, schedule: Schedule, observer: Observer, stop: Stop, notify: Notify) -> bool:
        self.schedule, pacer = schedule, self.pacer
        stop = pacer.with_clock(stop) if pacer else stop
        start, before = time.perf_counter(), self.seconds
        saved_at = start
        # Each iteration is a step or the end of an epoch. The end has an iteration of its own, so that a run that was stopped
        # while it validated resumes with the validation.
        while self.step < self.schedule.total_steps or self.epoch_is_open:
            if self.epoch_is_open and self.schedule.ends_epoch(self.step):
                finished = self.finish_epoch(run, self.schedule, stop, notify)
                saved_at = time.perf_counter()
                # The checkpoint is saved by now, so a failure below loses no training.
                if finished:
                    with self._mean_weights():
                        self.history.record(self, self.source, self.log, notify)
                    self._write_log(run, notify)
                    self._write_history(run, notify, in_training=self.step < self.schedule.total_steps)
                    self._show_epoch(run, self.schedule, observer)
            else:
                report = self._step_or_save(run, lr_at_step(self.step, self.schedule, self.config), stop)
                if report is None:
                    self._save_and_stop(run, notify)
                    return False
                observer.on_step(report)
                if pacer:
                    self.schedule = pacer.after_step(self.schedule, self.step)
            # Log and checkpoint count the seconds of all starts.
            self.seconds = before + time.perf_counter() - start
            if stop():
                self._save_and_stop(run, notify)
                return False
            # Long epochs are saved in the middle too: a crash costs minutes at most.
            if time.perf_counter() - saved_at > SAVE_INTERVAL:
                self.save(run)
                saved_at = time.perf_counter()
        return True

    def _save_and_stop(self, run: RunFolder, notify: Notify) -> None:
        # A slow disk takes seconds, in which an impatient user would press Ctrl-C again.
        notify("saving; a second Ctrl-C ends at once and loses what was trained since the last checkpoint")
        self.save(run)

    def _step_or_save(self, run: RunFolder, lr: float, stop: Stop) -> StepReport | None:
        """Take a step; return None if `stop` came while waiting for data. Errors are raised after saving."""
        try:
            loss = self.train_step(lr, stop)
        except WaitInterrupted:
            return None
        except (TrainingError, DataError):
            if self._is_finite():
                self.save(run)
            raise
        self._epoch_loss += loss
        self._epoch_steps += 1
        return StepReport(step=self.step, loss=loss, chars=self.chars_per_step)

    def train_step(self, lr: float, stop: Stop = lambda: False) -> float:
        """Take one training step; return the batch's mean loss in nats per character.

        Args:
            lr: learning rate, from 0 to the config's peak `lr`. Parameter groups with a peak of their own, such as Muon's,
                take the same fraction of it.
            stop: polled while waiting for data.

        Raises:
            ConfigError: `lr` is out of its range.
            TrainingError: loss or gradient are not finite; the weights are unchanged.
            DataError: there are no more data; the weights are unchanged.
            WaitInterrupted: `stop` returned True while waiting for data; the weights are unchanged.
        """
        fraction_of_peak(lr, self.config)  # raises before a batch is taken
        # Depends on the step, and for a stream on its restored pool: a resumed run gets the same batch.
        batch = self.source.train_batch(self.step, stop)
        loss = self.local_step(batch, lr)
        self.log.iter_num = self._steps_before + self.step
        return loss

    @torch.no_grad()
    def validate(self, val_steps: int, stop: Stop = lambda: False) -> float | None:
        """Return the mean loss over at most `val_steps` validation batches in nats per character; None if stopped."""
        self.model.eval()
        total, count = 0.0, 0
        for batch in self.source.val_batches(val_steps):
            if stop():
                return None
            with torch_threads(self.threads_beside_kernels):
                logits, loss = self.predict(batch)
            if count == 0:
                # The first sequence is the start of the validation text, which the run's page shades.
                self.excerpt_probabilities = target_probabilities(logits[0], batch.targets[0])
            # Weighted by characters, as the last batch can be smaller: sum of nats / number of characters.
            total += loss.item() * batch.targets.size
            count += batch.targets.size
        return total / count

    def finish_epoch(self, run: RunFolder, schedule: Schedule, stop: Stop, notify: Notify) -> bool:
        """Validate, append the epoch to the log and save; return False if stopped before that."""
        if not run.has_checkpoint():
            # Checkpoint first: a folder with only a model looks like a finished run that cannot be resumed.
            self.save(run)
        with self._mean_weights():
            val_loss = self.validate(schedule.val_steps, stop)
            if val_loss is None:
                return False
            # Never replace good weights by broken ones, whatever the loss.
            if self._log_epoch(val_loss, schedule) and self._is_finite():
                # model.safetensors keeps the best weights, the checkpoint the latest ones.
                run.save_model(self.model.arrays(), self.model.config, self.source.text)
        # Reschedule before saving, so that the checkpoint contains the schedule that a resumed run follows.
        if self.pacer is not None and self.schedule is not None:
            self.schedule = self.pacer.after_validation(self.schedule, self.step)
        self._apply_patience(notify)
        self.save(run)
        return True

    def _log_epoch(self, val_loss: float, schedule: Schedule) -> bool:
        """Append an epoch to the log; return whether its validation loss is the best so far."""
        # All lists grow together: the log is written with one entry per epoch.
        log = self.log
        log.train.append(self._epoch_loss / self._epoch_steps)
        log.val.append(val_loss)
        log.chars.append(self._chars_before + self.step * self.chars_per_step)
        log.seconds.append(self.seconds)
        log.steps.append(log.iter_num)
        log.rates.append(lr_at_step(self.step - 1, schedule, self.config))
        self._epoch_loss, self._epoch_steps = 0.0, 0
        is_best = log.best_loss is None or val_loss < log.best_loss
        if is_best:
            log.best_loss = val_loss
        return is_best

    def _mean_weights(self) -> AbstractContextManager[None]:
        """Give the model the mean of its weights, where there is one, for validation and the sample."""
        return nullcontext() if self.average is None else self.average.applied()

    def _apply_patience(self, notify: Notify) -> None:
        """End the run if patience is exhausted; without patience, print a hint once that the model may be overfitting."""
        schedule, imported = self.schedule, self.imported_epochs
        val = self.log.val[imported:]
        waited = epochs_since_best(val)
        best_epoch = imported + len(val) - waited
        message = f"validation loss has not improved for {plural(waited, 'epoch')} (best {min(val):.4f}, in epoch {best_epoch})"
        if self.patience is None:
            # Only at the first such streak of the run, also over several starts.
            if waited == HINT_EPOCHS and all(epochs_since_best(val[:n]) < HINT_EPOCHS for n in range(1, len(val))):
                notify(
                    f"{message}: the model may be overfitting; the best weights are kept, so the run can end now (Ctrl-C); for "
                    "the next one use more text, --dropout 0.1, a shorter run or --patience"
                )
        elif waited >= self.patience and schedule is not None and self.step < schedule.total_steps:
            self.schedule = replace(schedule, total_steps=self.step)
            notify(f"{message}: the run ends here, with the weights of that epoch")

    def _write_log(self, run: RunFolder, notify: Notify) -> None:
        """Write `log.pkl`, `log.csv` and `log.jpg`. A failure is only a warning: the checkpoint contains the log too."""
        from picogpt.plot import draw_losses  # imports matplotlib, which is not needed before the first epoch ends

        try:
            run.write_log(self.log)
            atomic_write(run.plot_path, draw_losses({run.name: self.log}))
        except OSError as error:
            notify(_not_written("log or picture", error, run))

    def _write_history(self, run: RunFolder, notify: Notify, *, in_training: bool) -> None:
        """Write `epochs.json` and `log.html`. A failure is only a warning."""
        try:
            self.history.write(run.path)
            page = self.history.page(run.name, self, self.log, in_training=in_training)
            atomic_write(run.page_path, page.encode())
        except OSError as error:
            notify(_not_written("page", error, run))

    def _show_epoch(self, run: RunFolder, schedule: Schedule, observer: Observer) -> None:
        """Call the observer, and reschedule with the measured time of the epoch's end."""
        observer.on_epoch(self)
        if self.pacer is None:
            return
        self.schedule = self.pacer.after_epoch(schedule, self.step)
        if schedule.total_steps > self.step >= self.schedule.total_steps:
            # The new schedule ends here, but the checkpoint of this epoch still has the old one.
            self.save(run)

    def save(self, run: RunFolder) -> None:
        """Write a checkpoint with everything that is needed to resume.

        Raises:
            TrainingError: a weight is not finite; nothing is written.
            OSError: the disk is full, read-only or broken; the checkpoints on it are unchanged.
        """
        # A checkpoint with NaN would replace an intact one.
        if not self._is_finite():
            raise TrainingError(
                f"step {self.step}: a weight is no longer finite, nothing is saved; the previous checkpoint is intact: "
                "start again with a smaller --lr and --fresh, or --dtype float32"
            )
        tensors, counts = self.trained_state()
        # A stream's pool of sequences is part of the state; a text in memory needs only the step.
        arrays, data = self.source.snapshot()
        tensors |= {f"data.{name}": array for name, array in arrays.items()}
        state: dict[str, Any] = {
            "step": self.step,
            **counts,
            "steps_before": self._steps_before,
            "chars_before": self._chars_before,
            "data": data,
            "epoch_loss": self._epoch_loss,
            "epoch_steps": self._epoch_steps,
            "seconds": self.seconds,
            "log": self.log.to_dict(),
        }
        if self.schedule is not None and (self.pacer is not None or self.patience is not None):
            # A schedule that depends on measured times or losses is part of the state.
            state["plan"] = {"schedule": asdict(self.schedule), "pacer": self.pacer.state() if self.pacer else None}
        run.save_checkpoint(Checkpoint(tensors=tensors, state=state))

    def trained_state(self) -> tuple[Tensors, dict[str, int]]:
        """Return the tensors of a checkpoint, and its counts of local steps and ranks: here those of a single process."""
        return self.state_tensors(), {"local_steps": 0, "ranks": 1}

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters())

    def init_from_weights(self, weights: Tensors, log: LossLog | None = None) -> None:
        """Start from the weights, and the log if given, of another run, with a new optimizer state.

        Raises:
            RunError: the weights have another shape; nothing is changed.
        """
        self.load_weights(weights)
        # An imported run's curve continues; the schedule counts from 0, as this run's budget does.
        if log is not None:
            self.log = log
            self._steps_before, self._chars_before = log.iter_num, log.chars[-1] if log.chars else 0

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore everything to the state that `checkpoint` was saved in.

        Raises:
            RunError: the checkpoint's model has another shape; nothing is changed.
        """
        tensors, state = checkpoint.tensors, checkpoint.state
        # First, as it validates all shapes before it changes anything.
        self.load_tensors(tensors)
        self.source.restore(strip_prefix("data.", tensors), state["data"])
        self.restore_counters(state)

    def restore_counters(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint's `state` says of the run's course: steps, seconds, the log and the schedule."""
        self.step = int(state["step"])
        self.log = LossLog.from_dict(state["log"])
        self._steps_before, self._chars_before = int(state["steps_before"]), int(state["chars_before"])
        self._epoch_loss, self._epoch_steps = float(state["epoch_loss"]), int(state["epoch_steps"])
        self.seconds, self.stored_schedule = float(state["seconds"]), state.get("plan")


def _not_written(what: str, error: OSError, run: RunFolder) -> str:
    """Return the warning that `what` could not be written."""
    return f"warning: {file_of_error(error) or run.path}: {what} not written ({error.strerror or error}); training continues"


def time_call(call: Callable[[], object]) -> float:
    """Return the seconds that `call` takes."""
    start = time.perf_counter()  # monotonic, unlike time.time
    call()
    return time.perf_counter() - start
