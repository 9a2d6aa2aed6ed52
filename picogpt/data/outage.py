"""Waiting until the network is back: how long between tries, what is said meanwhile, and when to give up."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from picogpt.errors import DataError

__all__ = ["START_PATIENCE", "Outage", "ReaderClosed", "run_in_thread"]

T = TypeVar("T")
Pause = Callable[[float], bool]
"""Waits so many seconds, and says whether its owner was closed meanwhile."""

PATIENCE = 86_400.0
"""Seconds without an article after which a run gives up: a day."""
START_PATIENCE = 30.0
"""Seconds of failures after which a start gives up: somebody is watching, and nothing is lost."""
DAMAGE_PATIENCE = 30.0
"""Seconds of answers with wrong content after which it is taken for damaged; what a router or a proxy mixes up is over sooner."""
FIRST_WAIT = 1.0
"""Seconds before the first new try; each one after it waits twice as long."""
LONGEST_WAIT = 60.0
"""Seconds between two tries at the most."""
NOTICE_INTERVAL = 60.0
"""Seconds between two lines about failures at the least."""


class ReaderClosed(Exception):
    """The reader was closed while it waited."""


class Outage:
    """The waits of one reader, from a failure to the next article.

    Args:
        notify: told of the first failure, then once a minute, and when it is over.
        pause: waits so many seconds, and says whether the reader was closed meanwhile.
        clock: seconds that never go back.
        patience: seconds after which to give up; None for `PATIENCE`.
    """

    def __init__(
        self,
        notify: Callable[[str], None],
        pause: Pause,
        clock: Callable[[], float] = time.monotonic,
        patience: float | None = None,
    ) -> None:
        self._notify, self._pause, self._clock = notify, pause, clock
        self._patience = PATIENCE if patience is None else patience
        self._since: float | None = None
        self._damaged_since: float | None = None
        self._announced = False
        self._notified_at = -math.inf
        self._wait = 0.0

    def wait(self, where: str, reason: str, *, damaged: bool = False) -> None:
        """Wait before the next try.

        Args:
            where: what could not be read.
            reason: why not.
            damaged: whether an answer came, and its content was wrong.

        Raises:
            DataError: patience has run out.
            ReaderClosed: the reader was closed meanwhile.
        """
        now = self._clock()
        if self._since is None:
            self._since, self._wait = now, min(FIRST_WAIT, LONGEST_WAIT)
        self._give_up_on_damage(where, reason, now, damaged=damaged)
        failing = now - self._since
        if failing > self._patience:
            raise DataError(
                f"{where}: no answer for {failing:,.0f} s ({reason}); check the network, then start the same command again"
            )
        if now - self._notified_at >= NOTICE_INTERVAL:
            self._announced, self._notified_at = True, now
            left = self._patience - failing
            self._notify(f"{where}: {reason}; no answer for {failing:,.0f} s, retrying for {left:,.0f} s more")
        if self._pause(self._wait):
            raise ReaderClosed
        self._wait = min(2 * self._wait, LONGEST_WAIT)

    def _give_up_on_damage(self, where: str, reason: str, now: float, *, damaged: bool) -> None:
        """Raise if every answer of `DAMAGE_PATIENCE` seconds was wrong; a network that is gone in between proves nothing."""
        if not damaged:
            self._damaged_since = None
        elif self._damaged_since is None:
            self._damaged_since = now
        elif now - self._damaged_since > DAMAGE_PATIENCE:
            raise DataError(
                f"{where}: cannot be read, tried for {now - self._damaged_since:,.0f} s ({reason}); the file is damaged or of "
                "another kind; try again later, or use another data set"
            )

    def over(self) -> None:
        """Note that an article has come."""
        self._damaged_since = None
        if self._since is None:
            return
        if self._announced:
            self._notify(f"the stream is back after {self._clock() - self._since:,.0f} s")
        self._since, self._announced = None, False


def run_in_thread(work: Callable[[Pause], T]) -> T:
    """Do `work` in a thread and wait for it, so that Ctrl-C ends the wait at once whatever a library waits for inside.

    Args:
        work: is given a pause that ends early once nobody waits for it any more.

    Raises:
        BaseException: whatever `work` raises.
    """
    answers: queue.SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = queue.SimpleQueue()
    closed = threading.Event()

    def run() -> None:
        try:
            answers.put((work(closed.wait), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, name="hub", daemon=True).start()
    try:
        found, error = answers.get()
    finally:
        closed.set()
    if error is not None:
        raise error
    return found  # type: ignore[return-value]
