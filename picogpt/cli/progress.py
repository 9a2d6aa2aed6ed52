"""Display of a training run: a progress bar or lines on stderr, and a line with a sample for each epoch on stdout."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator

from picogpt.cli.bar import ProgressBar
from picogpt.cli.common import notice
from picogpt.cli.screen import above_bar
from picogpt.runs.loss_log import LossLog
from picogpt.schedule import Schedule
from picogpt.training.forecast import TIMED_STEPS
from picogpt.training.trainer import StepReport, Trainer
from picogpt.wording import format_passes, format_seconds, plural

__all__ = ["TrainingDisplay", "divergence", "timing_bar"]

# Thresholds in nats above which a run counts as diverged.
WORSE_THAN_GUESS = 0.5
"""Margin above the loss of a uniform guess; untrained weights are a little above it too."""
WORSE_THAN_BEFORE = 1.0
"""Margin above the lowest training loss so far."""

_SMOOTHING = 0.9  # decay of the displayed running mean of the loss: about the last ten steps


class TrainingDisplay:
    """Observer of a run (`picogpt.training.trainer.Observer`): progress on stderr, results on stdout.

    Args:
        trainer: the trainer, at the step from which the run starts or is resumed.
        schedule: length of the run.
    """

    def __init__(self, trainer: Trainer, schedule: Schedule) -> None:
        self._first_schedule, self._trainer = schedule, trainer
        self._warned = False
        self._loss: float | None = None
        self._stdout_alive = True
        self._first_step = trainer.step  # the speed counts only the steps of this start
        total, done = schedule.total_steps * trainer.chars_per_step, trainer.step * trainer.chars_per_step
        self._bar = ProgressBar(total, "char", done=done, describe=self._line)

    @property
    def _schedule(self) -> Schedule:
        """The current schedule: a run with a budget of minutes is replanned while it trains."""
        return self._trainer.schedule or self._first_schedule

    def close(self) -> None:
        """Close the bar, which stays on the screen."""
        self._bar.close()

    def on_step(self, report: StepReport) -> None:
        """Advance the bar, or print a line if one is due."""
        # The loss of a single step is noisy; the first has nothing to be averaged with.
        self._loss = report.loss if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * report.loss
        self._bar.advance(report.chars, f"loss {self._loss:.3f}", total=self._schedule.total_steps * report.chars)

    def _line(self, _done: int, seconds: float) -> str:
        # Without a step there is no speed yet, but a line is due only after half a minute.
        step, total = self._trainer.step, self._schedule.total_steps
        seconds_per_step = seconds / max(1, step - self._first_step)
        left = format_seconds(seconds_per_step * (total - step))
        return (
            f"step {step:,} of {total:,}: loss {self._loss:.3f}, "
            f"{self._trainer.chars_per_step / seconds_per_step:,.0f} characters/s, {left} left"
        )

    def on_epoch(self, trainer: Trainer) -> None:
        """Print the losses of the epoch and a sample of text."""
        log = trainer.log
        best = " (best so far)" if log.val[-1] == log.best_loss else ""
        n_epochs = len(log.val) + self._schedule.epochs_left(trainer.step)
        # An epoch is a stretch between two validations, so passes over the text are printed separately.
        train_chars = trainer.source.train_chars
        passes = f", {format_passes(trainer.step * trainer.chars_per_step / train_chars)}" if train_chars else ""
        self._say(
            f"epoch {len(log.val)} of {n_epochs}{passes}: train {log.train[-1]:.4f}, val {log.val[-1]:.4f} nats per "
            f"character{best}; {plural(log.chars[-1], 'character')} in {format_seconds(log.seconds[-1])}"
        )
        # Once is enough: a diverged run stays diverged.
        if not self._warned and (warning := divergence(log, trainer.model.config.vocab_size, first=trainer.imported_epochs)):
            self._warned = True
            notice(warning)
        self._say("\n".join(f"    {line}" for line in trainer.history.epochs[-1].sample.splitlines()))

    def _say(self, text: str) -> None:
        """Print a result to stdout; if stdout is closed, print a notice once and continue training."""
        if not self._stdout_alive:
            return
        try:
            with above_bar():
                print(text)
                sys.stdout.flush()  # into a pipe, an epoch should appear when it ends
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


def divergence(log: LossLog, vocab_size: int, *, first: int = 0) -> str | None:
    """Return a warning if the run has diverged by the last epoch of its log, or None.

    A run has diverged if its validation loss is worse than a uniform guess, or if its training loss is far above its minimum.
    Its own epochs begin at index `first`, behind those of an imported run.
    """
    # The validation loss may also rise by overfitting; the training loss does not, so only that is compared to its past.
    guess = math.log(vocab_size)  # nats of a uniform guess
    if log.val[-1] > guess + WORSE_THAN_GUESS:
        found = f"the validation loss is {log.val[-1]:.2f} nats, and guessing comes to {guess:.2f}"
    elif log.train[-1] > (before := min(log.train[first:])) + WORSE_THAN_BEFORE:
        found = f"the training loss is {log.train[-1]:.2f} nats, and was {before:.2f}"
    else:
        return None
    return f"warning: the run has diverged: {found}; stop it, and start over with --fresh and a smaller --lr and --muon-lr"
