"""One start of a training run: from settings to the end of training."""

from __future__ import annotations

import functools
import platform
import shlex
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picogpt.cli.bringover import describe_losses
from picogpt.cli.common import StopRequest, notice
from picogpt.cli.disk import DiskNeed, check_disk
from picogpt.cli.machine import Machine
from picogpt.cli.settings import Request
from picogpt.config import MAX_SUITABLE_PASSES, Budget, DataConfig, GPTConfig, Pace, RunSettings, Schedule, TrainConfig
from picogpt.errors import Interrupted, PicoGPTError, RunError
from picogpt.forecast import format_passes
from picogpt.wording import plural

if TYPE_CHECKING:
    from picogpt.cli.forecast import EpochEnd, Forecaster
    from picogpt.data import Source
    from picogpt.ranks import Ranks
    from picogpt.run import LossLog, RunFolder
    from picogpt.train import Trainer

__all__ = ["Origin", "Session"]

SAMPLE_CHARS = 160
"""Characters of the sample after each epoch."""
TIMING_SHARE = 0.05
"""Share of a budget of minutes in which steps are timed, but for one and an end of an epoch."""


@dataclass(frozen=True)
class Origin:
    """What a run begins from."""

    path: Path
    config: GPTConfig
    weights: dict[str, Any]
    log: LossLog | None

    @classmethod
    def find(cls, request: Request) -> Origin | None:
        """Read what the flags name.

        Raises:
            RunError: it is missing, damaged or of another kind.
        """
        from picogpt.find import find_model
        from picogpt.original import read_original
        from picogpt.run import load_model

        if request.init_from is not None:
            path, _ = find_model(request.init_from, request.logs_dir)
            config, weights = load_model(path)
            return cls(path.absolute(), config, weights, None)
        if request.import_original is not None:
            original = read_original(request.import_original, request.given.get("n_head", GPTConfig().n_head))
            return cls(request.import_original.absolute(), original.config, original.weights, original.log)
        return None


