"""Clean stops by signals: a handler sets a flag, and the work polls it where it can stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

__all__ = ["StopRequest", "deferred_interrupt"]


class StopRequest:
    """A flag that a signal sets; call the object to read it. Signals are handled within `listen`.

    Args:
        names: names of the signals; those that the system lacks are ignored.
    """

    def __init__(self, names: Sequence[str] = ("SIGINT", "SIGTERM", "SIGHUP")) -> None:
        # Windows has no SIGHUP.
        self._signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self.signal_number: int | None = None

    def __call__(self) -> bool:
        """Return whether a signal has arrived."""
        return self.signal_number is not None

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Set the flag at the first signal; the second one ends the process at once."""
        # A signal that the process was started to ignore, for example by nohup, stays ignored.
        self._signals = [number for number in self._signals if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._take_note) for number in self._signals}
        try:
            yield
        finally:
            # Restored, as a Python program may have handlers of its own.
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take_note(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = number
        # The default action: a user who presses Ctrl-C twice does not want to wait for a clean stop.
        for each in self._signals:
            signal.signal(each, signal.SIG_DFL)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Raise the KeyboardInterrupt of a Ctrl-C within the block at its end; a second Ctrl-C ends the process at once.

    For imports: extension modules (numpy.random is one) and the import system itself drop an exception that meets certain of
    their lines, and the work would then go on as if nobody had pressed a key. Nothing is changed where Ctrl-C raises nothing: in
    other threads than the main one, and where it is handled already.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    request = StopRequest(["SIGINT"])
    with request.listen():
        yield
    if request():
        raise KeyboardInterrupt
