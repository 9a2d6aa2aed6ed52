"""What a run will take: measured on a few of its own first steps, or on a rehearsal with a model that is thrown away."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import RandomSource
from picogpt.files import TEMPORARY_SUFFIX
from picogpt.plot import draw_losses
from picogpt.runs.folder import LossLog, RunFolder
from picogpt.schedule import Pace, Schedule
from picogpt.training.history import History
from picogpt.training.memory import peak_memory
from picogpt.training.trainer import Observer, StepReport, Trainer, time_call
from picogpt.wording import Notify, format_bytes, format_passes, format_seconds, say_nothing

__all__ = [
    "TIMED_STEPS",
    "EpochEnd",
    "Forecast",
    "Forecaster",
    "ForecastingObserver",
    "benchmark_steps",
    "seconds_to_finish",
    "time_epoch_end",
]

TIMED_STEPS = 6
"""Steps that are timed, after a first one that makes buffers and kernels; an even number, as every second one may take longer."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run takes from this start to its end."""

    chars: int
    """Characters of the whole run, those of earlier starts included."""
    passes: float | None
    """How many times these are the text; None for a stream."""
    seconds: float
    """On the clock, from the start of the command to its end: loading, steps, validation, saving, samples and pictures."""
    elapsed: float
    """Seconds of these that have passed."""
    memory: int
    """Peak memory of the process in bytes."""
    disk: int
    """Bytes of the run's folder: two checkpoints, the model, the log and its picture."""
    network: int
    """Bytes to fetch; 0 where the text is on this machine."""

    def __str__(self) -> str:
        network = f"about {format_bytes(self.network)}" if self.network else "none"
        passes = "" if self.passes is None else f" ({format_passes(self.passes)})"
        return (
            f"forecast: {self.chars:,} characters in all{passes}, {format_seconds(self.seconds - self.elapsed)} to go, "
            f"{format_seconds(self.seconds)} from start to end; peak memory {format_bytes(self.memory)}, "
            f"disk {format_bytes(self.disk)}, network {network}"
        )


def seconds_to_finish(schedule: Schedule, pace: Pace, *, step: int, val_batches: int) -> float:
    """Seconds from `step` steps taken to the end of `schedule`, with `val_batches` validation batches an epoch."""
    steps = max(0, schedule.total_steps - step)
    per_epoch = val_batches * pace.seconds_per_val_batch + pace.seconds_per_epoch_end
    return steps * pace.seconds_per_step + schedule.epochs_left(step) * per_epoch


@dataclass(frozen=True)
class EpochEnd:
    """What the end of an epoch takes."""

    seconds_per_val_batch: float
    seconds: float
    """Saving model and checkpoint, the sample, the picture and the page."""


def time_epoch_end(trainer: Trainer, parent: Path, *, warm_up: bool = True) -> EpochEnd:
    """Time one end of an epoch in a folder under `parent` that is then removed.

    With `warm_up` the first of two is not counted: it loads libraries, which happens once a run.
    """
    trainer.validate(1)
    validation = time_call(lambda: trainer.validate(1))
    with tempfile.TemporaryDirectory(prefix=".pace-", suffix=TEMPORARY_SUFFIX, dir=parent) as name:
        folder, history = RunFolder(Path(name)), History()
        log = LossLog(train=[1.0], val=[1.0], chars=[1], seconds=[1.0])

        def end() -> None:
            folder.save_model(trainer.model.arrays(), trainer.model.config)
            trainer.save(folder)
            history.record(trainer, trainer.source, log, say_nothing)
            history.write(folder.path)
            history.page(folder.name, trainer, log, in_training=True)
            draw_losses({"pace": log})

        if warm_up:
            end()
        return EpochEnd(validation, time_call(end))


def benchmark_steps(
    model: GPTConfig,
    config: TrainConfig,
    make: Callable[[RandomSource], Trainer],
    parent: Path,
    *,
    limit: float | None = None,
    advance: Callable[[], None] = lambda: None,
) -> tuple[float, EpochEnd]:
    """Seconds of a step, and what the end of an epoch takes, measured on noise and a model that is thrown away.

    Args:
        model: shape of the model.
        config: how it is trained.
        make: makes a trainer.
        parent: folder to save into; it is left as it was.
        limit: seconds after which no further step is timed and nothing is done twice; None for no limit.
        advance: called after each of the 1 + `TIMED_STEPS` steps.
    """
    began = time.perf_counter()
    seconds: list[float] = []
    trainer = make(RandomSource(sequence_len=config.windows * model.context_len, batch_size=config.batch_size))
    for _ in range(1 + TIMED_STEPS):
        seconds.append(time_call(lambda: trainer.train_step(config.lr)))
        advance()
        if limit is not None and time.perf_counter() - began > limit:
            break
    step = statistics.median(seconds[1:] or seconds)
    if config.sync_every:
        step += time_call(trainer.outer_step_on_all_ranks) / config.sync_every
    return step, time_epoch_end(trainer, parent, warm_up=limit is None)


