"""Lossless standard streams: they block also on a non-blocking pipe, and can print any file name."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import sys
from typing import Any, TypeGuard

__all__ = ["install_blocking_streams", "reader_is_gone", "stdout_is_mid_line"]

_LOSSLESS_ERRORS = "picogpt-encode-anyway"  # name of our error handler for encoding


def install_blocking_streams() -> None:
    """Replace this process's standard streams by blocking ones; streams set by a test or an embedding program stay.

    If another program has set `O_NONBLOCK` on a pipe, Python drops output that does not fit into it, and takes a moment without
    input for the end. All processes that share the pipe share the flag and can set it again, so it is not cleared here.
    """
    if os.name == "nt":  # pipes on Windows always block
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
    """Return a blocking text stream with the descriptor, encoding and buffering of `stream`."""
    binary = io.BufferedWriter(_BlockingFile(stream.fileno(), "wb"))
    return io.TextIOWrapper(binary, stream.encoding, errors, line_buffering=stream.line_buffering)


class _BlockingFile(io.FileIO):
    """A file descriptor whose reads and writes wait, also if the descriptor is non-blocking."""

    ends_a_line = True
    """Whether the last byte written was a newline."""

    def __init__(self, descriptor: int, mode: str) -> None:
        super().__init__(descriptor, mode, closefd=False)  # the descriptor belongs to the original stream

    def write(self, data: Any) -> int:
        """Write as much of `data` as fits, at least one byte."""
        # None means that the pipe is full: wait until it can be written.
        while (written := super().write(data)) is None:
            select.select([], [self], [])
        if written:
            self.ends_a_line = bytes(memoryview(data)[written - 1 : written]) == b"\n"
        return written

    def readinto(self, buffer: Any) -> int:
        """Read what is available: at least one byte, except at the end."""
        # None means that nothing has arrived yet; 0 is the end.
        while (count := super().readinto(buffer)) is None:
            select.select([self], [], [])
        return count

    # FileIO.read and readall make system calls themselves, without waiting; those of RawIOBase call our `readinto`.

    def read(self, size: int | None = -1) -> Any:
        """Read up to `size` bytes, or until the end."""
        return io.RawIOBase.read(self, -1 if size is None else size)

    def readall(self) -> Any:
        """Read until the end."""
        return io.RawIOBase.readall(self)


def stdout_is_mid_line() -> bool:
    """Whether stdout and stderr share a terminal and the last output to stdout did not end its line."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        raw: object = sys.stdout.buffer.raw  # type: ignore[union-attr]
        return isinstance(raw, _BlockingFile) and not raw.ends_a_line and sys.stdout.isatty() and sys.stderr.isatty()
    return False


def reader_is_gone(stream: Any) -> bool:
    """Whether `stream` is a pipe whose other end is closed."""
    if not hasattr(select, "poll"):  # Windows: no other way to tell, so trust the BrokenPipeError
        return True
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (AttributeError, OSError, ValueError):  # closed, or not a file
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _encode_lossless(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode undecodable bytes of a file name as they were, and characters missing in the encoding as backslash escapes."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error(_LOSSLESS_ERRORS, _encode_lossless)
