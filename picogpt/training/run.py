"""A training run: execute a plan in its folder, from the first step or the last checkpoint to the end."""

from __future__ import annotations

import platform
import shlex
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Protocol

from picogpt.config import LOGS_DIR
from picogpt.data import Source, download_bytes
from picogpt.errors import Interrupted, RunError
from picogpt.files import existing_folder
from picogpt.runs.loss_log import LossLog
from picogpt.runs.settings import RunSettings
from picogpt.schedule import Pace, Schedule
from picogpt.signals import StopRequest
from picogpt.training.announce import announcement
from picogpt.training.build import build_trainer
from picogpt.training.disk import DiskNeed, check_disk
from picogpt.training.embeddings import transfer_embeddings
from picogpt.training.forecast import EpochEnd, Forecaster, ForecastingObserver, benchmark_steps, time_epoch_end
from picogpt.training.import_run import describe_losses
from picogpt.training.pacing import Pacer
from picogpt.training.plan import Plan
from picogpt.training.trainer import Observer, Trainer
from picogpt.wording import Notify, plural

__all__ = ["Display", "TrainingRun"]

TIMING_SHARE = 0.05  # one step and one end of an epoch are timed in any case
"""Fraction of a budget of minutes that benchmark steps may take."""


class Display(Observer, Protocol):
    """An observer that holds the terminal until it is closed."""

    def close(self) -> None:
        """Release the terminal."""