class Session:
    """One start of a training run: settles what is still open, says it, and trains."""

    trainer: Trainer
    schedule: Schedule

    def __init__(
        self,
        run: RunFolder,
        source: Source,
        request: Request,
        stored: RunSettings | None,
        *,
        origin: Origin | None,
        ranks: Ranks | None,
    ) -> None:
        from picogpt.ranks import Ranks

        self._ranks = ranks or Ranks()
        self.run, self._source, self.request, self._stored, self._origin = run, source, request, stored, origin
        self._rehearsed: tuple[float, EpochEnd] | None = None
        self._seconds: float | None = None  # of this start, where the run ends by the clock

    def train(self, model: GPTConfig, config: TrainConfig, budget: Budget, data: DataConfig) -> None:
        """Train to the end of the run, or until a signal; everything is saved either way.

        Raises:
            Interrupted: a signal ended it.
            PicoGPTError, OSError: something else did.
        """
        self._machine = Machine.settle(self.request, self._stored, model, config, self._ranks)
        if self.request.fresh:
            self._set_aside()
        self.run.create()
        self._ranks.note_start()
        self._ranks.connect()
        stop = StopRequest()
        self._ranks.listen_to(stop)
        with stop.listen(), self.run.lock() as weaknesses:
            for weakness in weaknesses:
                notice(weakness)
            if self._stored is None and self.run.has_checkpoint():
                raise RunError(f"{self.run.path}: another process has begun this run meanwhile; start again to go on with it")
            self._prepare(model, config, budget, data)
            finished = self._fit(stop, data)
            if self.trainer.schedule not in {None, self.schedule}:
                self.schedule = self.trainer.schedule
                self._write_config(self._settings(model, config, budget, data))
        if not finished:
            assert stop.signal_number is not None
            step = f"{self.trainer.step:,}"
            raise Interrupted(f"stopped and saved at step {step}; {self._command(data)} goes on from there", stop.signal_number)

    def rehearse(self, model: GPTConfig, config: TrainConfig, budget: Budget, data: DataConfig) -> None:
        """Say what `train` would do and what it would take; train nothing and leave nothing behind.

        Raises:
            PicoGPTError, OSError: it could not.
        """
        self._machine = Machine.settle(self.request, self._stored, model, config, self._ranks)
        self._ranks.connect()
        self.trainer = self._new_trainer(model, config, self._source)
        self._check_disk()
        if self.request.fresh and self.run.path.exists():
            notice(f"the run that is there would be kept as {self.run.free_name()}")
        if self._stored is not None and self.run.has_checkpoint():
            state = self.run.load_checkpoint(rename=False)[0].state
            self.trainer.step, self.trainer.seconds = int(state["step"]), float(state["seconds"])
            self.trainer.stored_plan = state.get("plan")
            notice(f"{self.run.path}: would go on from step {self.trainer.step:,}")
        self.schedule = self._fix_schedule(budget)
        self.request.refuse_finished(self.schedule.total_steps, self.trainer.step)
        self._announce(self._settings(model, config, budget, data), budget)
        elapsed = self._elapsed()
        step, end = self._rehearsed or self._measure()
        notice(str(self._forecaster(data).forecast(step, end, step=self.trainer.step, elapsed=elapsed)))
        notice("dry run: nothing was trained and nothing is kept")

    def _command(self, data: DataConfig) -> str:
        """What to type to go on."""
        logs = "" if self.request.logs_dir == Path("logs") else f" --logs-dir {shlex.quote(str(self.request.logs_dir))}"
        text = " --text -, with the same text," if "-" in data.text else ""
        command = "picogpt-train" if self._ranks.count == 1 else "torchrun ... -m -- picogpt.cli.train"
        return f"{command} --run {self.run.name}{logs}{text}"

    def _set_aside(self) -> None:
        if self.run.path.exists():
            with self.run.lock():
                notice(f"the run that was there is kept as {self.run.set_aside()}")

    def _prepare(self, model: GPTConfig, config: TrainConfig, budget: Budget, data: DataConfig) -> None:
        """Make the trainer, where it stood if the run goes on, and fix the number of steps."""
        self.trainer = self._new_trainer(model, config, self._source)
        self._check_disk()
        if self.run.has_checkpoint():
            self._restore()
        else:
            self._begin()
        self.schedule = self.trainer.schedule = self._fix_schedule(budget)
        self.request.refuse_finished(self.schedule.total_steps, self.trainer.step)
        settings = self._settings(model, config, budget, data)
        self._write_config(settings)
        if self._origin is not None and self._origin.log is not None and not self.run.has_checkpoint():
            self._keep_imported(self._origin.log)
        self._announce(settings, budget)

    def _check_disk(self) -> None:
        if warning := check_disk(self.run.path, self._disk_need()):
            notice(warning)

    def _write_config(self, settings: RunSettings) -> None:
        versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy", "safetensors")}}
        self.run.write_config({**asdict(settings), "versions": versions})

    def _new_trainer(self, model: GPTConfig, config: TrainConfig, source: Source) -> Trainer:
        from picogpt.train import Trainer

        machine = self._machine
        trainer = Trainer(model, config, source, machine.dtype, device=machine.device, ranks=self._ranks, kernels=machine.kernels)
        if machine.compile:
            trainer.compile_blocks()
        if machine.attention is not None:
            trainer.model.transformer.attention = machine.attention
        trainer.model.transformer.gradient_checkpointing = self.request.gradient_checkpointing
        return trainer

    def _settings(self, model: GPTConfig, config: TrainConfig, budget: Budget, data: DataConfig) -> RunSettings:
        return RunSettings(
            model=model,
            train=config,
            budget=budget,
            schedule=self.schedule,
            data=data,
            dtype=self._machine.dtype_name,
            threads=self._machine.threads,
            ranks=self._ranks.count,
            device=self._machine.device.type,
            compile=self._machine.compile,
            kernels=self._machine.kernels_name,
            attention=self._machine.attention,
            origin=self._origin_path(),
        )

    def _restore(self) -> None:
        assert self._stored is not None
        checkpoint, fault = self.run.load_checkpoint()
        if fault:
            notice(f"warning: {fault}")
        self.trainer.restore(checkpoint)
        notice(f"{self.run.path}: goes on from step {self.trainer.step:,}")
        self._tell_usage()
        for name, before, now in self._machine.changes(self._stored, self._ranks.count):
            notice(f"{name} is {now} and was {before}: the run goes on, but not byte for byte as it would have")

    def _origin_path(self) -> str | None:
        if self._stored is not None:
            return self._stored.origin
        return None if self._origin is None else str(self._origin.path)

    def _begin(self) -> None:
        """Begin with the first batch, and with what the run begins from."""
        self._source.begin(self.run)
        if self._origin is not None:
            self.trainer.begin_from(self._origin.weights, self._origin.log)
            notice(f"begins with the weights of {self._origin.path}")

    def _keep_imported(self, log: LossLog) -> None:
        """Save an imported run as it came, with a best loss on this text, which is what later ones are compared with."""
        told = describe_losses(log)
        log.best_loss = self.trainer.validate(self.schedule.val_steps)
        self.run.save_model(self.trainer.model.arrays(), self.trainer.model.config, self._source.text)
        self.trainer.save(self.run)
        self.run.write_log(log)
        notice(
            f"brought over {plural(log.iter_num, 'step')}{told} there; its loss on this text is {log.best_loss:.4f}; training "
            "goes on with a new optimizer, as the original's was not connected to its weights"
        )

    def _fix_schedule(self, budget: Budget) -> Schedule:
        """The run's length: as it is stored, or what the budget comes to; with minutes the trainer gets a pacer."""
        from picogpt.pacing import Pacer

        trainer = self.trainer
        kept = self._stored.schedule if self._stored is not None and budget == self._stored.budget else None
        if budget.minutes is None:
            return kept or self._new_schedule(budget, None)
        plan = trainer.stored_plan
        if kept is not None and plan is None and self.run.has_checkpoint():
            return kept  # a run of before there were pacers keeps its steps
        before = float(plan["pacer"]["seconds_spent"]) if plan else trainer.seconds
        if kept is not None and plan is not None:
            schedule, measured = Schedule(**plan["schedule"]), plan["pacer"]
            pace = Pace(
                seconds_per_step=measured["seconds_per_step"],
                seconds_per_val_batch=0.0,
                seconds_per_epoch_end=measured["seconds_per_epoch_end"],
                seconds_spent=before + self._elapsed(),
            )
            validation = float(measured["seconds_of_validation"])
        else:
            pace = self._measure_pace(budget.minutes * 60, before)
            schedule = self._new_schedule(budget, pace)
            validation = pace.seconds_per_val_batch * self._val_batches(schedule)
        fixed = budget.steps_per_epoch is not None
        trainer.pacer = Pacer(budget.minutes * 60, trainer.config, pace, validation=validation, fixed_epochs=fixed)
        self._seconds = budget.minutes * 60 - before
        return schedule

    def _new_schedule(self, budget: Budget, pace: Pace | None) -> Schedule:
        trainer = self.trainer
        return budget.schedule(
            chars_per_step=trainer.chars_per_step, train_chars=self._source.train_chars, pace=pace, steps_done=trainer.step
        )

    def _val_batches(self, schedule: Schedule) -> int:
        """Validation batches an epoch: fewer than planned where the validation text is shorter."""
        return sum(1 for _ in self._source.val_batches(schedule.val_steps))

    def _elapsed(self) -> float:
        """Seconds since the command was started."""
        return time.perf_counter() - self.request.began

    def _measure_pace(self, seconds: float, before: float) -> Pace:
        """Time a few steps and an end of an epoch, for a length of so many seconds of which `before` have passed."""
        step, end = self._measure(limit=TIMING_SHARE * (seconds - before))
        return Pace(
            seconds_per_step=step,
            seconds_per_val_batch=end.seconds_per_val_batch,
            seconds_per_epoch_end=end.seconds,
            seconds_spent=before + self._elapsed(),
        )

    def _measure(self, limit: float | None = None) -> tuple[float, EpochEnd]:
        """Time a few steps and an end of an epoch with a model that is thrown away, within about `limit` seconds."""
        from picogpt.cli.forecast import rehearse
        from picogpt.files import existing_folder

        model, config = self.trainer.model.config, self.trainer.config
        # The folder of a dry run does not exist; its disk is that of the folder it would be in.
        parent = existing_folder(self.run.path)
        make = functools.partial(self._new_trainer, model, config)
        self._rehearsed = rehearse(model, config, make, parent, self._sample, limit=limit)
        return self._rehearsed

    def _forecaster(self, data: DataConfig) -> Forecaster:
        from picogpt.cli.forecast import Forecaster
        from picogpt.data import download_bytes

        trainer, schedule = self.trainer, self.schedule
        chars_left = (schedule.total_steps - trainer.step) * trainer.chars_per_step
        return Forecaster(
            schedule=lambda: trainer.schedule or schedule,
            chars_per_step=trainer.chars_per_step,
            train_chars=self._source.train_chars,
            val_batches=self._val_batches(schedule),
            disk=self._disk_need().kept,
            network=download_bytes(chars_left) if data.commit is not None else 0,
            began=self.request.began,
            seconds=self._seconds,
        )

    def _disk_need(self) -> DiskNeed:
        weights = sum(4 * parameter.numel() for parameter in self.trainer.model.parameters())
        return DiskNeed(model=weights, checkpoint=self.trainer.checkpoint_bytes())

    def _announce(self, settings: RunSettings, budget: Budget) -> None:
        model, train, schedule = settings.model, settings.train, settings.schedule
        notice(
            f"model: {self.trainer.model.num_params():,} parameters; {plural(model.n_layer, 'layer')}, "
            f"{plural(model.n_head, 'head')}, width {model.n_embd}, windows of {model.context_len}"
        )
        notice(f"device {settings.device} ({self._machine.device_reason})")
        notice(self._machine.description())
        if self.request.gradient_checkpointing:
            notice("blocks are computed again in the backward pass, for less memory")
        if settings.ranks > 1:
            rolls = train.batch_size // settings.ranks
            notice(f"{settings.ranks} ranks, each with {rolls} of a step's rolls{self._tell_sync(train)}")
        roll_len = train.windows * model.context_len
        n_epochs = len(self.trainer.log.val) + schedule.epochs_left(self.trainer.step)
        notice(
            f"{self.run.path}: {plural(schedule.total_steps, 'step')} of {train.batch_size} x {roll_len:,} characters, "
            f"{schedule.steps_per_epoch:,} an epoch, {plural(n_epochs, 'epoch')}{self._tell_passes()}; recipe {train.recipe}, "
            f"learning rate {train.lr:g}, seed {train.seed}"
        )
        if budget.is_open:
            notice("no length given: this one suits the text (docs/training.md); --minutes, --chars or --epochs give another")

    def _tell_passes(self) -> str:
        """How often the text is passed over, which an epoch is not."""
        train_chars = self._source.train_chars
        if train_chars is None:
            return ""
        passes = self.schedule.total_steps * self.trainer.chars_per_step / train_chars
        learned = ", enough to learn it by heart" if passes > 2 * MAX_SUITABLE_PASSES else ""
        return f", {format_passes(passes)}{learned}"

    @staticmethod
    def _tell_sync(train: TrainConfig) -> str:
        return f", brought together every {train.sync_every} steps" if train.sync_every else "; gradients are averaged every step"

    def _fit(self, stop: StopRequest, data: DataConfig) -> bool:
        """Train; False if a signal ended it."""
        from picogpt.cli.forecast import EpochEnd, ForecastingObserver, time_epoch_end
        from picogpt.cli.progress import TrainingDisplay

        if self.trainer.step >= self.schedule.total_steps and not self.trainer.epoch_is_open:
            notice(
                f"{self.run.path}: finished, all {plural(self.schedule.total_steps, 'step')} are done; give a larger --epochs, "
                "--minutes or --chars to go on, or --fresh to start over"
            )
            return True
        trainer = self.trainer
        display = TrainingDisplay(self.schedule, trainer, lambda: self._sample(trainer))

        def time_end() -> EpochEnd:
            if trainer.pacer is not None:
                return EpochEnd(0.0, trainer.pacer.seconds_per_epoch_end)
            return time_epoch_end(trainer, self.run.path, self._sample)

        observer = ForecastingObserver(display, notice, self._forecaster(data), time_end)
        try:
            finished = trainer.fit(self.run, self.schedule, observer, stop, notify=notice)
            if finished:
                observer.say_outcome()
            return finished
        finally:
            display.close()
            self._tell_usage()

    def _tell_usage(self) -> None:
        if summary := self._source.summary():
            notice(summary)

    def _sample(self, trainer: Trainer) -> str:
        """A text that the trainer's model writes after a newline, the same draws every time."""
        from picogpt.config import GenerateConfig, SampleConfig
        from picogpt.engine import Engine, find_backend
        from picogpt.generate import RollingDecoder, Sampler, StopWatcher, generate, never_drawn
        from picogpt.rng import sample_generator
        from picogpt.tokenizer import CharTokenizer

        tokenizer = CharTokenizer()
        try:
            engine = Engine(trainer.model.config, trainer.model.arrays(), backend=find_backend(notice))
        except PicoGPTError as error:
            return f"(no sample: {error})"
        decoder = RollingDecoder(engine, GenerateConfig().hop_for(engine.config.context_len))
        logits = decoder.prefill(tokenizer.encode("\n")[None])
        sampler = Sampler(SampleConfig(), [sample_generator(0)], never_drawn(self._source.text))
        made = generate(decoder, logits, SAMPLE_CHARS, sampler=sampler, watchers=[StopWatcher([])])
        return "".join(tokenizer.decode(ids) for (ids,) in made)
