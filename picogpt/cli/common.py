"""Shared parts of the commands: notices on stderr, and the boundary at which exceptions become one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from picogpt.cli.parser import Parser
from picogpt.cli.screen import above_bar
from picogpt.errors import ConfigError, PicoGPTError, file_of_error
from picogpt.stdio import install_blocking_streams, reader_is_gone, stdout_is_mid_line

__all__ = ["end_process", "notice", "run_command"]

_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# Advice for errors of the operating system; other errors are printed without a hint.
_HINTS: Mapping[int, str] = {
    errno.ENOSPC: "free some space on the disk, then start again",
    errno.EDQUOT: "free some space of your quota, then start again",
    errno.EIO: "check the disk, then start again",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "check the path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "allow more open files (ulimit -n), then start again",
    errno.ENFILE: "close other programs, then start again",
    errno.ENOMEM: "close other programs, or take a smaller --batch-size or model",
}


def notice(text: str) -> None:
    """Print a line about the work on stderr; results go to stdout."""
    # A closed stderr must not stop training. If the cursor is in the middle of generated text, start a new line.
    with contextlib.suppress(OSError, ValueError), above_bar():
        print(f"\n{text}" if stdout_is_mid_line() else text, file=sys.stderr, flush=True)


def run_command(body: Callable[[argparse.Namespace], int], parser: Parser, argv: Sequence[str] | None) -> int:
    """Parse `argv` (None: the process's own arguments) and run `body`; return the exit code.

    The only place where exceptions become a line on stderr. Exceptions that are not listed here are bugs and propagate.
    """
    install_blocking_streams()
    arguments = parser.parse(argv)
    try:
        code = body(arguments)
        if sys.stdout is not None and not sys.stdout.closed:
            # Flush here: at the interpreter's exit, a full disk would be a traceback.
            sys.stdout.flush()
        return code
    except (PicoGPTError, KeyboardInterrupt, OSError, MemoryError, RuntimeError) as error:
        # A pipe into `head` is closed once head has read enough: the normal end of such a command, and no error.
        is_reader_done = isinstance(error, BrokenPipeError) and reader_is_gone(sys.stdout)
        # Results before the message, as both may go to one terminal.
        _flush_or_drop()
        if is_reader_done:
            return 0
        message, code = _explain(error, parser)
        notice(f"{parser.prog}: {message}")
        return code


def _flush_or_drop() -> None:
    """Flush stdout; drop buffered output that cannot be written."""
    with contextlib.suppress(ValueError, AttributeError):  # closed, or None
        try:
            sys.stdout.flush()
        except OSError:
            # Python flushes again at exit and would print a second error: let that go to the null device.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end_process(code: int) -> NoReturn:
    """Exit the process with `code` at once, without waiting for threads of libraries.

    A thread that waits for the network cannot be joined, and a thread that wakes up while the interpreter shuts down aborts the
    process. All files have been written by now.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()  # os._exit does not flush
    os._exit(code)


def _explain(error: BaseException, parser: Parser) -> tuple[str, int]:
    """Return the message and the exit code for an exception; raise it again if it is a bug."""
    match error:
        # Library code names a field, such as batch_size; a user has to know the flag, --batch-size.
        case ConfigError(field=str(field)) if parser.has_flag(flag := "--" + field.replace("_", "-")):
            return str(error).replace(field, flag, 1), error.exit_code
        case PicoGPTError():
            return str(error), error.exit_code
        case KeyboardInterrupt():
            return "interrupted", _INTERRUPTED
        case OSError():
            file = file_of_error(error)
            where = f"{file}: " if file else ""
            hint = _HINTS.get(error.errno or 0)
            return f"{where}{error.strerror or error}" + (f"; {hint}" if hint else ""), 1
    # torch raises a plain RuntimeError if an allocation on the CPU fails.
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "not enough memory; close other programs, or take a smaller --batch-size or model", 1
    raise error
