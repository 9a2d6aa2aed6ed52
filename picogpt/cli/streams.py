"""Standard input and output that lose nothing: on a non-blocking pipe they wait, and any file name can be printed."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import sys
from typing import Any, TypeGuard

__all__ = ["install_blocking_streams", "reader_is_gone", "stdout_is_mid_line"]

_LOSSLESS_ERRORS = "picogpt-encode-anyway"


def install_blocking_streams() -> None:
    """Put streams that wait in the place of this process's standard ones; those of a test or an embedding program stay.

    Where another program has set `O_NONBLOCK` on a pipe, Python drops what does not fit into it, and takes a moment without
    input for its end. The setting belongs to all who share the pipe, and can come back at any time, so it is left as it is.
    """
    if os.name == "nt":  # its pipes block
        return
    if sys.stdin is sys.__stdin__ and _is_replaceable(sys.stdin):
        sys.stdin = io.TextIOWrapper(io.BufferedReader(_BlockingFile(0, "rb")), sys.stdin.encoding, sys.stdin.errors)
    if sys.stdout is sys.__stdout__ and _is_replaceable(sys.stdout):
        sys.stdout = _writer(sys.stdout, _LOSSLESS_ERRORS)
    if sys.stderr is sys.__stderr__ and _is_replaceable(sys.stderr):
        sys.stderr = _writer(sys.stderr, sys.stderr.errors)


def _is_replaceable(stream: object) -> TypeGuard[io.TextIOWrapper]:
    return isinstance(stream, io.TextIOWrapper) and not stream.closed


def _writer(stream: Any, errors: str | None) -> io.TextIOWrapper:
    """A stream like `stream` that waits."""
    binary = io.BufferedWriter(_BlockingFile(stream.fileno(), "wb"))
    return io.TextIOWrapper(binary, stream.encoding, errors, line_buffering=stream.line_buffering)


class _BlockingFile(io.FileIO):
    """A descriptor that is waited for where it is non-blocking."""

    ends_a_line = True
    """Whether the last byte that was written ended a line."""

    def __init__(self, descriptor: int, mode: str) -> None:
        super().__init__(descriptor, mode, closefd=False)

    def write(self, data: Any) -> int:
        """Write as much of `data` as fits, at least a byte of it."""
        while (written := super().write(data)) is None:
            select.select([], [self], [])
        if written:
            self.ends_a_line = bytes(memoryview(data)[written - 1 : written]) == b"\n"
        return written

    def readinto(self, buffer: Any) -> int:
        """Read what is there, at least a byte of it unless it is the end."""
        while (count := super().readinto(buffer)) is None:
            select.select([self], [], [])
        return count

    # FileIO's own methods make system calls, which do not wait; those of RawIOBase call `readinto`.

    def read(self, size: int | None = -1) -> Any:
        """Read up to `size` bytes, or all that comes until the end."""
        return io.RawIOBase.read(self, -1 if size is None else size)

    def readall(self) -> Any:
        """Read all that comes until the end."""
        return io.RawIOBase.readall(self)


def stdout_is_mid_line() -> bool:
    """Whether what was written to stdout last, on a terminal that stderr writes to as well, did not end its line."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        raw: object = sys.stdout.buffer.raw  # type: ignore[union-attr]
        return isinstance(raw, _BlockingFile) and not raw.ends_a_line and sys.stdout.isatty() and sys.stderr.isatty()
    return False


def reader_is_gone(stream: Any) -> bool:
    """Whether `stream` is a pipe whose other end is closed."""
    if not hasattr(select, "poll"):  # Windows, where nothing else tells
        return True
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (AttributeError, OSError, ValueError):  # closed, or no file at all
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _encode_lossless(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode bytes of a file name that are no text as they were, and what the terminal's encoding lacks with a backslash."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error(_LOSSLESS_ERRORS, _encode_lossless)
