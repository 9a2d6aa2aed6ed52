"""The commands' common ground: notices and the error boundary."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from picogpt.cli.parser import Parser
from picogpt.cli.screen import above_bar
from picogpt.cli.streams import install_blocking_streams, reader_is_gone, stdout_is_mid_line
from picogpt.errors import ConfigError, PicoGPTError, file_of_error

__all__ = ["check_picture", "end_process", "notice", "run_command"]

_INTERRUPTED = 130

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
"""What to do about an error of the system; others are printed without advice."""


def notice(text: str) -> None:
    """Print something about the work on stderr, on a line of its own."""
    with contextlib.suppress(OSError, ValueError), above_bar():  # a closed stderr stops no work
        print(f"\n{text}" if stdout_is_mid_line() else text, file=sys.stderr, flush=True)


def run_command(body: Callable[[argparse.Namespace], int], parser: Parser, argv: Sequence[str] | None) -> int:
    """Parse `argv` (None: the process's own) and run `body`; return the exit code.

    The one boundary at which the package's errors become a line on stderr. Other exceptions are bugs and go on.
    """
    install_blocking_streams()
    arguments = parser.parse(argv)
    try:
        code = body(arguments)
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()  # here, where a full disk is one line
        return code
    except (PicoGPTError, KeyboardInterrupt, OSError, MemoryError, RuntimeError) as error:
        left = isinstance(error, BrokenPipeError) and reader_is_gone(sys.stdout)
        _flush_or_drop()  # first: an interruption can come before the text above it is out
        if left:
            return 0
        message, code = _explain(error, parser)
        notice(f"{parser.prog}: {message}")
        return code


def _flush_or_drop() -> None:
    """Write results that are still buffered; drop those that cannot be written, as Python would try it again at exit."""
    with contextlib.suppress(ValueError, AttributeError):
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_picture(path: Path | None) -> None:
    """Refuse to begin the work for a picture that could not be written to `path`; None is a place of our own choosing.

    Raises:
        ConfigError: it is no name of a JPG or PNG, or its folder is not there or cannot be written to.
    """
    if path is None:
        return
    if path.suffix.lower() not in {".jpg", ".jpeg", ".png"}:
        raise ConfigError(f"output must end in .jpg or .png, got {str(path)!r}", "output")
    if not path.parent.is_dir():
        raise ConfigError(f"output: there is no folder {path.parent}; make it first", "output")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"output: {path} cannot be written; name another file", "output")


def end_process(code: int) -> NoReturn:
    """End with `code` at once, whatever threads of a library are still reading.

    One that waits for the network cannot be joined, and one that comes back while the interpreter is being torn down aborts
    the process. By now all that is to last has been written.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def _explain(error: BaseException, parser: Parser) -> tuple[str, int]:
    """The line and the exit code of an error; one that is a bug of ours is raised again."""
    match error:
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
    # torch has no exception of its own for an allocation that was refused.
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "not enough memory; close other programs, or take a smaller --batch-size or model", 1
    raise error
