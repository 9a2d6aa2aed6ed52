"""A run that ends by the clock: plans by hand, whole runs on a clock of their own, and a resume that takes the same steps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from picogpt.config import TrainConfig
from picogpt.runs.folder import RunFolder
from picogpt.schedule import Budget, Pace, Schedule, lr_at_step
from picogpt.training.pacing import Pacer, reschedule, steps_within
from picogpt.training.trainer import Trainer
from picogpt.uptime import process_seconds
from tests.conftest import TINY, Watcher, tiny_source

CONFIG = TrainConfig(batch_size=2, windows=3, lr=1e-2, warmup_steps=10)
PLAN = Schedule(total_steps=1000, steps_per_epoch=50, val_steps=2)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (2.0, 0),  # less than an end of an epoch
        (3.0 + 7, 7),
        (3.0 + 10, 10),  # the epoch that has begun
        (3.0 + 10 + 3 + 3, 10),  # three steps more are no epoch
        (3.0 + 10 + 3 + 4, 14),
        (3.0 + 10 + 23, 30),
        (3.0 + 10 + 23 + 23 + 2, 50),
        (3.0 + 10 + 23 + 23 + 3 + 19, 69),
    ],
)
def test_steps_within(seconds: float, expected: int) -> None:
    """Steps of 1 s, ends of 3 s, 10 steps to the next end and 20 between later ones."""
    assert steps_within(seconds, 1.0, 3.0, 10, 20) == expected


@pytest.mark.parametrize("total", [150, 400, 600, 1000, 5000])
@pytest.mark.parametrize("step", [1, 5, 10, 50, 100, 120])
@pytest.mark.parametrize(
    "config", [CONFIG, TrainConfig(lr=1e-2, min_lr=1e-3, decay="cosine", warmup_steps=10)], ids=["linear", "cosine"]
)
def test_learning_rate_has_no_jump(config: TrainConfig, step: int, total: int) -> None:
    """Where a plan changes the rate is the old plan's, and it comes down to its floor at the new end."""
    plan = reschedule(PLAN, step, total, config)
    rates = [lr_at_step(k, plan, config) for k in range(step, total + 1)]

    assert rates[0] == pytest.approx(lr_at_step(step, PLAN, config), rel=1e-9)
    assert rates[-1] == config.min_lr
    assert rates[-2] - config.min_lr < 3 * config.lr / (total - step) + 1e-12
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_warm_up_is_cut_short() -> None:
    """Where hardly any steps are left the rate comes down from where the warm-up is."""
    plan = reschedule(PLAN, 5, 10, CONFIG)

    assert [lr_at_step(k, plan, CONFIG) for k in range(5, 11)] == pytest.approx(
        [0.06 / 11 * (5 - i) / 5 for i in range(6)], rel=1e-9
    )


def test_same_plan_changes_no_rate() -> None:
    """A plan of the same length is the same line, and recipe seed's decay does not depend on it."""
    plan = reschedule(PLAN, 300, 1000, CONFIG)
    seed = TrainConfig.from_recipe("seed", {})

    assert [lr_at_step(k, plan, CONFIG) for k in range(300, 1000)] == pytest.approx(
        [lr_at_step(k, PLAN, CONFIG) for k in range(300, 1000)]
    )
    assert [lr_at_step(k, reschedule(PLAN, 300, 500, seed), seed) for k in range(300, 500)] == [
        lr_at_step(k, PLAN, seed) for k in range(300, 500)
    ]


