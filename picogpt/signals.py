"""Signals that end work cleanly: they are noted, and the work asks for them where it can stop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from types import FrameType

__all__ = ["StopRequest"]


class StopRequest:
    """Whether a signal has asked the work to end. Calling it says so; use it within `listen`.

    Args:
        names: the signals that count, where the system has them.
    """

    def __init__(self, names: Sequence[str] = ("SIGINT", "SIGTERM", "SIGHUP")) -> None:
        self._signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self.signal_number: int | None = None

    def __call__(self) -> bool:
        """Whether one has."""
        return self.signal_number is not None

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Take note of the signals instead of dying of them; the second one ends the process at once."""
        # A signal that the process was started to ignore, by nohup for instance, stays ignored.
        self._signals = [number for number in self._signals if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._take_note) for number in self._signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take_note(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = number
        for each in self._signals:
            signal.signal(each, signal.SIG_DFL)
