"""How a training run is shown: a bar on a terminal, a line now and then elsewhere, a line and a sample every epoch."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from tqdm import tqdm

from picogpt.cli.common import notice
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
        self._bar: tqdm[NoReturn] | None = None
        if sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(
                **_width(),
                file=_Stderr(),
                total=schedule.total_steps * trainer.chars_per_step,
                initial=trainer.step * trainer.chars_per_step,
                unit="char",
                unit_scale=True,
                smoothing=0.05,
            )

            # The clock on the wall can jump; this one cannot.
            self._bar._time = time.perf_counter  # type: ignore[attr-defined]
            self._bar.start_t = self._bar.last_print_t = time.perf_counter()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def on_step(self, report: StepReport) -> None:
        """Move the bar, or say a line if it is time."""
        self._loss = report.loss if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * report.loss
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {self._loss:.3f}", refresh=False)
            self._bar.update(report.chars)
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
            self.tell(f"warning: {where}: log or picture not written ({error.strerror or error}); training goes on")

    def tell(self, text: str) -> None:
        """Say a notice, above the bar if there is one."""
        if self._bar is not None:
            with self._bar.external_write_mode(file=_Stderr()):
                notice(text)
        else:
            notice(text)

    def _say(self, text: str) -> None:
        """Print a result; once stdout is gone, no more, and training goes on."""
        if not self._stdout_alive:
            return
        try:
            if self._bar is not None:
                self._bar.write(text, file=sys.stdout)
            else:
                print(text)
            sys.stdout.flush()
        except (OSError, ValueError, AttributeError):
            self._stdout_alive = False
            self.tell("standard output is closed; training goes on without it")


class _Stderr(io.TextIOBase):
    """Stderr for a bar: a terminal that has gone stops no training."""

    def write(self, text: str) -> int:
        """Write `text` if there is anybody to read it."""
        with contextlib.suppress(OSError, ValueError):
            return sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, likewise."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def fileno(self) -> int:
        """The terminal's, which tells its width."""
        return sys.stderr.fileno()

    def isatty(self) -> bool:
        """It is one."""
        return True


def _width() -> dict[str, Any]:
    """Keep to the terminal's width as it changes; one that tells none, at which tqdm shows nothing, is taken for 80."""
    return {"dynamic_ncols": True} if os.get_terminal_size(sys.stderr.fileno()).columns else {"ncols": 80, "nrows": 24}
