"""How many threads decode, chosen while they do: all of them, unless fewer are faster because other programs need the cores.

A result does not depend on the number of threads, so it may change between two characters.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ThreadTuner"]

_BLOCK = 0.004
"""Seconds that a block of characters should take: short against a slow trial, long against a call."""
_MAX_BLOCK = 64
_FIRST_TRIAL, _LAST_TRIAL = 0.1, 3.0
"""Seconds until another number of threads is tried again; doubled each time that it turns out slower."""
_SHORTEST = 1e-9
"""Seconds that a block takes at least, on whatever clock."""
_SMOOTHING = 0.3
"""Weight of the newest block in a mean."""


class ThreadTuner:
    """The time of a character by number of threads.

    Args:
        threads: the most that there may be.
    """

    def __init__(self, threads: int) -> None:
        powers = [1 << i for i in range(threads.bit_length())]
        self._candidates = sorted({threads, *(count for count in powers if count < threads)}, reverse=True)
        self._seconds: dict[int, float] = {}
        self._trial_every = _FIRST_TRIAL
        self._next_trial = time.perf_counter() + _FIRST_TRIAL / 4
        self._turn = 0
        self.threads = threads
        """How many are the fastest, as far as is known."""

    @contextmanager
    def block(self, left: int) -> Iterator[tuple[int, int]]:
        """Time a block of at most `left` characters: gives threads and characters, of which those that are made count."""
        threads = self._choose()
        seconds = self._seconds.get(threads, max(self._seconds.values(), default=_BLOCK))
        count = min(left, _MAX_BLOCK, max(1, round(_BLOCK / seconds)))
        start = time.perf_counter()
        yield threads, count
        self._record(threads, max(time.perf_counter() - start, _SHORTEST) / count)

    def _choose(self) -> int:
        """The fastest number of threads, or at times another one."""
        if len(self._candidates) == 1 or time.perf_counter() < self._next_trial:
            return self.threads
        others = [count for count in self._candidates if count != self.threads]
        self._turn = (self._turn + 1) % len(others)
        return others[self._turn]

    def _record(self, threads: int, seconds: float) -> None:
        tried = threads != self.threads
        before = seconds if tried else self._seconds.get(threads, seconds)  # a trial long ago says nothing
        self._seconds[threads] = before + _SMOOTHING * (seconds - before)
        fastest = min(self._seconds, key=lambda count: self._seconds[count])
        if tried:
            self._trial_every = _FIRST_TRIAL if fastest == threads else min(2 * self._trial_every, _LAST_TRIAL)
            self._next_trial = time.perf_counter() + self._trial_every
        self.threads = fastest
