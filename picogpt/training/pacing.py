"""A run that ends by the clock: after every few steps the rest of its plan is fitted to the speed that was measured.

A plan is a `Schedule`. A new one changes how many steps are left, not those that were taken: the learning rate continues from
where it is and comes down to its floor exactly at the new end. Each plan is part of the checkpoint, so a resumed run takes the
very steps that an uninterrupted one with the same plans takes.
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
    lr_at_step,
    warmup_steps_of,
)

__all__ = ["Pacer", "replan", "steps_within"]

PAUSE = 60.0
"""Seconds in which nothing was heard of training, beyond which the process was stopped (Ctrl-Z, a lid closed)."""
PAUSE_RATIO = 10.0
"""How many times as long as any step before it a pause is at least."""
TOLERANCE = 0.02
"""Share of the steps left by which a new plan may differ from the old one, which is then kept."""
COOL_DOWN = 0.05
"""Share of the budget in which a learning rate that is still at its peak comes down, when the time is up before."""
NEWEST = 2 / 3
"""Weight of the newest measurement of a step against those before it."""
MAX_SLOWDOWN = 3.0
"""How many times as long as the steps before a measured one is taken to be at most: the rest is a wait, for the network say."""


def decay_at(schedule: Schedule, step: int, total: int, config: TrainConfig) -> tuple[int, float]:
    """Where the decay stands after `step` steps of `schedule`, if the run is to have `total` steps from now on.

    Returns:
        `decay_start` and `decay_done` of the new plan, with which the learning rate has no jump. A warm-up continues as it was,
        unless it would take half of what is left: then it ends here.
    """
    warmup = schedule.decay_start
    if warmup is None:
        warmup = warmup_steps_of(schedule.total_steps, config)
    if step >= warmup:
        done = schedule.decay_done
        return step, done + (1 - done) * (step - warmup) / max(1, schedule.total_steps - warmup)
    if total - step > 2 * (warmup - step):
        return warmup, 0.0
    height = (config.lr * (step + 1) / (warmup + 1) - config.min_lr) / max(config.lr - config.min_lr, 1e-30)
    height = min(1.0, max(0.0, height))
    return step, 1 - height if config.decay == "linear" else math.acos(2 * height - 1) / math.pi


def replan(schedule: Schedule, step: int, total: int, config: TrainConfig, steps_per_epoch: int | None = None) -> Schedule:
    """The plan from `step` steps on, for a run of `total` steps.

    Args:
        schedule: the plan so far.
        step: steps taken.
        total: steps of the whole run, at least `step`.
        config: how the learning rate falls.
        steps_per_epoch: length of the epochs from here on, which is the end of one; None leaves epochs as they are.
    """
    if config.decay_steps is None:
        start, done = decay_at(schedule, step, total, config)
        schedule = replace(schedule, decay_start=start, decay_done=done)
    if steps_per_epoch is not None:
        schedule = replace(schedule, steps_per_epoch=steps_per_epoch, epoch_start=step)
    return replace(schedule, total_steps=total)


def steps_within(seconds: float, step_seconds: float, end_seconds: float, to_end: int, steps_per_epoch: int) -> int:
    """Steps that come closest to filling `seconds` with the ends of their epochs, the last one's included.

    A last epoch of fewer than `MIN_STEPS_PER_EPOCH` steps is left out, but for the one that has begun.

    Args:
        seconds: time left.
        step_seconds: one step.
        end_seconds: one end of an epoch.
        to_end: steps to the next end of an epoch, at least 1.
        steps_per_epoch: steps from one end to the next.
    """
    first = to_end * step_seconds + end_seconds
    if seconds < first:
        return max(0, min(to_end, round((seconds - end_seconds) / step_seconds)))
    epochs, rest = divmod(seconds - first, steps_per_epoch * step_seconds + end_seconds)
    last = min(steps_per_epoch, round((rest - end_seconds) / step_seconds))
    return to_end + int(epochs) * steps_per_epoch + (last if last >= MIN_STEPS_PER_EPOCH else 0)


class Pacer:
    """Keeps a run to its minutes. The trainer tells it what has happened, and gets the plan to continue with.

    Time in which the process is stopped (Ctrl-Z, a lid closed) is not counted; time in which it waits for the network is.

    Args:
        seconds: the budget, over all starts of the run.
        config: how the learning rate falls.
        pace: what was measured before, and the seconds of the budget that have passed.
        validation: seconds of an epoch's validation.
        fixed_epochs: keep the number of steps an epoch, which was asked for.
        clock: seconds on a clock that does not jump.
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
        self._steps = -1  # timed since `_since`; the first one of a start makes buffers and is not

    @property
    def seconds_per_epoch_end(self) -> float:
        """Seconds of one end of an epoch, validation included."""
        return self._validation + self._tail

    def state(self) -> dict[str, float]:
        """Measurements that a resumed run continues with, and the seconds of the budget that have passed."""
        return {
            "seconds_spent": self.spent(),
            "seconds_per_step": self._step_seconds,
            "seconds_of_validation": self._validation,
            "seconds_per_epoch_end": self._tail,
        }

    def spent(self) -> float:
        """Seconds of the budget that have passed, without those in which the process was stopped."""
        now = self._clock()
        gap, self._heard = now - self._heard, now
        if self._longest and gap > max(PAUSE, PAUSE_RATIO * self._longest):
            gap = self._step_seconds
        self._longest = max(self._longest, gap)
        self._spent += gap
        return self._spent

    def with_clock(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """`stop`, with a look at the clock whenever it is asked, also while data are waited for."""

        def asked() -> bool:
            self.spent()
            return stop()

        return asked

    def after_step(self, schedule: Schedule, step: int) -> Schedule:
        """The plan after a step; it is looked over 20 times a run, and more often towards its end."""
        now = self._last_step = self.spent()
        self._steps += 1
        if self._steps == 0:
            self._since = now
        interval = min(self.seconds / EPOCHS_OF_A_BUDGET, max(1.0, (self.seconds - now) / 2))
        if self._steps <= 0 or now - self._planned < interval:
            return schedule
        self._measure(now)
        return self._fit(schedule, step, self.seconds - now, at_end=False)

    def after_validation(self, schedule: Schedule, step: int) -> Schedule:
        """The plan at the end of an epoch, before it is saved."""
        now = self.spent()
        self._validation = now - self._last_step
        self._measure(self._last_step)
        self._planned = self._last_step = now
        return self._fit(schedule, step, self.seconds - now - self._tail, at_end=True)

    def after_epoch(self, schedule: Schedule, step: int) -> Schedule:
        """The plan after the epoch has been saved and shown, which can have taken longer than was foreseen."""
        now = self.spent()
        self._tail = now - self._last_step
        self._planned = self._since = now
        self._steps = max(0, self._steps)
        return self._fit(schedule, step, self.seconds - now, at_end=True)

    def _measure(self, now: float) -> None:
        """Bring the seconds of a step up to date."""
        if self._steps > 0:
            newest = min((now - self._since) / self._steps, MAX_SLOWDOWN * self._step_seconds)
            self._step_seconds += NEWEST * (newest - self._step_seconds)
        self._since, self._planned, self._steps = now, now, 0

    def _fit(self, schedule: Schedule, step: int, left: float, *, at_end: bool) -> Schedule:
        """Fit the plan to the `left` seconds."""
        if step >= schedule.total_steps:
            return schedule
        left = max(left, COOL_DOWN * self.seconds * self._height(schedule, step))
        end = self.seconds_per_epoch_end
        steps_per_epoch = None
        if at_end and not self._fixed_epochs:
            most = int(left / self._step_seconds)
            planned = round(EPOCHS_OF_A_BUDGET * left / self.seconds)
            n_epochs = max(1, min(planned, int(SHARE_OF_EPOCH_ENDS * left / end), most // MIN_STEPS_PER_EPOCH))
            steps = max(0, round((left - n_epochs * end) / self._step_seconds))
            steps_per_epoch = max(MIN_STEPS_PER_EPOCH, math.ceil(steps / n_epochs))
        else:
            to_end = schedule.steps_per_epoch - (step - schedule.epoch_start) % schedule.steps_per_epoch
            steps = steps_within(left, self._step_seconds, end, to_end, schedule.steps_per_epoch)
        planned = schedule.total_steps - step
        if abs(steps - planned) <= TOLERANCE * planned:
            return schedule
        return replan(schedule, step, step + steps, self._config, steps_per_epoch)

    def _height(self, schedule: Schedule, step: int) -> float:
        """What the next step's learning rate is of the highest one; 0 where it does not come down with the run."""
        config = self._config
        if config.decay_steps is not None:
            return 0.0
        return (lr_at_step(step, schedule, config) - config.min_lr) / config.lr