class Machine:
    """A machine whose steps take as long as it is told, on a clock of its own."""

    def __init__(self, step: Callable[[float], float], end: float = 1.0) -> None:
        self.now, self._step, self._end = 0.0, step, end

    def run(
        self, minutes: float, budget: Budget, measured: float, *, begun: float = 0.0, longest: float = 1e9
    ) -> tuple[Schedule, Pacer]:
        """Train by the clock from `begun` seconds on, with `measured` seconds a step; return the last plan."""
        pace = Pace(seconds_per_step=measured, seconds_per_val_batch=0.0, seconds_per_epoch_end=self._end, seconds_spent=begun)
        plan = budget.schedule(chars_per_step=48, pace=pace)
        self.now = begun
        fixed = budget.steps_per_epoch is not None
        pacer = Pacer(minutes * 60, CONFIG, pace, validation=0.0, fixed_epochs=fixed, clock=lambda: self.now)
        self.epochs, step = 0, 0
        self.times: list[float] = []
        while step < plan.total_steps and self.now < longest:
            end = self.now + self._step(self.now)
            while self.now < end:  # what waits asks now and then whether to stop
                self.now = min(end, self.now + 20)
                pacer.spent()
            step += 1
            self.times.append(self.now)
            plan = pacer.after_step(plan, step)
            if plan.ends_epoch(step):
                self.now += self._end / 2
                plan = pacer.after_validation(plan, step)
                self.now += self._end / 2
                plan = pacer.after_epoch(plan, step)
                self.epochs += 1
        return plan, pacer


@pytest.mark.parametrize(
    "step",
    [
        lambda now: 0.5,
        lambda now: 0.25,  # twice as fast as was measured
        lambda now: 2.0,  # a quarter of the speed
        lambda now: 0.5 if now < 120 else 1.5,
        lambda now: 1.5 if now < 120 else 0.3,
        lambda now: 0.5 if now < 270 else 1.5,  # another program begins in the last tenth
        lambda now: 0.5 if int(now / 7) % 2 else 1.1,
    ],
    ids=["as measured", "faster", "slower", "slower later", "faster later", "slower at the end", "changing"],
)
@pytest.mark.parametrize("budget", [Budget(minutes=5), Budget(minutes=5, steps_per_epoch=40)], ids=["20 epochs", "40 steps"])
def test_ends_by_the_clock(step: Callable[[float], float], budget: Budget) -> None:
    """Five minutes with 20 s of them gone before the first step end within a tenth, whatever the speed turns out to be."""
    machine = Machine(step)
    machine.run(5, budget, 0.5, begun=20.0)

    assert 270 <= machine.now <= 330
    assert machine.epochs <= 40
    if budget.steps_per_epoch is None:
        assert 14 <= machine.epochs <= 24


@pytest.mark.parametrize(("step", "end"), [(20.0, 5.0), (9.0, 0.5), (100.0, 1.0)])
def test_very_slow_machine(step: float, end: float) -> None:
    """Where timing takes most of a minute the run has as many steps as fit, or the one that it must have."""
    machine = Machine(lambda now: step, end)
    plan, _ = machine.run(1, Budget(minutes=1), step, begun=2 * step)

    assert plan.total_steps == max(1, round((60 - 2 * step - end) / step))
    assert machine.now <= max(66, 3 * step + end)


def test_time_is_up_before_the_rate_is_down() -> None:
    """After a wait that outlasts the budget the rate still comes down, within a twentieth of the budget."""
    machine = Machine(lambda now: 300.0 if 100 <= now < 101 else 0.5)
    machine.run(5, Budget(minutes=5), 0.5)

    assert 400 < machine.now <= 415
    assert sum(now > 401 for now in machine.times) >= 5


def test_kept_minutes_of_recipe_seed() -> None:
    """A decay that does not end with the run is no reason to train longer."""
    pacer = Pacer(
        60, TrainConfig.from_recipe("seed", {}), Pace(seconds_per_step=1, seconds_per_val_batch=0, seconds_per_epoch_end=1, seconds_spent=59),
        validation=0.0, clock=iter([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]).__next__,
    )  # fmt: skip
    plan = pacer.after_step(PLAN, 1)

    assert pacer.after_step(plan, 2).total_steps == 2


def test_pause_is_not_counted() -> None:
    """An hour in which the process is stopped changes nothing; one in which it is asked whether to stop is waiting, and counts."""
    now = 0.0
    pace = Pace(seconds_per_step=0.5, seconds_per_val_batch=0, seconds_per_epoch_end=1)
    pacer = Pacer(300, CONFIG, pace, validation=0.0, clock=lambda: now)
    for step in range(1, 5):
        now += 0.5
        pacer.after_step(PLAN, step)
    now += 3600.0
    pacer.after_step(PLAN, 5)
    paused = pacer.spent()
    stop = pacer.with_clock(lambda: False)
    for _ in range(60):
        now += 1.0
        assert not stop()

    assert paused == pytest.approx(2.5)
    assert pacer.spent() == pytest.approx(62.5)


