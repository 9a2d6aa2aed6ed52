"""Waiting until the network is back: how long between tries, what is said meanwhile, and when to give up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from picogpt.errors import DataError

__all__ = ["Closed", "Outage"]

PATIENCE = 86_400.0
"""Seconds without an article after which a run gives up: a day."""
FIRST_WAIT = 1.0
"""Seconds before the first new try; each one after it waits twice as long."""
LONGEST_WAIT = 60.0
"""Seconds between two tries at the most."""
NOTICE_INTERVAL = 60.0
"""Seconds between two lines about failures at the least."""


class Closed(Exception):
    """The reader was closed while it waited."""


class Outage:
    """The waits of one reader, from a failure to the next article.

    Args:
        notify: told of the first failure, then once a minute, and when it is over.
        pause: waits so many seconds, and says whether the reader was closed meanwhile.
        clock: seconds that never go back.
    """

    def __init__(
        self, notify: Callable[[str], None], pause: Callable[[float], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._notify, self._pause, self._clock = notify, pause, clock
        self._since: float | None = None
        self._announced = False
        self._said_at = -math.inf
        self._wait = 0.0

    def wait(self, where: str, reason: str) -> None:
        """Wait before the next try.

        Args:
            where: what could not be read.
            reason: why not.

        Raises:
            DataError: patience has run out.
            Closed: the reader was closed meanwhile.
        """
        now = self._clock()
        if self._since is None:
            self._since, self._wait = now, min(FIRST_WAIT, LONGEST_WAIT)
        failing = now - self._since
        if failing > PATIENCE:
            raise DataError(f"{where}: no answer for {failing:,.0f} s ({reason}); the same command goes on")
        if now - self._said_at >= NOTICE_INTERVAL:
            self._announced, self._said_at = True, now
            self._notify(f"{where}: {reason}; no answer for {failing:,.0f} s, trying on for {PATIENCE - failing:,.0f} s more")
        if self._pause(self._wait):
            raise Closed
        self._wait = min(2 * self._wait, LONGEST_WAIT)

    def over(self) -> None:
        """An article has come."""
        if self._since is None:
            return
        if self._announced:
            self._notify(f"the stream is back after {self._clock() - self._since:,.0f} s")
        self._since, self._announced = None, False
