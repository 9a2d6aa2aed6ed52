"""How a training run is shown: a bar on a terminal, a line now and then elsewhere, a line and a sample every epoch."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator

from picogpt.cli.bar import ProgressBar
from picogpt.cli.common import notice
from picogpt.cli.screen import above_bar
from picogpt.runs.folder import LossLog
from picogpt.schedule import Schedule
from picogpt.training.forecast import TIMED_STEPS
from picogpt.training.trainer import StepReport, Trainer
from picogpt.wording import format_passes, format_seconds, plural

__all__ = ["TrainingDisplay", "divergence", "timing_bar"]

WORSE_THAN_GUESS = 0.5
"""Nats above a uniform guess from which on a run has diverged: one that has just begun can be a little above."""
WORSE_THAN_BEFORE = 1.0
"""Nats above the lowest training loss from which on it has."""

_SMOOTHING = 0.9
"""Weight of the past in the loss that is shown: about the last ten steps."""


class TrainingDisplay:
    """Watches a run (`picogpt.training.trainer.Observer`): progress on stderr, results on stdout.

    Args:
        trainer: what is watched, for where it starts from.
        schedule: the run's length.
    """

    def __init__(self, trainer: Trainer, schedule: Schedule) -> None:
        self._first_schedule, self._trainer = schedule, trainer
        self._warned = False
        self._loss: float | None = None
        self._stdout_alive = True
        self._first_step = trainer.step
        total, done = schedule.total_steps * trainer.chars_per_step, trainer.step * trainer.chars_per_step
        self._bar = ProgressBar(total, "char", done=done, describe=self._line)

    @property
    def _schedule(self) -> Schedule:
        """The run's length, as planned now."""
        return self._trainer.schedule or self._first_schedule

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def on_step(self, report: StepReport) -> None:
        """Move the bar, or say a line if it is time."""
        self._loss = report.loss if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * report.loss
        self._bar.advance(report.chars, f"loss {self._loss:.3f}", total=self._schedule.total_steps * report.chars)

    def _line(self, _done: int, seconds: float) -> str:
        step, total = self._trainer.step, self._schedule.total_steps
        seconds_per_step = seconds / max(1, step - self._first_step)
        left = format_seconds(seconds_per_step * (total - step))
        return (
            f"step {step:,} of {total:,}: loss {self._loss:.3f}, "
            f"{self._trainer.chars_per_step / seconds_per_step:,.0f} characters/s, {left} left"
        )

    def on_epoch(self, trainer: Trainer) -> None:
        """Print the epoch and a sample of text."""
        log = trainer.log
        best = " (best so far)" if log.val[-1] == log.best_loss else ""
        n_epochs = len(log.val) + self._schedule.epochs_left(trainer.step)
        # An epoch is the time between two validations; how often the text was passed over is another number.
        train_chars = trainer.source.train_chars
        passes = f", {format_passes(trainer.step * trainer.chars_per_step / train_chars)}" if train_chars else ""
        self._say(
            f"epoch {len(log.val)} of {n_epochs}{passes}: train {log.train[-1]:.4f}, val {log.val[-1]:.4f} nats per "
            f"character{best}; {plural(log.chars[-1], 'character')} in {format_seconds(log.seconds[-1])}"
        )
        if not self._warned and (warning := divergence(log, trainer.model.config.vocab_size)):
            self._warned = True
            notice(warning)
        self._say("\n".join(f"    {line}" for line in trainer.history.epochs[-1].sample.splitlines()))

    def _say(self, text: str) -> None:
        """Print a result; once stdout is closed, print no more and keep training."""
        if not self._stdout_alive:
            return
        try:
            with above_bar():
                print(text)
                sys.stdout.flush()
        except (OSError, ValueError, AttributeError):
            self._stdout_alive = False
            notice("standard output is closed; training continues without it")


@contextlib.contextmanager
def timing_bar() -> Iterator[Callable[[], None]]:
    """Show the progress of the benchmark before a run; yield a function to call after each timed step."""
    notice("timing a few steps")
    describe = lambda steps, seconds: f"timed {plural(steps, 'step')} in {format_seconds(seconds)}"  # noqa: E731
    # One step more than are timed: the first allocates buffers.
    with ProgressBar(1 + TIMED_STEPS, " steps", label="timing", leave=False, describe=describe) as bar:
        yield lambda: bar.advance(1)


def divergence(log: LossLog, vocab_size: int) -> str | None:
    """A line on a run that has diverged by the last epoch of its log; None where it has not.

    Such a run is worse than a guess that gives each token the same probability, or its training loss, which does not rise when a
    text is learned by heart, is far above what it was.
    """
    guess = math.log(vocab_size)
    if log.val[-1] > guess + WORSE_THAN_GUESS:
        found = f"the validation loss is {log.val[-1]:.2f} nats, and guessing comes to {guess:.2f}"
    elif log.train[-1] > min(log.train) + WORSE_THAN_BEFORE:
        found = f"the training loss is {log.train[-1]:.2f} nats, and was {min(log.train):.2f}"
    else:
        return None
    return f"warning: the run has diverged: {found}; stop it, and start over with --fresh and a smaller --lr and --muon-lr"
