"""Pacing of a run with a budget of minutes: its `Schedule` is refitted to the measured speed every few steps.

A new schedule changes the number of remaining steps only: the learning rate continues from its current value and reaches its
floor exactly at the new end. The schedule is part of the checkpoint, so a resumed run takes the same steps as an uninterrupted
run with the same schedules.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

from picogpt.config import TrainConfig
from picogpt.schedule import (
    EPOCHS_OF_A_BUDGET,
    MIN_STEPS_PER_EPOCH,
    SHARE_OF_EPOCH_ENDS,
    Pace,
    Schedule,
    decay_progress,
    lr_at_step,
    warmup_steps_of,
)

__all__ = ["Pacer", "reschedule", "steps_within"]

# A suspended process is noticed by a gap that is both long and much longer than all gaps before.
PAUSE = 60.0
"""Shortest gap in seconds between two events that counts as a suspended process (Ctrl-Z, a lid closed)."""
PAUSE_RATIO = 10.0
"""Such a gap is also at least this many times longer than any gap before it."""
TOLERANCE = 0.02
"""A new schedule that changes the number of remaining steps by no more than this fraction is not adopted."""
COOL_DOWN = 0.05
"""Fraction of the budget that a learning rate still at its peak gets to decay after the time is up."""
NEWEST = 2 / 3
"""Weight of the newest measurement in the running mean of a step's seconds."""
MAX_SLOWDOWN = 3.0
"""A measurement counts at most this many times the running mean: the rest is a wait, for example for the network."""


def decay_at(schedule: Schedule, step: int, total: int, config: TrainConfig) -> tuple[int, float]:
    """Return the progress of the decay after `step` steps of `schedule`, for a run that now has `total` steps.

    Returns:
        `decay_start` and `decay_done` of the new schedule, with which the learning rate has no jump. A warm-up continues as it
        was, unless it would take half of the remaining steps: then it ends here.
    """
    warmup = schedule.decay_start
    if warmup is None:
        warmup = warmup_steps_of(schedule.total_steps, config)
    if step >= warmup:
        # In the decay: progress so far, linear in steps within the old schedule.
        done = schedule.decay_done
        return step, done + (1 - done) * (step - warmup) / max(1, schedule.total_steps - warmup)
    # Still warming up, with enough steps left: nothing has been decayed.
    if total - step > 2 * (warmup - step):
        return warmup, 0.0
    # The warm-up ends here: find the progress at which the decay has the rate that the warm-up has reached.
    height = (config.lr * (step + 1) / (warmup + 1) - config.min_lr) / max(config.lr - config.min_lr, 1e-30)
    return step, decay_progress(min(1.0, max(0.0, height)), config.decay)


def reschedule(schedule: Schedule, step: int, total: int, config: TrainConfig, steps_per_epoch: int | None = None) -> Schedule:
    """Return the schedule from `step` on, for a run of `total` steps.

    Args:
        schedule: the schedule so far.
        step: steps taken.
        total: steps of the whole run, at least `step`.
        config: peak, floor and shape of the learning rate.
        steps_per_epoch: length of the epochs from here on, at the end of an epoch; None keeps the epochs.
    """
    # A decay with a fixed end does not depend on the number of steps.
    if config.decay_steps is None:
        start, done = decay_at(schedule, step, total, config)
        schedule = replace(schedule, decay_start=start, decay_done=done)
    if steps_per_epoch is not None:
        schedule = replace(schedule, steps_per_epoch=steps_per_epoch, epoch_start=step)
    return replace(schedule, total_steps=total)


def steps_within(seconds: float, step_seconds: float, end_seconds: float, to_end: int, steps_per_epoch: int) -> int:
    """Return the number of steps that best fills `seconds`, including the ends of their epochs.

    A last epoch of fewer than `MIN_STEPS_PER_EPOCH` steps is left out, except for the current epoch.

    Args:
        seconds: time left.
        step_seconds: seconds of a step.
        end_seconds: seconds of an end of an epoch.
        to_end: steps to the end of the current epoch, at least 1.
        steps_per_epoch: steps from one end to the next.
    """
    first = to_end * step_seconds + end_seconds
    # Not even the current epoch fits: it ends early, with the run.
    if seconds < first:
        return max(0, min(to_end, round((seconds - end_seconds) / step_seconds)))
    # Whole epochs after the current one, and a shorter last one from what is left over.
    epochs, rest = divmod(seconds - first, steps_per_epoch * step_seconds + end_seconds)
    last = min(steps_per_epoch, round((rest - end_seconds) / step_seconds))
    return to_end + int(epochs) * steps_per_epoch + (last if last >= MIN_STEPS_PER_EPOCH else 0)


