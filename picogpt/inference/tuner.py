"""Chooses the number of decoding threads at run time: all, unless fewer are faster because other programs use the cores.

Results are bit-identical for any number of threads, so the number may change between two characters.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ThreadTuner"]

_BLOCK_SECONDS = 0.004
"""Target duration of a block of characters: short, so that a slow trial costs little, but long compared with one call."""
_MAX_BLOCK = 64
"""Maximum number of characters in a block."""
_MIN_INTERVAL, _MAX_INTERVAL = 0.1, 3.0
"""Seconds between trials of another number of threads; the interval doubles each time the trial is slower."""
_MIN_SECONDS = 1e-9
"""Lower bound of a block's duration, so that a coarse clock cannot cause a division by zero."""
_SMOOTHING = 0.3
"""Weight of the newest block in the exponential moving average."""


class ThreadTuner:
    """Measures the time per character for several numbers of threads, and chooses the fastest.

    Args:
        threads: maximum number of threads.
    """

    def __init__(self, threads: int) -> None:
        # Candidates are the maximum and all powers of two below it, largest first.
        powers = [1 << i for i in range(threads.bit_length())]
        self._candidates = sorted({threads, *(count for count in powers if count < threads)}, reverse=True)
        self._seconds: dict[int, float] = {}  # moving average of the time per character, by number of threads
        self._trial_interval = _MIN_INTERVAL
        self._next_trial = time.perf_counter() + _MIN_INTERVAL / 4  # sooner than later ones: nothing has been compared yet
        self._turn = 0
        self.threads = threads
        """The fastest number of threads so far."""

    @contextmanager
    def block(self, left: int) -> Iterator[tuple[int, int]]:
        """Time a block of at most `left` characters; yields the number of threads and of characters to decode."""
        threads = self._choose()
        # A number of threads without a measurement is assumed to be as slow as the slowest one measured.
        seconds = self._seconds.get(threads, max(self._seconds.values(), default=_BLOCK_SECONDS))
        count = min(left, _MAX_BLOCK, max(1, round(_BLOCK_SECONDS / seconds)))
        start = time.perf_counter()
        yield threads, count
        self._record(threads, max(time.perf_counter() - start, _MIN_SECONDS) / count)

    def _choose(self) -> int:
        """Return the fastest number of threads or, when a trial is due, another candidate."""
        if len(self._candidates) == 1 or time.perf_counter() < self._next_trial:
            return self.threads
        # Trials take the other candidates in turn.
        others = [count for count in self._candidates if count != self.threads]
        self._turn = (self._turn + 1) % len(others)
        return others[self._turn]

    def _record(self, threads: int, seconds: float) -> None:
        tried = threads != self.threads
        # Other programs come and go: a trial replaces its old measurement, only the current choice is averaged.
        before = seconds if tried else self._seconds.get(threads, seconds)
        self._seconds[threads] = before + _SMOOTHING * (seconds - before)
        fastest = min(self._seconds, key=lambda count: self._seconds[count])
        if tried:
            # Exponential backoff: as long as trials lose, they become rarer; one that wins resets the interval.
            self._trial_interval = _MIN_INTERVAL if fastest == threads else min(2 * self._trial_interval, _MAX_INTERVAL)
            self._next_trial = time.perf_counter() + self._trial_interval
        self.threads = fastest
