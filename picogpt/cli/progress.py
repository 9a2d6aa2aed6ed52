"""How a training run is shown: a bar on a terminal, a line now and then elsewhere, a line and a sample every epoch."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

from picogpt.cli.bar import ProgressBar
from picogpt.cli.common import notice
from picogpt.cli.screen import above_bar
from picogpt.config import Schedule
from picogpt.forecast import format_passes, format_seconds
from picogpt.run import LossLog
from picogpt.train import StepReport, Trainer
from picogpt.wording import plural

__all__ = ["TrainingDisplay", "divergence"]

LINE_INTERVAL = 30.0
"""Seconds between progress lines where stderr is no terminal."""

WORSE_THAN_GUESS = 0.5
"""Nats above a uniform guess from which on a run has diverged: one that has just begun can be a little above."""
WORSE_THAN_BEFORE = 1.0
"""Nats above the lowest training loss from which on it has."""

_SMOOTHING = 0.9
"""Weight of the past in the loss that is shown: about the last ten steps."""


class TrainingDisplay:
    """Watches a run (`picogpt.train.Observer`): progress on stderr, results on stdout.

    Args:
        schedule: the run's length.
        trainer: what is watched, for where it starts from.
        sample: makes a sample of text from the model as it is.
    """

    def __init__(self, schedule: Schedule, trainer: Trainer, sample: Callable[[], str]) -> None:
        self._first_schedule, self._sample, self._trainer = schedule, sample, trainer
        self._warned = False
        self._loss: float | None = None
        self._stdout_alive = True
        self._start = self._last_line = time.perf_counter()
        self._first_step = trainer.step
        total, done = schedule.total_steps * trainer.chars_per_step, trainer.step * trainer.chars_per_step
        self._bar = ProgressBar(total, "char", done=done)

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
        if self._bar.is_shown:
            self._bar.advance(report.chars, f"loss {self._loss:.3f}", total=self._schedule.total_steps * report.chars)
        elif time.perf_counter() - self._last_line >= LINE_INTERVAL:
            self._last_line = time.perf_counter()
            self._progress_line(report)

    def _progress_line(self, report: StepReport) -> None:
        seconds_per_step = (self._last_line - self._start) / max(1, report.step - self._first_step)
        left = format_seconds(seconds_per_step * (self._schedule.total_steps - report.step))
        notice(
            f"step {report.step:,} of {self._schedule.total_steps:,}: loss {self._loss:.3f}, "
            f"{report.chars / seconds_per_step:,.0f} characters/s, {left} left"
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
        self._say("\n".join(f"    {line}" for line in self._sample().splitlines()))

    def _say(self, text: str) -> None:
        """Print a result; once stdout is gone, no more, and training goes on."""
        if not self._stdout_alive:
            return
        try:
            with above_bar():
                print(text)
                sys.stdout.flush()
        except (OSError, ValueError, AttributeError):
            self._stdout_alive = False
            notice("standard output is closed; training goes on without it")


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