class Pacer:
    """Keeps a run to its budget of minutes. The trainer reports each event and gets the schedule to continue with.

    Time in which the process is suspended (Ctrl-Z, a lid closed) is not counted; waiting for the network is.

    Args:
        seconds: the budget, over all starts of the run.
        config: peak, floor and shape of the learning rate.
        pace: earlier measurements, and the seconds of the budget that have passed.
        validation: seconds of an epoch's validation.
        fixed_epochs: keep the number of steps per epoch, which was requested.
        clock: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        seconds: float,
        config: TrainConfig,
        pace: Pace,
        *,
        validation: float,
        fixed_epochs: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.seconds, self._config, self._fixed_epochs, self._clock = seconds, config, fixed_epochs, clock
        self._step_seconds, self._tail, self._validation = pace.seconds_per_step, pace.seconds_per_epoch_end, validation
        self._heard, self._longest, self._spent = clock(), 0.0, pace.seconds_spent
        self._planned = self._since = self._last_step = self._spent
        # Timed steps since `_since`; the first step of a start allocates buffers and is not timed.
        self._steps = -1

    @property
    def seconds_per_epoch_end(self) -> float:
        """Seconds of one end of an epoch, including validation."""
        return self._validation + self._tail

    def state(self) -> dict[str, float]:
        """Return the measurements that a resumed run continues with, and the seconds of the budget that have passed."""
        return {
            "seconds_spent": self.spent(),
            "seconds_per_step": self._step_seconds,
            "seconds_of_validation": self._validation,
            "seconds_per_epoch_end": self._tail,
        }

    def spent(self) -> float:
        """Return the seconds of the budget that have passed, without those in which the process was suspended."""
        # The clock goes on while a laptop sleeps. A gap far above all others is such a pause and counts as one step.
        now = self._clock()
        gap, self._heard = now - self._heard, now
        if self._longest and gap > max(PAUSE, PAUSE_RATIO * self._longest):
            gap = self._step_seconds
        self._longest = max(self._longest, gap)
        self._spent += gap
        return self._spent

    def with_clock(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """Wrap `stop` so that polling it updates the clock, also while waiting for data: a wait is then no pause."""

        def stop_with_clock() -> bool:
            self.spent()
            return stop()

        return stop_with_clock

    def after_step(self, schedule: Schedule, step: int) -> Schedule:
        """Return the schedule after a step; it is refitted 20 times a run, and more often towards its end."""
        now = self._last_step = self.spent()
        self._steps += 1
        # The first step of a start: timing begins after it.
        if self._steps == 0:
            self._since = now
        # Half of the remaining time, between a second and a twentieth of the budget.
        interval = min(self.seconds / EPOCHS_OF_A_BUDGET, max(1.0, (self.seconds - now) / 2))
        if self._steps <= 0 or now - self._planned < interval:
            return schedule
        self._measure(now)
        return self._fit(schedule, step, self.seconds - now, at_end=False)

    def after_validation(self, schedule: Schedule, step: int) -> Schedule:
        """Return the schedule after an epoch's validation, before the epoch is saved."""
        now = self.spent()
        self._validation = now - self._last_step
        self._measure(self._last_step)  # steps end where validation begins
        self._planned = self._last_step = now
        return self._fit(schedule, step, self.seconds - now - self._tail, at_end=True)

    def after_epoch(self, schedule: Schedule, step: int) -> Schedule:
        """Return the schedule after the epoch has been saved and displayed, whose time is measured here."""
        now = self.spent()
        self._tail = now - self._last_step
        self._planned = self._since = now
        self._steps = max(0, self._steps)
        return self._fit(schedule, step, self.seconds - now, at_end=True)

    def _measure(self, now: float) -> None:
        """Update the running mean of a step's seconds."""
        if self._steps > 0:
            newest = min((now - self._since) / self._steps, MAX_SLOWDOWN * self._step_seconds)
            # m <- m + w (newest - m)
            self._step_seconds += NEWEST * (newest - self._step_seconds)
        self._since, self._planned, self._steps = now, now, 0

    def _fit(self, schedule: Schedule, step: int, left: float, *, at_end: bool) -> Schedule:
        """Return the schedule fitted to the `left` seconds, or `schedule` if the change is small."""
        if step >= schedule.total_steps:
            return schedule
        # Even when the time is up, the learning rate gets time to decay, in proportion to its height.
        left = max(left, COOL_DOWN * self.seconds * self._height(schedule, step))
        end = self.seconds_per_epoch_end
        steps_per_epoch = None
        if at_end and not self._fixed_epochs:
            # At an epoch's end the length of the epochs is free: as many as planned for this share of the budget, as their ends
            # may cost, and as steps allow.
            most = int(left / self._step_seconds)
            planned = round(EPOCHS_OF_A_BUDGET * left / self.seconds)
            n_epochs = max(1, min(planned, int(SHARE_OF_EPOCH_ENDS * left / end), most // MIN_STEPS_PER_EPOCH))
            steps = max(0, round((left - n_epochs * end) / self._step_seconds))
            steps_per_epoch = max(MIN_STEPS_PER_EPOCH, math.ceil(steps / n_epochs))
        else:
            # Inside an epoch its length is fixed; only the number of steps changes.
            to_end = schedule.steps_per_epoch - (step - schedule.epoch_start) % schedule.steps_per_epoch
            steps = steps_within(left, self._step_seconds, end, to_end, schedule.steps_per_epoch)
        planned = schedule.total_steps - step
        # Small changes are noise of the measurement, and each new schedule changes the learning rate's slope.
        if abs(steps - planned) <= TOLERANCE * planned:
            return schedule
        return reschedule(schedule, step, step + steps, self._config, steps_per_epoch)

    def _height(self, schedule: Schedule, step: int) -> float:
        """Return the next learning rate above the floor as a fraction of the peak; 0 if decay does not end with the run."""
        config = self._config
        if config.decay_steps is not None:
            return 0.0
        return (lr_at_step(step, schedule, config) - config.min_lr) / config.lr
