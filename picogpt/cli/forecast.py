"""Measures what a run takes, on a few of its own first steps or on a rehearsal, and says it; at the end, what it took."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from picogpt.config import GPTConfig, Pace, Schedule, TrainConfig
from picogpt.data import RepeatedSource
from picogpt.files import TEMPORARY_SUFFIX
from picogpt.forecast import Forecast, format_bytes, format_seconds, seconds_to_finish
from picogpt.memory import peak_memory
from picogpt.plot import draw_losses
from picogpt.run import LossLog, RunFolder
from picogpt.train import Observer, StepReport, Trainer, seconds_of

__all__ = ["EpochEnd", "Forecaster", "ForecastingObserver", "rehearse", "time_epoch_end"]

TIMED_STEPS = 6
"""Steps that are timed, after a first one that makes buffers and kernels; an even number, as every second one may take longer."""
SMALL_FILES = 400_000
"""Bytes for config, loss log, its picture, and the validation text of a stream."""

Sampler = Callable[[Trainer], str]


@dataclass(frozen=True)
class EpochEnd:
    """What the end of an epoch takes."""

    seconds_per_val_batch: float
    seconds: float
    """Saving model and checkpoint, the sample and the picture."""
    disk: int
    """Bytes of a run's folder."""


def time_epoch_end(trainer: Trainer, parent: Path, sample: Sampler) -> EpochEnd:
    """Time one end of an epoch in a folder under `parent` that is then removed.

    The first of two is not counted: it loads libraries, which happens once a run.
    """
    trainer.validate(1)
    validation = seconds_of(lambda: trainer.validate(1))
    with tempfile.TemporaryDirectory(prefix=".pace-", suffix=TEMPORARY_SUFFIX, dir=parent) as name:
        folder = RunFolder(Path(name))

        def end() -> None:
            folder.save_model(trainer.model.arrays(), trainer.model.config)
            trainer.save(folder)
            sample(trainer)
            draw_losses({"pace": LossLog(train=[1.0], val=[1.0], chars=[1], seconds=[1.0])})

        end()
        seconds = seconds_of(end)
        disk = SMALL_FILES + sum(path.stat().st_size for path in folder.path.iterdir())
    return EpochEnd(validation, seconds, disk)


def rehearse(
    model: GPTConfig, config: TrainConfig, make: Callable[[RepeatedSource], Trainer], parent: Path, sample: Sampler
) -> tuple[float, EpochEnd]:
    """Seconds of a step, and what the end of an epoch takes, measured on noise and a model that is thrown away."""
    trainer = make(RepeatedSource(roll_len=config.windows * model.context_len, batch_size=config.batch_size))
    trainer.update(config.lr)
    step = statistics.median(seconds_of(lambda: trainer.update(config.lr)) for _ in range(TIMED_STEPS))
    if config.sync_every:
        step += seconds_of(trainer.take_outer_step) / config.sync_every
    return step, time_epoch_end(trainer, parent, sample)


@dataclass(frozen=True, kw_only=True)
class Forecaster:
    """Turns times into a forecast of one run.

    Args:
        schedule: the run's length.
        chars_per_step: characters of a step.
        first_step: steps taken when this start began.
        val_batches: validation batches an epoch.
        network: bytes to fetch for the characters that are left.
    """

    schedule: Schedule
    chars_per_step: int
    first_step: int
    val_batches: int
    network: int

    def forecast(self, seconds_per_step: float, end: EpochEnd, *, step: int, seconds_before: float = 0.0) -> Forecast:
        """The forecast at `step` steps, `seconds_before` after the start."""
        pace = Pace(
            seconds_per_step=seconds_per_step,
            seconds_per_val_batch=end.seconds_per_val_batch,
            seconds_per_epoch_end=end.seconds,
        )
        left = seconds_to_finish(self.schedule, pace, step=step, val_batches=self.val_batches)
        return Forecast(
            chars=self.schedule.total_steps * self.chars_per_step,
            seconds=seconds_before + left,
            memory=peak_memory(),
            disk=end.disk,
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

    def __init__(
        self, shown: Observer, tell: Callable[[str], None], forecaster: Forecaster, time_end: Callable[[], EpochEnd]
    ) -> None:
        self._shown, self._tell, self._forecaster, self._time_end = shown, tell, forecaster, time_end
        self._start = self._last = time.perf_counter()
        self._seconds: list[float] = []
        self._step = forecaster.first_step
        self._forecast: Forecast | None = None

    def on_step(self, report: StepReport) -> None:
        """Note the step's time; after the first few, tell the forecast."""
        self._seconds.append(time.perf_counter() - self._last)
        self._step = report.step
        self._shown.on_step(report)
        if len(self._seconds) > TIMED_STEPS:
            self._say_forecast()
        self._last = time.perf_counter()

    def on_epoch(self, trainer: Trainer) -> None:
        """Tell the forecast now if the epoch was shorter than the steps that are timed."""
        self._say_forecast()
        self._shown.on_epoch(trainer)
        self._last = time.perf_counter()

    def _say_forecast(self) -> None:
        if self._forecast is not None or not self._seconds:
            return
        end = self._time_end()
        step = statistics.median(self._seconds[1:] or self._seconds)
        before = time.perf_counter() - self._start
        self._forecast = self._forecaster.forecast(step, end, step=self._step, seconds_before=before)
        self._tell(str(self._forecast))

    def say_outcome(self) -> None:
        """Say what the run took, beside what was forecast."""
        if self._forecast is None:
            return
        took = format_seconds(time.perf_counter() - self._start)
        self._tell(
            f"took {took}, forecast {format_seconds(self._forecast.seconds)}; peak memory {format_bytes(peak_memory())}, "
            f"forecast {format_bytes(self._forecast.memory)}"
        )
