"""Queue between the thread that reads a stream and the training that consumes it, bounded in bytes."""

from __future__ import annotations

import math
import threading
from collections import deque
from typing import Generic, TypeVar

from picogpt.data.outage import ReaderClosed

__all__ = ["ReadAhead"]

READ_AHEAD = 1 << 24
"""Bytes of encoded text buffered ahead of training; they bridge short network outages."""

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Queue of items that takes more as long as it holds fewer than `READ_AHEAD` bytes; so one item always fits.

    Args:
        limit: another number of bytes, if it is smaller.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self._limit = limit
        self._items: deque[tuple[T, int]] = deque()
        self._size = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: T, size: int) -> None:
        """Append `item`, which counts for `size` bytes, waiting while the queue is full.

        Raises:
            ReaderClosed: the consumer has closed the queue.
        """
        with self._changed:
            # The size is compared before the item is added, so an item larger than the limit cannot deadlock.
            # READ_AHEAD is looked up on each call, so that tests can lower it.
            self._changed.wait_for(lambda: self._closed or self._size < min(READ_AHEAD, self._limit))
            if self._closed:
                raise ReaderClosed
            self._items.append((item, size))
            self._size += size
            self._changed.notify()

    def get(self, timeout: float) -> T | None:
        """Remove and return the oldest item, or None if none arrives within `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._items, timeout):
                return None
            item, size = self._items.popleft()
            self._size -= size
            self._changed.notify()
            return item

    def close(self) -> None:
        """Reject further items and wake a waiting `put`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
