"""Forecast of a run's time, memory and disk, measured on its first steps or on benchmark steps of a throwaway model."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from picogpt.alphabet import PICOGPT, Alphabet
from picogpt.config import GPTConfig, TrainConfig
from picogpt.data import RandomSource
from picogpt.files import TEMPORARY_SUFFIX
from picogpt.plot import draw_losses
from picogpt.runs.folder import RunFolder
from picogpt.runs.loss_log import LossLog
from picogpt.schedule import Pace, Schedule
from picogpt.training.history import History
from picogpt.training.memory import peak_memory
from picogpt.training.rank_zero import RankZeroTrainer
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

TIMED_STEPS = 6  # even, as Muon may make every second step longer
"""Number of timed steps, after a warm-up step that allocates buffers."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Cost of a run from this start to its end."""

    chars: int
    """Characters of the whole run, including earlier starts."""
    passes: float | None
    """Passes over the text; None for a stream of unknown length."""
    seconds: float
    """Wall time from the start of the command to its end: loading, steps, validation, saving, samples and plots."""
    elapsed: float
    """Seconds since the start of the command."""
    memory: int
    """Peak memory of the process in bytes."""
    disk: int
    """Bytes of the run's folder: two checkpoints, the model, the log and its plot."""
    network: int
    """Bytes to download; 0 where the text is on this machine."""

    def __str__(self) -> str:
        # Both the remaining time and the total: for a budget of minutes the total is what the user asked for.
        network = f"about {format_bytes(self.network)}" if self.network else "none"
        passes = "" if self.passes is None else f" ({format_passes(self.passes)})"
        return (
            f"forecast: {self.chars:,} characters in all{passes}, {format_seconds(self.seconds - self.elapsed)} to go, "
            f"{format_seconds(self.seconds)} from start to end; peak memory {format_bytes(self.memory)}, "
            f"disk {format_bytes(self.disk)}, network {network}"
        )


def seconds_to_finish(schedule: Schedule, pace: Pace, *, step: int, val_batches: int) -> float:
    """Return the seconds from `step` to the end of `schedule`, with `val_batches` validation batches per epoch."""
    steps = max(0, schedule.total_steps - step)  # a rescheduled run can have taken more than the new schedule has
    per_epoch = val_batches * pace.seconds_per_val_batch + pace.seconds_per_epoch_end
    return steps * pace.seconds_per_step + schedule.epochs_left(step) * per_epoch


@dataclass(frozen=True)
class EpochEnd:
    """Times of the end of an epoch."""

    seconds_per_val_batch: float
    seconds: float
    """Seconds to save model and checkpoint, generate the sample, and write the plot and the page."""


def time_epoch_end(trainer: Trainer, parent: Path, *, warm_up: bool = True) -> EpochEnd:
    """Time one end of an epoch in a temporary folder under `parent`.

    With `warm_up` it is run twice and the first time is not counted, because it loads libraries.
    """
    trainer.validate(1)  # warm-up: the first call without a backward pass allocates other buffers
    validation = time_call(lambda: trainer.validate(1))
    # On the run's own disk, whose speed decides how long a checkpoint takes.
    with tempfile.TemporaryDirectory(prefix=".pace-", suffix=TEMPORARY_SUFFIX, dir=parent) as name:
        folder, history = RunFolder(Path(name)), History()
        # A log of one epoch, as drawing needs losses.
        log = LossLog(train=[1.0], val=[1.0], chars=[1], seconds=[1.0])

        # The same calls as the trainer's at an epoch's end.
        def end() -> None:
            folder.save_model(trainer.model.arrays(), trainer.model.config, trainer.source.text)
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
    alphabet: Alphabet = PICOGPT,
    limit: float | None = None,
    advance: Callable[[], None] = lambda: None,
) -> tuple[float, EpochEnd]:
    """Time steps and an end of an epoch on random data with a throwaway model; return seconds of a step, and the epoch end.

    Args:
        model: shape of the model.
        config: training settings.
        make: builds a trainer for a source.
        parent: folder to save into; nothing is left in it.
        alphabet: characters of the model.
        limit: seconds after which no further step is timed, and no warm-up is done; None for no limit.
        advance: called after each of the 1 + `TIMED_STEPS` steps.
    """
    began = time.perf_counter()
    seconds: list[float] = []
    # Random data, so that no text or download is needed; speed does not depend on the ids.
    sequence_len = config.windows * model.context_len
    trainer = make(RandomSource(sequence_len=sequence_len, batch_size=config.batch_size, alphabet=alphabet))
    for _ in range(1 + TIMED_STEPS):
        seconds.append(time_call(lambda: trainer.train_step(config.lr)))
        advance()
        if limit is not None and time.perf_counter() - began > limit:
            break
    # Without the warm-up step, unless it was the only one. The median ignores a moment of another program.
    step = statistics.median(seconds[1:] or seconds)
    if isinstance(trainer, RankZeroTrainer) and config.sync_every:
        # An outer step comes after `sync_every` local ones, so each carries its part.
        step += time_call(trainer.outer_step_on_all_ranks) / config.sync_every
    return step, time_epoch_end(trainer, parent, warm_up=limit is None)


