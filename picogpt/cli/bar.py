"""Progress on stderr, for training, timing, evaluation and downloads: a bar on a terminal, a line now and then elsewhere."""

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

__all__ = ["ProgressBar"]

LINE_INTERVAL = 30.0
"""Seconds between lines where stderr is no terminal."""


class ProgressBar:
    """A bar that is cleared before any line is printed (`picogpt.cli.screen`); where stderr is no terminal, a line now and then.

    Args:
        total: amount of work.
        unit: of the amount, `char` or `B`.
        done: amount that was done before.
        label: words in front.
        leave: whether it stays when the work is done.
        describe: makes a line, given the seconds since the start; None prints no lines.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        *,
        done: int = 0,
        label: str | None = None,
        leave: bool = True,
        describe: Callable[[float], str] | None = None,
    ) -> None:
        self._bar: _Bar | None = None
        self._describe = describe
        self._start = self._last_line = time.perf_counter()
        if sys.stderr is None or not sys.stderr.isatty():
            return
        scale: dict[str, Any] = {"unit": unit, "unit_scale": True, "smoothing": 0.05}
        self._bar = _Bar(**_width(), **scale, file=_Stderr(), desc=label, total=total, initial=done, leave=leave)
        # The clock on the wall can jump; this one cannot.
        self._bar._time = time.perf_counter  # type: ignore[attr-defined]
        self._bar.start_t = self._bar.last_print_t = time.perf_counter()
        show_bar(self)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def advance(self, amount: int, note: str | None = None, *, total: int | None = None) -> None:
        """Move on by `amount`, with `note` at the end of the bar; `total` is a new amount of work."""
        if self._bar is None:
            self._print_line()
            return
        if note is not None:
            self._bar.set_postfix_str(note, refresh=False)
        if total is not None:
            self._bar.total = total
        self._bar.update(amount)

    def _print_line(self) -> None:
        now = time.perf_counter()
        if self._describe is not None and now - self._last_line >= LINE_INTERVAL:
            self._last_line = now
            notice(self._describe(now - self._start))

    @contextlib.contextmanager
    def cleared(self) -> Iterator[None]:
        """Erase the bar while something else is printed."""
        if self._bar is None:
            yield
            return
        # tqdm compares files to find the bars that are in the way, so it must be given the bar's own.
        with tqdm.external_write_mode(file=self._bar.fp):
            yield

    def close(self) -> None:
        """Leave the bar as it stands, on a line of its own."""
        hide_bar(self)
        if self._bar is not None:
            self._bar.close()


class _Bar(tqdm):  # type: ignore[type-arg]  # a class of tqdm takes no argument at run time
    """Leaves the cursor at the beginning of its line, so that the ^C of a terminal is overwritten with the bar."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        super().display(msg, pos)
        self.fp.write("\r")
        self.fp.flush()


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
