"""A training run: a plan and its folder, from the first step or the last checkpoint to the end."""

from __future__ import annotations

import contextlib
import functools
import platform
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from picogpt.data import Source, download_bytes
from picogpt.errors import Interrupted, RunError
from picogpt.files import existing_folder
from picogpt.runs.folder import LossLog
from picogpt.runs.settings import RunSettings
from picogpt.schedule import MAX_SUITABLE_PASSES, Pace, Schedule
from picogpt.signals import StopRequest
from picogpt.training.disk import DiskNeed, check_disk
from picogpt.training.forecast import EpochEnd, Forecaster, ForecastingObserver, rehearse, time_epoch_end
from picogpt.training.import_run import describe_losses
from picogpt.training.pacing import Pacer
from picogpt.training.plan import Plan
from picogpt.training.sample import sample_text
from picogpt.training.trainer import Observer, Trainer, build_trainer
from picogpt.wording import Notify, format_passes, plural

__all__ = ["Display", "TrainingRun"]

TIMING_SHARE = 0.05
"""Share of a budget of minutes in which steps are timed, but for one and an end of an epoch."""


class Display(Observer, Protocol):
    """An observer that holds the terminal until it is closed."""

    def close(self) -> None:
        """Release the terminal."""


class TrainingRun:
    """One start of a run.

    Args:
        plan: what is settled.
        began: when the command was started, on the clock of `time.perf_counter`.
        notify: given a line about each step of the way.
        timing: makes a display of the timed steps, which it counts by calls.
    """

    schedule: Schedule
    """The run's length; known once the trainer is where the run stood."""

    def __init__(
        self,
        plan: Plan,
        *,
        began: float,
        notify: Notify,
        timing: Callable[[], contextlib.AbstractContextManager[Callable[[], None]]],
    ) -> None:
        self.plan, self.folder, self._source = plan, plan.folder, plan.source
        self._began, self._notify, self._timing = began, notify, timing
        self.trainer = self._build(plan.source)
        self._rehearsed: tuple[float, EpochEnd] | None = None
        self._seconds: float | None = None  # of this start, where the run ends by the clock

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        plan: Plan,
        *,
        began: float,
        notify: Notify,
        timing: Callable[[], contextlib.AbstractContextManager[Callable[[], None]]],
    ) -> Iterator[TrainingRun]:
        """Build the plan's trainer, and close its source at the end; nothing is written."""
        try:
            yield cls(plan, began=began, notify=notify, timing=timing)
        finally:
            plan.source.close()

    def train(self, show: Callable[[Trainer, Schedule, Callable[[], str]], Display]) -> None:
        """Train to the end of the run, or until a signal; everything is saved either way.

        Args:
            show: makes the display, from the trainer, the run's length and a function that generates a sample of text.

        Raises:
            Interrupted: a signal ended it.
            PicoGPTError, OSError: something else did.
        """
        plan, folder, ranks = self.plan, self.folder, self.plan.ranks
        if plan.request.fresh:
            self._archive()
        folder.create()
        ranks.note_start()
        ranks.connect()
        stop = StopRequest()
        ranks.listen_to(stop)
        with stop.listen(), folder.lock() as weaknesses:
            for weakness in weaknesses:
                self._notify(weakness)
            if plan.stored is None and folder.has_checkpoint():
                raise RunError(f"{folder.path}: another process has begun this run meanwhile; start again to go on with it")
            self._prepare()
            finished = self._fit(stop, show)
            if self.trainer.schedule not in {None, self.schedule}:
                self.schedule = self.trainer.schedule
                self._write_config()
        if not finished:
            assert stop.signal_number is not None
            step = f"{self.trainer.step:,}"
            raise Interrupted(f"stopped and saved at step {step}; {self._command()} goes on from there", stop.signal_number)

    def dry_run(self) -> None:
        """Print what `train` would do and what it would take; train nothing and leave nothing behind.

        Raises:
            PicoGPTError, OSError: it could not.
        """
        plan, folder = self.plan, self.folder
        plan.ranks.connect()
        self._check_disk()
        if plan.request.fresh and folder.path.exists():
            self._notify(f"the run that is there would be kept as {folder.free_name()}")
        if plan.stored is not None and folder.has_checkpoint():
            state = folder.load_checkpoint(rename=False)[0].state
            self.trainer.step, self.trainer.seconds = int(state["step"]), float(state["seconds"])
            self.trainer.stored_plan = state.get("plan")
            self._notify(f"{folder.path}: would go on from step {self.trainer.step:,}")
        self.schedule = self._fix_schedule()
        plan.request.check_length(self.schedule.total_steps, self.trainer.step)
        self._announce()
        elapsed = self._elapsed()
        step, end = self._rehearsed or self._rehearse()
        self._notify(str(self._forecaster().forecast(step, end, step=self.trainer.step, elapsed=elapsed)))
        self._notify("dry run: nothing was trained and nothing is kept")

    def _build(self, source: Source) -> Trainer:
        plan = self.plan
        return build_trainer(plan.model, plan.train, source, plan.backend, plan.ranks)

    def _command(self) -> str:
        """The command that resumes the run."""
        logs_dir = self.plan.request.logs_dir
        logs = "" if logs_dir == Path("logs") else f" --logs-dir {shlex.quote(str(logs_dir))}"
        text = " --text -, with the same text," if "-" in self.plan.data.text else ""
        command = "picogpt-train" if self.plan.ranks.count == 1 else "torchrun ... -m -- picogpt.cli.train"
        return f"{command} --run {self.folder.name}{logs}{text}"

    def _archive(self) -> None:
        if self.folder.path.exists():
            with self.folder.lock():
                self._notify(f"the run that was there is kept as {self.folder.set_aside()}")

    def _prepare(self) -> None:
        """Bring the trainer to where the run stands, and fix the number of steps."""
        self._check_disk()
        if self.folder.has_checkpoint():
            self._restore()
        else:
            self._begin()
        self.schedule = self.trainer.schedule = self._fix_schedule()
        self.plan.request.check_length(self.schedule.total_steps, self.trainer.step)
        self._write_config()
        origin = self.plan.origin
        if origin is not None and origin.log is not None and not self.folder.has_checkpoint():
            self._keep_imported(origin.log)
        self._announce()

    def _check_disk(self) -> None:
        if warning := check_disk(self.folder.path, self._disk_need()):
            self._notify(warning)

    def _disk_need(self) -> DiskNeed:
        weights = sum(4 * parameter.numel() for parameter in self.trainer.model.parameters())
        return DiskNeed(model=weights, checkpoint=self.trainer.checkpoint_bytes())

    def _restore(self) -> None:
        checkpoint, fault = self.folder.load_checkpoint()
        if fault:
            self._notify(f"warning: {fault}")
        self.trainer.restore(checkpoint)
        self._notify(f"{self.folder.path}: goes on from step {self.trainer.step:,}")
        self._tell_usage()
        for name, before, now in self.plan.backend_changes():
            self._notify(f"{name} is {now} and was {before}: the run goes on, but not byte for byte as it would have")

    def _begin(self) -> None:
        """Start with the first batch, and with the weights that the plan starts from."""
        self._source.begin(self.folder)
        origin = self.plan.origin
        if origin is not None:
            self.trainer.begin_from(dict(origin.weights), origin.log)
            self._notify(f"begins with the weights of {origin.path}")

    def _keep_imported(self, log: LossLog) -> None:
        """Save an imported run as it came, with its loss on this text as the best one so far."""
        found = describe_losses(log)
        log.best_loss = self.trainer.validate(self.schedule.val_steps)
        self.folder.save_model(self.trainer.model.arrays(), self.trainer.model.config, self._source.text)
        self.trainer.save(self.folder)
        self.folder.write_log(log)
        self._notify(
            f"brought over {plural(log.iter_num, 'step')}{found} there; its loss on this text is {log.best_loss:.4f}; training "
            "goes on with a new optimizer, as the original's was not connected to its weights"
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
        versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy", "safetensors")}}
        self.folder.write_config({**asdict(settings), "versions": versions})

    def _fix_schedule(self) -> Schedule:
        """The run's length: as it is stored, or what the budget comes to; with minutes the trainer gets a pacer."""
        trainer, budget, stored = self.trainer, self.plan.budget, self.plan.stored
        kept = stored.schedule if stored is not None and budget == stored.budget else None
        if budget.minutes is None:
            return kept or self._new_schedule(None)
        saved = trainer.stored_plan
        if kept is not None and saved is None and self.folder.has_checkpoint():
            return kept  # a run of before there were pacers keeps its steps
        seconds, before = budget.minutes * 60, float(saved["pacer"]["seconds_spent"]) if saved else trainer.seconds
        if kept is not None and saved is not None:
            schedule, measured = Schedule(**saved["schedule"]), saved["pacer"]
            pace = Pace(
                seconds_per_step=measured["seconds_per_step"],
                seconds_per_val_batch=0.0,
                seconds_per_epoch_end=measured["seconds_per_epoch_end"],
                seconds_spent=before + self._elapsed(),
            )
            validation = float(measured["seconds_of_validation"])
        else:
            pace = self._measure_pace(seconds, before)
            schedule = self._new_schedule(pace)
            validation = pace.seconds_per_val_batch * self._val_batches(schedule)
        fixed = budget.steps_per_epoch is not None
        trainer.pacer = Pacer(seconds, trainer.config, pace, validation=validation, fixed_epochs=fixed)
        self._seconds = seconds - before
        return schedule

    def _new_schedule(self, pace: Pace | None) -> Schedule:
        trainer = self.trainer
        return self.plan.budget.schedule(
            chars_per_step=trainer.chars_per_step, train_chars=self._source.train_chars, pace=pace, steps_done=trainer.step
        )

    def _val_batches(self, schedule: Schedule) -> int:
        """Validation batches an epoch: fewer than planned where the validation text is shorter."""
        return sum(1 for _ in self._source.val_batches(schedule.val_steps))

    def _elapsed(self) -> float:
        """Seconds since the command was started."""
        return time.perf_counter() - self._began

    def _measure_pace(self, seconds: float, before: float) -> Pace:
        """Time a few steps and an end of an epoch, for a length of so many seconds of which `before` have passed."""
        step, end = self._rehearse(limit=TIMING_SHARE * (seconds - before))
        return Pace(
            seconds_per_step=step,
            seconds_per_val_batch=end.seconds_per_val_batch,
            seconds_per_epoch_end=end.seconds,
            seconds_spent=before + self._elapsed(),
        )

    def _rehearse(self, limit: float | None = None) -> tuple[float, EpochEnd]:
        """Time a few steps and an end of an epoch with a model that is thrown away, within about `limit` seconds."""
        plan = self.plan
        # The folder of a dry run does not exist; its disk is that of the folder it would be in.
        parent = existing_folder(self.folder.path)
        with self._timing() as advance:
            self._rehearsed = rehearse(plan.model, plan.train, self._build, parent, self._sample, limit=limit, advance=advance)
        return self._rehearsed

    def _sample(self, trainer: Trainer) -> str:
        return sample_text(trainer, self._notify)

    def _forecaster(self) -> Forecaster:
        trainer, schedule = self.trainer, self.schedule
        chars_left = (schedule.total_steps - trainer.step) * trainer.chars_per_step
        return Forecaster(
            schedule=lambda: trainer.schedule or schedule,
            chars_per_step=trainer.chars_per_step,
            train_chars=self._source.train_chars,
            val_batches=self._val_batches(schedule),
            disk=self._disk_need().kept,
            network=download_bytes(chars_left) if self.plan.data.commit is not None else 0,
            began=self._began,
            seconds=self._seconds,
        )

    def _announce(self) -> None:
        """Print model, backend and length."""
        plan, model, train, backend = self.plan, self.plan.model, self.plan.train, self.plan.backend
        self._notify(
            f"model: {self.trainer.model.num_params():,} parameters; {plural(model.n_layer, 'layer')}, "
            f"{plural(model.n_head, 'head')}, width {model.n_embd}, windows of {model.context_len}"
        )
        self._notify(f"device {backend.device.type} ({backend.device_reason})")
        self._notify(backend.describe())
        if backend.gradient_checkpointing:
            self._notify("blocks are computed again in the backward pass, for less memory")
        if plan.ranks.count > 1:
            rolls = train.batch_size // plan.ranks.count
            how = (
                f", brought together every {train.sync_every} steps"
                if train.sync_every
                else "; gradients are averaged every step"
            )
            self._notify(f"{plan.ranks.count} ranks, each with {rolls} of a step's rolls{how}")
        self._announce_length()

    def _announce_length(self) -> None:
        train, schedule, train_chars = self.plan.train, self.schedule, self._source.train_chars
        sequence_len = train.windows * self.plan.model.context_len
        n_epochs = len(self.trainer.log.val) + schedule.epochs_left(self.trainer.step)
        read = ""
        if train_chars is not None:  # how often the text is passed over, which an epoch is not
            passes = schedule.total_steps * self.trainer.chars_per_step / train_chars
            read = f", {format_passes(passes)}" + (", enough to learn it by heart" if passes > 2 * MAX_SUITABLE_PASSES else "")
        self._notify(
            f"{self.folder.path}: {plural(schedule.total_steps, 'step')} of {train.batch_size} x {sequence_len:,} characters, "
            f"{schedule.steps_per_epoch:,} an epoch, {plural(n_epochs, 'epoch')}{read}; recipe {train.recipe}, "
            f"learning rate {train.lr:g}, seed {train.seed}"
        )
        if self.plan.budget.is_open:
            self._notify(
                "no length given: this one suits the text (docs/training.md); --minutes, --chars or --epochs give another"
            )

    def _fit(self, stop: StopRequest, show: Callable[[Trainer, Schedule, Callable[[], str]], Display]) -> bool:
        """Train; False if a signal ended it."""
        trainer, schedule = self.trainer, self.schedule
        if trainer.step >= schedule.total_steps and not trainer.epoch_is_open:
            self._notify(
                f"{self.folder.path}: finished, all {plural(schedule.total_steps, 'step')} are done; give a larger --epochs, "
                "--minutes or --chars to go on, or --fresh to start over"
            )
            return True
        display = show(trainer, schedule, functools.partial(self._sample, trainer))
        observer = ForecastingObserver(display, self._notify, self._forecaster(), self._time_epoch_end)
        try:
            finished = trainer.fit(self.folder, schedule, observer, stop, notify=self._notify)
            if finished:
                observer.say_outcome()
            return finished
        finally:
            display.close()
            self._tell_usage()

    def _time_epoch_end(self) -> EpochEnd:
        if self.trainer.pacer is not None:
            return EpochEnd(0.0, self.trainer.pacer.seconds_per_epoch_end)
        return time_epoch_end(self.trainer, self.folder.path, self._sample)

    def _tell_usage(self) -> None:
        if summary := self._source.summary():
            self._notify(summary)