class Scripted(Pacer):
    """Decides by the step alone, so that two runs decide the same."""

    def __init__(self) -> None:
        pace = Pace(seconds_per_step=1, seconds_per_val_batch=0, seconds_per_epoch_end=1)
        super().__init__(60, CONFIG, pace, validation=0.0)

    def after_step(self, schedule: Schedule, step: int) -> Schedule:
        return reschedule(schedule, step, {3: 20, 7: 9}.get(step, schedule.total_steps), CONFIG)

    def after_epoch(self, schedule: Schedule, step: int) -> Schedule:
        return schedule

    def after_validation(self, schedule: Schedule, step: int) -> Schedule:
        return reschedule(schedule, step, 14, CONFIG, 3) if step == 5 else schedule


class Late(Scripted):
    """Finds that the time is up when the first epoch has been shown."""

    def after_epoch(self, schedule: Schedule, step: int) -> Schedule:
        return reschedule(schedule, step, step, CONFIG)


def make_trainer(pacer: type[Scripted] = Scripted) -> Trainer:
    """A trainer whose plan is changed by a script."""
    trainer = Trainer(TINY, CONFIG, tiny_source(CONFIG), torch.float32)
    trainer.pacer = pacer()
    return trainer


def test_run_that_is_over_is_saved_as_such(tmp_path: Path) -> None:
    """Where showing an epoch takes up the time that was left, the checkpoint has no further steps planned."""
    run, trainer = RunFolder(tmp_path), make_trainer(Late)

    assert trainer.fit(run, Schedule(total_steps=12, steps_per_epoch=5, val_steps=2), Watcher(), lambda: False)
    assert trainer.step == 5
    assert run.load_checkpoint()[0].state["plan"]["schedule"]["total_steps"] == 5


@pytest.mark.parametrize("stop_after", [1, 3, 4, 5, 6, 7, 8])
def test_resumed_run_is_bit_identical(tmp_path: Path, stop_after: int) -> None:
    """Stopped after any step and resumed with the plan of its checkpoint, a run ends with the bytes of one with the same plans."""
    run = RunFolder(tmp_path)
    first_plan = Schedule(total_steps=12, steps_per_epoch=5, val_steps=2)
    straight = make_trainer()
    assert straight.fit(run, first_plan, Watcher(), lambda: False)
    first, watcher = make_trainer(), Watcher(stop_after)
    assert not first.fit(run, first_plan, watcher, watcher.stop)
    second = make_trainer()
    second.restore(run.load_checkpoint()[0])
    assert second.stored_schedule is not None
    plan = Schedule(**second.stored_schedule["schedule"])
    assert second.fit(run, plan, Watcher(), lambda: False)

    assert straight.step == second.step == 9
    assert straight.schedule == second.schedule
    assert {n: a.tobytes() for n, a in straight.model.arrays().items()} == {
        n: a.tobytes() for n, a in second.model.arrays().items()
    }
    assert (straight.log.train, straight.log.val) == (second.log.train, second.log.val)


def test_process_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process knows when it was started, or says 0; one that claims to be older than the system's clock is not believed."""
    stat = tmp_path / "stat"
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    monkeypatch.setattr(time, "clock_gettime", lambda _: now)
    ticks = int((now - 5) * os.sysconf("SC_CLK_TCK"))
    stat.write_text(f"7 (a (b) c) S {'0 ' * 18}{ticks} 0")
    assert process_seconds(stat) == pytest.approx(5, abs=0.5)

    for text in ("", "7 (a) S 1 2", f"7 (a) S {'0 ' * 18}{ticks * 9} 0", f"7 (a) S {'0 ' * 18}x 0"):
        stat.write_text(text)
        assert process_seconds(stat) == 0
    assert process_seconds(tmp_path / "none") == 0