@dataclass(frozen=True, kw_only=True)
class Forecaster:
    """Converts measured times into a forecast of one run.

    Args:
        schedule: returns the run's current schedule.
        chars_per_step: characters in a step.
        train_chars: length of the text that is trained on; None for a stream of unknown length.
        val_batches: validation batches per epoch.
        disk: bytes of the run's folder.
        network: bytes to download for the characters that are left.
        began: start of the command, on the clock of `time.perf_counter`.
        seconds: seconds of this start with a budget of minutes; None where steps decide.
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
        """Return the forecast at `step`, `elapsed` seconds after the start of the command (None: now)."""
        schedule = self.schedule()
        pace = Pace(
            seconds_per_step=seconds_per_step,
            seconds_per_val_batch=end.seconds_per_val_batch,
            seconds_per_epoch_end=end.seconds,
        )
        # Import, text and benchmark have taken time too, which a budget of minutes includes.
        elapsed = time.perf_counter() - self.began if elapsed is None else elapsed
        ends = elapsed + seconds_to_finish(schedule, pace, step=step, val_batches=self.val_batches)
        if self.seconds is not None:
            # The pacer fits the schedule to the minutes; a run can exceed them by a step and one end of an epoch.
            ends = max(self.seconds, min(ends, elapsed + seconds_per_step + end.seconds))
        chars = schedule.total_steps * self.chars_per_step
        return Forecast(
            chars=chars,
            passes=chars / self.train_chars if self.train_chars else None,
            seconds=ends,
            elapsed=elapsed,
            memory=peak_memory(),  # reached in the first steps: later ones reuse the same buffers
            disk=self.disk,
            network=self.network,
        )


class ForecastingObserver:
    """An observer that times a run's first steps, prints the forecast, and passes all events on to `shown`.

    Args:
        shown: the observer that displays the run.
        tell: prints a line.
        forecaster: forecaster of the run.
        time_end: times an end of an epoch.
    """

    def __init__(self, shown: Observer, tell: Notify, forecaster: Forecaster, time_end: Callable[[], EpochEnd]) -> None:
        self._shown, self._tell, self._forecaster, self._time_end = shown, tell, forecaster, time_end
        self._last = time.perf_counter()
        self._seconds: list[float] = []
        self._step = 0
        self._forecast: Forecast | None = None

    def on_step(self, report: StepReport) -> None:
        """Record the step's time; print the forecast once `TIMED_STEPS` are timed."""
        self._seconds.append(time.perf_counter() - self._last)
        self._step = report.step
        self._shown.on_step(report)
        # More than, as the first step is the warm-up.
        if len(self._seconds) > TIMED_STEPS:
            self._report_forecast()
        self._last = time.perf_counter()  # time of displaying and forecasting is not a step's

    def on_epoch(self, trainer: Trainer) -> None:
        """Print the forecast now if the epoch ended before `TIMED_STEPS` were timed."""
        self._report_forecast()
        self._shown.on_epoch(trainer)
        self._last = time.perf_counter()

    def _report_forecast(self) -> None:
        # Once per start; a run that is resumed at an epoch's end has no step to time yet.
        if self._forecast is not None or not self._seconds:
            return
        end = self._time_end()
        step = statistics.median(self._seconds[1:] or self._seconds)
        self._forecast = self._forecaster.forecast(step, end, step=self._step)
        self._tell(str(self._forecast))

    def report_outcome(self) -> None:
        """Print the run's time and memory next to the forecast."""
        if self._forecast is None:
            return
        # Next to each other, so that a user can judge how far to trust the next forecast.
        took, forecast = format_seconds(time.perf_counter() - self._forecaster.began), self._forecast
        self._tell(
            f"took {took} from start to end, forecast {format_seconds(forecast.seconds)}; peak memory "
            f"{format_bytes(peak_memory())}, forecast {format_bytes(forecast.memory)}"
        )