@dataclass(frozen=True, kw_only=True)
class Forecaster:
    """Turns times into a forecast of one run.

    Args:
        schedule: the run's length as planned now.
        chars_per_step: characters of a step.
        train_chars: length of the text that is trained on; None for a stream.
        val_batches: validation batches an epoch.
        disk: bytes of the run's folder.
        network: bytes to fetch for the characters that are left.
        began: when the command was started, on the clock of `time.perf_counter`.
        seconds: of this start, where the run is to end by the clock; None where steps decide.
    """

    schedule: Callable[[], Schedule]
    chars_per_step: int
    train_chars: int | None
    val_batches: int
    disk: int
    network: int
    began: float
    seconds: float | None

    def forecast(self, seconds_per_step: float, end: EpochEnd, *, step: int, elapsed: float | None = None) -> Forecast:
        """The forecast with `step` steps taken, `elapsed` seconds after the start of the command (None: now)."""
        schedule = self.schedule()
        pace = Pace(
            seconds_per_step=seconds_per_step,
            seconds_per_val_batch=end.seconds_per_val_batch,
            seconds_per_epoch_end=end.seconds,
        )
        elapsed = time.perf_counter() - self.began if elapsed is None else elapsed
        ends = elapsed + seconds_to_finish(schedule, pace, step=step, val_batches=self.val_batches)
        if self.seconds is not None:
            # The plan is fitted to the minutes, but for what a step and one end of an epoch take beyond them.
            ends = max(self.seconds, min(ends, elapsed + seconds_per_step + end.seconds))
        chars = schedule.total_steps * self.chars_per_step
        return Forecast(
            chars=chars,
            passes=chars / self.train_chars if self.train_chars else None,
            seconds=ends,
            elapsed=elapsed,
            memory=peak_memory(),
            disk=self.disk,
            network=self.network,
        )


class ForecastingObserver:
    """Watches a run's first steps, says what the run will take, and passes everything on to `shown`.

    Args:
        shown: who else watches.
        tell: says a line.
        forecaster: the run.
        time_end: times an end of an epoch.
    """

    def __init__(self, shown: Observer, tell: Notify, forecaster: Forecaster, time_end: Callable[[], EpochEnd]) -> None:
        self._shown, self._tell, self._forecaster, self._time_end = shown, tell, forecaster, time_end
        self._last = time.perf_counter()
        self._seconds: list[float] = []
        self._step = 0
        self._forecast: Forecast | None = None

    def on_step(self, report: StepReport) -> None:
        """Note the step's time; after the first few, tell the forecast."""
        self._seconds.append(time.perf_counter() - self._last)
        self._step = report.step
        self._shown.on_step(report)
        if len(self._seconds) > TIMED_STEPS:
            self._report_forecast()
        self._last = time.perf_counter()

    def on_epoch(self, trainer: Trainer) -> None:
        """Tell the forecast now if the epoch was shorter than the steps that are timed."""
        self._report_forecast()
        self._shown.on_epoch(trainer)
        self._last = time.perf_counter()

    def _report_forecast(self) -> None:
        if self._forecast is not None or not self._seconds:
            return
        end = self._time_end()
        step = statistics.median(self._seconds[1:] or self._seconds)
        self._forecast = self._forecaster.forecast(step, end, step=self._step)
        self._tell(str(self._forecast))

    def report_outcome(self) -> None:
        """Say what the run took, beside what was forecast."""
        if self._forecast is None:
            return
        took, forecast = format_seconds(time.perf_counter() - self._forecaster.began), self._forecast
        self._tell(
            f"took {took} from start to end, forecast {format_seconds(forecast.seconds)}; peak memory "
            f"{format_bytes(peak_memory())}, forecast {format_bytes(forecast.memory)}"
        )