class TrainingRun:
    """One start of a training run.

    Args:
        plan: the resolved settings.
        began: start of the command, on the clock of `time.perf_counter`.
        notify: receives a line about each stage.
        timing: opens a progress display of the benchmark steps; its function is called after each step.
    """

    schedule: Schedule
    """The run's length; known once the trainer is restored."""

    def __init__(
        self,
        plan: Plan,
        *,
        began: float,
        notify: Notify,
        timing: Callable[[], AbstractContextManager[Callable[[], None]]],
    ) -> None:
        self.plan, self.folder, self._source = plan, plan.folder, plan.source
        self._began, self._notify, self._timing = began, notify, timing
        self.trainer = self._build(plan.source)
        # A budget of minutes needs the benchmark for its schedule; a dry run reuses it for the forecast.
        self._benchmarked: tuple[float, EpochEnd] | None = None
        self._seconds: float | None = None  # remaining budget at this start, where minutes are given

    def train(self, show: Callable[[Trainer, Schedule], Display]) -> None:
        """Train to the end of the run, or until a signal; both save everything.

        Args:
            show: makes the display, from the trainer and the run's length.

        Raises:
            Interrupted: a signal ended the run.
            PicoGPTError, OSError: an error ended the run.
        """
        plan, folder, ranks = self.plan, self.folder, self.plan.ranks
        # The old run is moved away only now, when all settings are validated and the text was read.
        if plan.request.fresh:
            self._archive()
        folder.create()
        # Recorded before anything can fail, so that a restart by torchrun resumes the run instead of archiving it.
        ranks.mark_launched()
        ranks.connect()
        stop = StopRequest()
        ranks.attach_signals(stop)
        # The lock keeps a second process out of the folder; signals are caught from here on, so that they save first.
        with stop.listen(), folder.lock() as weaknesses:
            for weakness in weaknesses:
                self._notify(weakness)
            # Between reading the settings and taking the lock another process may have started the same run.
            if plan.stored is None and folder.has_checkpoint():
                raise RunError(f"{folder.path}: another process has begun this run meanwhile; start again to resume it")
            self._prepare()
            finished = self._fit(stop, show)
            # A pacer or patience has replaced the schedule: config.json gets the final one.
            if self.trainer.schedule not in {None, self.schedule}:
                self.schedule = self.trainer.schedule
                self._write_config()
        if not finished:
            assert stop.signal_number is not None
            step = f"{self.trainer.step:,}"
            raise Interrupted(f"stopped and saved at step {step}; {self._command()} resumes from there", stop.signal_number)

    def dry_run(self) -> None:
        """Print what `train` would do and what it would cost; train nothing and keep nothing.

        Raises:
            PicoGPTError, OSError: `train` would fail.
        """
        plan, folder = self.plan, self.folder
        plan.ranks.connect()  # a rank that cannot be reached should show now
        self._check_folder()
        if plan.request.fresh and folder.path.exists():
            self._notify(f"the existing run would be kept as {folder.next_backup_name()}")
        if plan.stored is not None and folder.has_checkpoint():
            # Only the counters are needed; a damaged checkpoint is not renamed, as a dry run changes nothing.
            self.trainer.restore_counters(folder.load_checkpoint(rename=False)[0].state)
            self._notify(f"{folder.path}: would resume from step {self.trainer.step:,}")
        self.schedule = self._fix_schedule()
        plan.request.check_length(self.schedule.total_steps, self.trainer.step)
        if self._tell_if_finished():
            return
        self._announce()
        # Taken before the benchmark, which a real run without minutes does not have.
        elapsed = self._elapsed()
        step, end = self._benchmarked or self._benchmark_steps()
        self._notify(str(self._forecaster().forecast(step, end, step=self.trainer.step, elapsed=elapsed)))
        self._notify("dry run: nothing was trained and nothing is kept")

    def _build(self, source: Source) -> Trainer:
        plan = self.plan
        trainer = build_trainer(plan.model, plan.train, source, plan.backend, plan.ranks)
        trainer.set_patience(plan.budget.patience)  # before the forecast, for which the mean of the weights counts
        return trainer

    def _command(self) -> str:
        """Return the command that resumes the run."""
        logs_dir = self.plan.request.logs_dir
        logs = "" if logs_dir == LOGS_DIR else f" --logs-dir {shlex.quote(str(logs_dir))}"
        # With another number of threads the run would round differently.
        threads = "" if self.plan.request.threads is None else f" --threads {self.plan.request.threads}"
        text = " --text -, with the same text," if "-" in self.plan.data.text else ""
        command = "picogpt-train" if self.plan.ranks.count == 1 else "torchrun ... -m -- picogpt.cli.train"
        return f"{command} --run {self.folder.name}{logs}{threads}{text}"

    def _archive(self) -> None:
        if self.folder.path.exists():
            with self.folder.lock():  # not while another process trains in it
                self._notify(f"the existing run is kept as {self.folder.archive()}")

    def _prepare(self) -> None:
        """Restore or initialize the trainer, and determine the number of steps."""
        plan = self.plan
        self._check_folder()
        if self.folder.has_checkpoint():
            self._restore()
        else:
            self._begin()
        self.schedule = self.trainer.schedule = self._fix_schedule()
        plan.request.check_length(self.schedule.total_steps, self.trainer.step)
        if self.trainer.stored_schedule is not None and plan.stored is not None and plan.budget != plan.stored.budget:
            # Config and checkpoint must name the same length, or the next start would find the old schedule.
            self.trainer.save(self.folder)
        # From here on the folder contains a run that can be resumed, even without a checkpoint.
        self._write_config()
        origin = plan.origin
        if origin is not None and origin.log is not None and not self.folder.has_checkpoint():
            self._keep_imported(origin.log)
        self._announce()

    def _check_folder(self) -> None:
        # A model that the run did not write would be replaced at the next epoch.
        if self.plan.stored is not None:
            self.folder.check_model(self.plan.data.alphabet)
        if warning := check_disk(self.folder.path, self._disk_need()):
            self._notify(warning)

    def _disk_need(self) -> DiskNeed:
        # float32 on disk, whatever the type of the GEMMs.
        weights = sum(4 * parameter.numel() for parameter in self.trainer.model.parameters())
        return DiskNeed(model=weights, checkpoint=self.trainer.checkpoint_bytes() + self._source.snapshot_bytes)

    def _restore(self) -> None:
        checkpoint, fault = self.folder.load_checkpoint()
        if fault:  # the newest checkpoint is damaged, and the previous one was loaded
            self._notify(f"warning: {fault}")
        self.trainer.restore(checkpoint)
        self._notify(f"{self.folder.path}: resuming from step {self.trainer.step:,}")
        self._tell_usage()
        for name, before, now in self.plan.backend_changes():
            self._notify(f"{name} is {now} and was {before}: resuming, but no longer bit-identical")

    def _begin(self) -> None:
        """Start at the first batch, with the initial weights of the plan if it has any."""
        # A stream draws its validation text here and stores it in the folder.
        self._source.begin(self.folder)
        origin = self.plan.origin
        if origin is not None:
            weights, alphabet, how = origin.weights, self.plan.data.alphabet, ""
            if alphabet != origin.alphabet:
                weights, phrase = transfer_embeddings(weights, origin.alphabet, alphabet, self.trainer.model.arrays())
                how = f"; alphabet {alphabet.describe()}: {phrase}"
            self.trainer.init_from_weights(dict(weights), origin.log)
            self._notify(f"starting from the weights of {origin.path}{how}")

    def _keep_imported(self, log: LossLog) -> None:
        """Save an imported run before it is trained, with its loss on this text as the best loss."""
        found = describe_losses(log)
        # The original's best loss is on another text, and would keep later models from being saved.
        log.best_loss = self.trainer.validate(self.schedule.val_steps)
        self.folder.save_model(self.trainer.model.arrays(), self.trainer.model.config, self._source.text)
        self.trainer.save(self.folder)
        self.folder.write_log(log)
        self._notify(
            f"imported {plural(log.iter_num, 'step')}{found} there; its loss on this text is {log.best_loss:.4f}; training "
            "continues with a new optimizer, as the original's was not connected to its weights"
        )

    def _write_config(self) -> None:
        plan, names = self.plan, self.plan.backend.names
        assert names.threads is not None
        settings = RunSettings(
            model=plan.model,
            train=plan.train,
            budget=plan.budget,
            schedule=self.schedule,
            data=plan.data,
            dtype=names.dtype,
            threads=names.threads,
            ranks=plan.ranks.count,
            device=names.device,
            compile=names.compile,
            kernels=names.kernels,
            attention=names.attention,
            origin=plan.origin_path,
        )
        # For reading only: results can differ between versions, which helps to explain a difference.
        versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy", "safetensors")}}
        self.folder.write_config({**settings.to_dict(), "versions": versions})

    def _fix_schedule(self) -> Schedule:
        """Return the run's schedule: as stored, or computed from the budget. With minutes the trainer gets a pacer."""
        trainer, budget, stored = self.trainer, self.plan.budget, self.plan.stored
        # What is stored holds unless another length was requested: the schedule in config.json, and the newer one that a pacer or
        # patience left in the checkpoint.
        kept = stored.schedule if stored is not None and budget == stored.budget else None
        saved = trainer.stored_schedule if kept else None
        if budget.minutes is not None:
            if kept is not None and saved is None and self.folder.has_checkpoint():
                return kept  # a run that is older than pacers keeps its number of steps
            return self._pace(budget.minutes * 60, Schedule(**saved["schedule"]) if saved else None)
        return Schedule(**saved["schedule"]) if saved else kept or self._new_schedule(None)

    def _pace(self, seconds: float, schedule: Schedule | None) -> Schedule:
        """Give the trainer a pacer for `seconds`; return the schedule to begin with.

        Args:
            seconds: the budget, over all starts of the run.
            schedule: the schedule of a run that is resumed with the same budget; None measures the speed and makes one.
        """
        trainer = self.trainer
        measured = trainer.stored_schedule["pacer"] if trainer.stored_schedule else None  # a run with patience has none
        # Seconds that earlier starts have spent; suspended time is not counted by the pacer.
        before = float(measured["seconds_spent"]) if measured else trainer.seconds
        if schedule is not None and measured is not None:
            # Continue from the saved measurements, without benchmark steps.
            pace = Pace(
                seconds_per_step=measured["seconds_per_step"],
                seconds_per_val_batch=0.0,  # the pacer has measured whole validations
                seconds_per_epoch_end=measured["seconds_per_epoch_end"],
                seconds_spent=before + self._elapsed(),
            )
            validation = float(measured["seconds_of_validation"])
        else:
            pace = self._measure_pace(seconds, before)
            schedule = self._new_schedule(pace)
            validation = pace.seconds_per_val_batch * self._val_batches(schedule)
        fixed = self.plan.budget.steps_per_epoch is not None
        trainer.pacer = Pacer(seconds, trainer.config, pace, validation=validation, fixed_epochs=fixed)
        self._seconds = seconds - before
        return schedule

    def _new_schedule(self, pace: Pace | None) -> Schedule:
        trainer = self.trainer
        return self.plan.budget.schedule(
            chars_per_step=trainer.chars_per_step, train_chars=self._source.train_chars, pace=pace, steps_done=trainer.step
        )

    def _val_batches(self, schedule: Schedule) -> int:
        """Return the number of validation batches per epoch: fewer than planned if the validation text is short."""
        return sum(1 for _ in self._source.val_batches(schedule.val_steps))

    def _elapsed(self) -> float:
        """Return the seconds since the start of the command."""
        return time.perf_counter() - self._began

    def _measure_pace(self, seconds: float, before: float) -> Pace:
        """Measure the pace for a budget of `seconds`, of which `before` have passed."""
        step, end = self._benchmark_steps(limit=TIMING_SHARE * (seconds - before))
        return Pace(
            seconds_per_step=step,
            seconds_per_val_batch=end.seconds_per_val_batch,
            seconds_per_epoch_end=end.seconds,
            seconds_spent=before + self._elapsed(),
        )

    def _benchmark_steps(self, limit: float | None = None) -> tuple[float, EpochEnd]:
        """Time a few steps and an end of an epoch with a throwaway model, within about `limit` seconds."""
        plan = self.plan
        # In a dry run the folder does not exist: take the nearest parent that does, which is on the same disk.
        parent = existing_folder(self.folder.path)
        with self._timing() as advance:
            self._benchmarked = benchmark_steps(
                plan.model, plan.train, self._build, parent, alphabet=plan.data.alphabet, limit=limit, advance=advance
            )
        return self._benchmarked

    def _forecaster(self) -> Forecaster:
        trainer, schedule = self.trainer, self.schedule
        chars_left = (schedule.total_steps - trainer.step) * trainer.chars_per_step
        sequence_len = self.plan.train.windows * self.plan.model.context_len
        return Forecaster(
            # A function, because the pacer replaces the schedule while the run is on.
            schedule=lambda: trainer.schedule or schedule,
            chars_per_step=trainer.chars_per_step,
            train_chars=self._source.train_chars,
            val_batches=self._val_batches(schedule),
            disk=self._disk_need().kept,
            network=download_bytes(chars_left, sequence_len) if self.plan.data.commit is not None else 0,
            began=self._began,
            seconds=self._seconds,
        )

    def _announce(self) -> None:
        for line in announcement(self.plan, self.trainer, self.schedule):
            self._notify(line)

    def _tell_if_finished(self) -> bool:
        """Print a line if all steps are done, and return whether they are."""
        if self.trainer.step < self.schedule.total_steps or self.trainer.epoch_is_open:
            return False
        self._notify(
            f"{self.folder.path}: finished, all {plural(self.schedule.total_steps, 'step')} are done; give a larger --epochs, "
            "--minutes or --chars to continue, or --fresh to start over"
        )
        return True

    def _fit(self, stop: StopRequest, show: Callable[[Trainer, Schedule], Display]) -> bool:
        """Train; return False if a signal ended the run."""
        trainer, schedule = self.trainer, self.schedule
        if self._tell_if_finished():
            return True
        # The observer prints the forecast above the display's bar, after the first steps.
        display = show(trainer, schedule)
        observer = ForecastingObserver(display, self._notify, self._forecaster(), self._time_epoch_end)
        try:
            finished = trainer.fit(self.folder, schedule, observer, stop, notify=self._notify)
            if finished:
                observer.report_outcome()
            return finished
        finally:
            # Also after an error, whose message must not be drawn over by the bar.
            display.close()
            self._tell_usage()

    def _time_epoch_end(self) -> EpochEnd:
        if self.trainer.pacer is not None:
            # The pacer measures each end of an epoch, validation included.
            return EpochEnd(0.0, self.trainer.pacer.seconds_per_epoch_end)
        try:
            return time_epoch_end(self.trainer, self.folder.path)
        except OSError as error:
            # Its files are kept beside the run's, and a disk with room for the run alone is enough to train.
            self._notify(f"the end of an epoch is not in the forecast: trying one out failed ({error.strerror or error})")
            return EpochEnd(0.0, 0.0)

    def _tell_usage(self) -> None:
        if summary := self._source.summary():
            self._notify(summary)
