"""What a run will take: arithmetic on a measured pace, no clock of its own."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from picogpt.config import Pace, Schedule

__all__ = ["Forecast", "format_bytes", "format_passes", "format_seconds", "seconds_to_finish"]


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


def format_passes(passes: float) -> str:
    """So many passes over the text, with a digit after the point below 10."""
    number = f"{passes:,.0f}" if passes >= 9.95 else f"{passes:.1f}" if passes >= 0.095 else f"{passes:.2g}"
    return f"{number} pass{'' if number == '1' else 'es'} over the text"


def format_bytes(number: int) -> str:
    """In megabytes, or gigabytes from one on."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds, with days before them where there are any."""
    return str(timedelta(seconds=round(seconds)))
