"""Retries while the network is down: pauses between tries, notices to the user, and when to give up.

The pause doubles from `FIRST_WAIT` to `LONGEST_WAIT` seconds. A run gives up after a day, a start after half a minute.
"""

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
"""Sleeps for the given seconds; returns True, early, once its owner has been closed."""

PATIENCE = 86_400.0
"""Seconds without an article before a run gives up: a day."""
START_PATIENCE = 30.0
"""Seconds of failures before a start gives up: the user is watching, and nothing is lost."""
DAMAGE_PATIENCE = 30.0
"""Seconds of invalid content before a file counts as damaged; interference of a router or proxy passes sooner."""
FIRST_WAIT = 1.0
"""Seconds before the first retry; each further pause is twice as long."""
LONGEST_WAIT = 60.0
"""Longest pause between two tries, in seconds."""
NOTICE_INTERVAL = 60.0
"""Shortest time between two notices about failures, in seconds."""


class ReaderClosed(Exception):
    """Raised when a reader is closed while it waits."""


class Outage:
    """State of one reader's retries, from the first failure to the next article.

    Args:
        notify: receives a line at the first failure, then once a minute, and at recovery.
        pause: sleeps for the given seconds; returns True once the reader has been closed.
        clock: monotonic clock in seconds.
        patience: seconds before giving up; None for `PATIENCE`.
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
        self._since: float | None = None  # first failure of this outage; None while all is well
        self._damaged_since: float | None = None  # first invalid answer since the last failure of the network
        self._announced = False  # whether the user has heard of this outage
        self._notified_at = -math.inf
        self._wait = 0.0  # next pause

    def wait(self, where: str, reason: str, *, damaged: bool = False) -> None:
        """Wait before the next try.

        Args:
            where: file or data set that could not be read.
            reason: cause of the failure.
            damaged: whether an answer arrived, but with invalid content.

        Raises:
            DataError: failures have lasted longer than the patience.
            ReaderClosed: the reader was closed during the pause.
        """
        now = self._clock()
        if self._since is None:
            # A new outage starts with the shortest pause.
            self._since, self._wait = now, min(FIRST_WAIT, LONGEST_WAIT)
        self._give_up_on_damage(where, reason, now, damaged=damaged)
        failing = now - self._since
        # Give up only after a failed try, so that a short patience still allows the first one.
        if failing > self._patience:
            raise DataError(
                f"{where}: no answer for {failing:,.0f} s ({reason}); check the network, then start the same command again"
            )
        # Also limits flapping connections, whose outages are short but many.
        if now - self._notified_at >= NOTICE_INTERVAL:
            self._announced, self._notified_at = True, now
            left = self._patience - failing
            self._notify(f"{where}: {reason}; no answer for {failing:,.0f} s, retrying for {left:,.0f} s more")
        if self._pause(self._wait):
            raise ReaderClosed
        # Exponential backoff.
        self._wait = min(2 * self._wait, LONGEST_WAIT)

    def _give_up_on_damage(self, where: str, reason: str, now: float, *, damaged: bool) -> None:
        """Raise if all answers have been invalid for `DAMAGE_PATIENCE` seconds; a network failure restarts the count."""
        if not damaged:
            self._damaged_since = None
        elif self._damaged_since is None:
            self._damaged_since = now
        elif now - self._damaged_since > DAMAGE_PATIENCE:
            raise DataError(
                f"{where}: cannot be read, tried for {now - self._damaged_since:,.0f} s ({reason}); the file is damaged or has "
                "another format; try again later, or use another data set"
            )

    def over(self) -> None:
        """Record that an article has arrived: the outage, if any, has ended."""
        self._damaged_since = None
        if self._since is None:
            return
        # Report recovery only if the outage was reported.
        if self._announced:
            self._notify(f"the stream is back after {self._clock() - self._since:,.0f} s")
        self._since, self._announced = None, False


def run_in_thread(work: Callable[[Pause], T]) -> T:
    """Run `work` in a thread and wait for its result, so that Ctrl-C ends the wait even while a library blocks.

    Args:
        work: called with a pause function, which returns early once the caller has stopped waiting.

    Raises:
        BaseException: any exception of `work`.
    """
    answers: queue.SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = queue.SimpleQueue()
    closed = threading.Event()

    def run() -> None:
        try:
            answers.put((work(closed.wait), None))
        # Every exception is handed over and raised in the caller.
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, name="hub", daemon=True).start()
    try:
        found, error = answers.get()
    finally:
        # After Ctrl-C too: the thread must not go on retrying unseen.
        closed.set()
    if error is not None:
        raise error
    return found  # type: ignore[return-value]
