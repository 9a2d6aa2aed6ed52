"""Progress on stderr, for training, timing, evaluation and downloads: a bar on a terminal, else a line every half minute."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from tqdm import tqdm

from picogpt.cli.common import notice
from picogpt.cli.screen import hide_bar, show_bar

__all__ = ["DownloadBar", "ProgressBar"]

LINE_INTERVAL = 30.0
"""Seconds between progress lines when stderr is not a terminal."""


class ProgressBar:
    """A bar that is cleared before any line is printed (`picogpt.cli.screen`). Without a terminal it prints progress lines.

    Args:
        total: amount of work.
        unit: unit of work, `char` or `B`.
        done: work done in earlier starts.
        label: text in front of the bar.
        leave: whether the bar stays on the screen at the end.
        describe: formats a progress line from the work done and the seconds since the start; None prints no lines.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        *,
        done: int = 0,
        label: str | None = None,
        leave: bool = True,
        describe: Callable[[int, float], str] | None = None,
    ) -> None:
        self._bar: _Bar | None = None
        self._done, self._describe = done, describe
        self._start = self._last_line = time.perf_counter()
        # sys.stderr is None where a process was started without one.
        if sys.stderr is None or not sys.stderr.isatty():
            return  # no bar: `advance` prints lines
        # A low smoothing factor: the mean speed predicts the end better than the last moment, in which the machine may be busy.
        scale: dict[str, Any] = {"unit": unit, "unit_scale": True, "smoothing": 0.05}
        self._bar = _Bar(**_width(), **scale, file=_Stderr(), desc=label, total=total, initial=done, leave=leave)
        # tqdm reads the wall clock, which can jump, as after a correction by NTP. Give it a monotonic clock.
        self._bar._time = time.perf_counter  # type: ignore[attr-defined]
        self._bar.start_t = self._bar.last_print_t = time.perf_counter()
        show_bar(self)  # from here on, other output is printed above the bar

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def advance(self, amount: int, note: str | None = None, *, total: int | None = None) -> None:
        """Add `amount` to the work done; `note` is shown behind the bar, `total` replaces the amount of work."""
        self._done += amount
        if self._bar is None:
            self._print_line()
            return
        if note is not None:
            self._bar.set_postfix_str(note, refresh=False)
        # A run with a budget of minutes changes its number of steps while it trains.
        if total is not None:
            self._bar.total = total
        self._bar.update(amount)

    def _print_line(self) -> None:
        now = time.perf_counter()
        if self._describe is not None and now - self._last_line >= LINE_INTERVAL:
            self._last_line = now
            notice(self._describe(self._done, now - self._start))

    @contextlib.contextmanager
    def cleared(self) -> Iterator[None]:
        """Erase the bar while other output is printed."""
        if self._bar is None:
            yield
            return
        # tqdm clears only bars that write to the given file, so pass the bar's own file object.
        with tqdm.external_write_mode(file=self._bar.fp):
            yield

    def close(self) -> None:
        """Stop updating the bar; it stays on a line of its own unless `leave` is false."""
        hide_bar(self)  # first: a notice from another thread must not clear a closed bar
        if self._bar is not None:
            self._bar.close()


class _Bar(tqdm):  # type: ignore[type-arg]  # a class of tqdm takes no argument at run time
    """A tqdm bar that keeps the cursor at the start of its line."""

    # Called by tqdm for every redraw, also from its monitor thread.

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        super().display(msg, pos)
        # A terminal echoes ^C at the cursor: here the next redraw overwrites it.
        self.fp.write("\r")
        self.fp.flush()


class _Stderr(io.TextIOBase):
    """Stderr for a bar. Errors are ignored: training continues when its terminal was closed."""

    def write(self, text: str) -> int:
        """Write `text` if the terminal still exists."""
        with contextlib.suppress(OSError, ValueError):
            return sys.stderr.write(text)
        return len(text)  # as if it had been written

    def flush(self) -> None:
        """Flush if the terminal still exists."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def fileno(self) -> int:
        """Return the terminal's descriptor, from which tqdm reads the width."""
        return sys.stderr.fileno()

    def isatty(self) -> bool:
        """Return True: a bar is made only on a terminal."""
        return True


def _width() -> dict[str, Any]:
    """Return tqdm's arguments for the width: the terminal's, as it changes, or 80 columns if the terminal reports none."""
    # With a width of 0, as some serial consoles report, tqdm would show nothing.
    return {"dynamic_ncols": True} if os.get_terminal_size(sys.stderr.fileno()).columns else {"ncols": 80, "nrows": 24}


class DownloadBar:
    """Progress of one download in bytes; the bar appears with the first bytes, so a failed request shows none."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: ProgressBar | None = None
        self._received = 0

    def __enter__(self) -> DownloadBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, received: int, total: int) -> None:
        """Show that `received` of `total` bytes have arrived."""
        if self._bar is None:
            self._bar = ProgressBar(total, "B", label=self._what)  # the size is known from the first response
        self._bar.advance(received - self._received)  # callers report totals, tqdm takes differences
        self._received = received
