"""How a training run is shown: a bar on a terminal, a line now and then elsewhere, a line and a sample every epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from picogpt.cli.bar import ProgressBar
from picogpt.cli.common import notice
from picogpt.cli.screen import above_bar
from picogpt.config import Schedule
from picogpt.files import atomic_write
from picogpt.forecast import format_seconds
from picogpt.plot import draw_losses
from picogpt.run import RunFolder
from picogpt.train import StepReport, Trainer

__all__ = ["TrainingDisplay"]

LINE_INTERVAL = 30.0
"""Seconds between progress lines where stderr is no terminal."""

_SMOOTHING = 0.9
"""Weight of the past in the loss that is shown: about the last ten steps."""


class TrainingDisplay:
    """Watches a run (`picogpt.train.Observer`): progress on stderr, results on stdout, the log and its picture on disk.

    Args:
        run: the run's folder.
        schedule: the run's length.
        trainer: what is watched, for where it starts from.
        sample: makes a sample of text from the model as it is.
    """

    def __init__(self, run: RunFolder, schedule: Schedule, trainer: Trainer, sample: Callable[[], str]) -> None:
        self._run, self._schedule, self._sample = run, schedule, sample
        self._loss: float | None = None
        self._stdout_alive = True
        self._start = self._last_line = time.perf_counter()
        self._first_step = trainer.step
        total, done = schedule.total_steps * trainer.chars_per_step, trainer.step * trainer.chars_per_step
        self._bar = ProgressBar(total, "char", done=done)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def on_step(self, report: StepReport) -> None:
        """Move the bar, or say a line if it is time."""
        self._loss = report.loss if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * report.loss
        if self._bar.is_shown:
            self._bar.advance(report.chars, f"loss {self._loss:.3f}")
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
        """Print the epoch and a sample of text, write the log and draw it."""
        log = trainer.log
        best = " (best so far)" if log.val[-1] == log.best_loss else ""
        left = max(0, self._schedule.total_steps - trainer.step)
        n_epochs = len(log.val) + -(-left // self._schedule.steps_per_epoch)
        self._say(
            f"epoch {len(log.val)} of {n_epochs}: train {log.train[-1]:.4f}, val {log.val[-1]:.4f} nats per character{best}; "
            f"{log.chars[-1]:,} characters in {format_seconds(log.seconds[-1])}"
        )
        self._say("\n".join(f"    {line}" for line in self._sample().splitlines()))
        try:
            self._run.write_log(log)
            atomic_write(self._run.plot_path, draw_losses({self._run.name: log}))
        except OSError as error:
            where = error.filename or self._run.path
            notice(f"warning: {where}: log or picture not written ({error.strerror or error}); training goes on")

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
