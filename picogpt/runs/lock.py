"""A lock on a file, by the operating system: released however the process ends."""

from __future__ import annotations

import enum
import errno
import sys
from typing import BinaryIO

__all__ = ["Lock", "try_lock"]

# errno values of a file system without flock, such as some network mounts.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
# NFS emulates flock by byte-range locks, which may report a held lock as EACCES.
_LOCK_HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})


class Lock(enum.Enum):
    """Result of an attempt to lock a file."""

    OWN = enum.auto()
    HELD = enum.auto()
    """Another process holds the lock."""
    UNSUPPORTED = enum.auto()
    """The file system has no locks."""


if sys.platform == "win32":
    import msvcrt

    def try_lock(stream: BinaryIO) -> Lock:
        """Try to lock an open file, without waiting."""
        # Windows locks ranges and blocks reads of them: lock a byte beyond the pid, which stays readable.
        stream.seek(1024)
        try:
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return Lock.HELD
        finally:
            stream.seek(0)
        return Lock.OWN

else:
    import fcntl

    def try_lock(stream: BinaryIO) -> Lock:
        """Try to lock an open file, without waiting.

        Raises:
            OSError: the disk is broken.
        """
        try:
            # flock belongs to the open file, so closing another descriptor of the file does not release it, unlike lockf.
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return Lock.UNSUPPORTED
            if error.errno in _LOCK_HELD:
                return Lock.HELD
            raise
        return Lock.OWN
