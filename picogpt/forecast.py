"""What a run will take: arithmetic on a measured pace, no clock of its own."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from picogpt.config import Pace, Schedule

__all__ = ["Forecast", "format_bytes", "format_seconds", "seconds_to_finish"]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run takes from this start to its end."""

    chars: int
    """Characters of the whole run, those of earlier starts included."""
    seconds: float
    """On the clock, from the first step of this start to the end: steps, validation, saving, samples and pictures."""
    memory: int
    """Peak memory of the process in bytes."""
    disk: int
    """Bytes of the run's folder: two checkpoints, the model, the log and its picture."""
    network: int
    """Bytes to fetch; 0 where the text is on this machine."""

    def __str__(self) -> str:
        network = f"about {format_bytes(self.network)}" if self.network else "none"
        return (
            f"forecast: {self.chars:,} characters in all, {format_seconds(self.seconds)} to finish; peak memory "
            f"{format_bytes(self.memory)}, disk {format_bytes(self.disk)}, network {network}"
        )


def seconds_to_finish(schedule: Schedule, pace: Pace, *, step: int, val_batches: int) -> float:
    """Seconds from `step` steps taken to the end of `schedule`, with `val_batches` validation batches an epoch."""
    steps = max(0, schedule.total_steps - step)
    # Epochs end where the number of steps is a multiple; the last one may be shorter.
    epochs = -(-schedule.total_steps // schedule.steps_per_epoch) - step // schedule.steps_per_epoch if steps else 0
    per_epoch = val_batches * pace.seconds_per_val_batch + pace.seconds_per_epoch_end
    return steps * pace.seconds_per_step + epochs * per_epoch


def format_bytes(number: int) -> str:
    """In megabytes, or gigabytes from one on."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds, with days before them where there are any."""
    return str(timedelta(seconds=round(seconds)))
