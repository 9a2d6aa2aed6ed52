"""What the commands share: a parser that answers in one line, the error boundary, and signals that end work cleanly."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from picogpt import __version__
from picogpt.cli.screen import above_bar
from picogpt.errors import ConfigError, PicoGPTError

__all__ = ["Parser", "StopRequest", "add_model", "check_picture", "end_process", "notice", "run_command"]

_WRONG_USAGE = 2
_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` without abbreviations, whose errors are one line and name the nearest flag."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--version", action="version", version=f"picogpt {__version__}")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse, refusing an unknown flag with the name of the nearest one."""
        parsed, unknown = self.parse_known_args(argv)
        if unknown:
            self._refuse(unknown[0])
        return parsed

    def has_flag(self, flag: str) -> bool:
        """Whether there is such a flag."""
        return flag in self._option_string_actions

    def _refuse(self, argument: str) -> NoReturn:
        if not argument.startswith("-"):
            self.error(f"{argument!r} belongs to no flag")
        flag = argument.partition("=")[0]
        nearest = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        self.error(f"there is no flag {flag}" + (f"; did you mean {nearest[0]}?" if nearest else ""))

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and one line."""
        self.exit(_WRONG_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_model(flags: argparse._ActionsContainer) -> None:
    """Add the flags that name a trained model."""
    flags.add_argument(
        "-m",
        "--model",
        metavar="RUN",
        help="a run's name, its folder, or a .safetensors file (default: the run under the logs folder that was saved last, "
        "else a model that comes with picogpt)",
    )
    flags.add_argument("--logs-dir", metavar="DIR", type=Path, default=Path("logs"), help="where runs are kept (default: logs)")


def notice(text: str) -> None:
    """Say something about the work, on stderr."""
    with contextlib.suppress(OSError, ValueError), above_bar():  # a closed stderr stops no work
        print(text, file=sys.stderr, flush=True)


def run_command(body: Callable[[argparse.Namespace], int], parser: Parser, argv: Sequence[str] | None) -> int:
    """Parse `argv` (None: the process's own) and run `body`; return the exit code.

    The one boundary at which the package's errors become a line on stderr. Other exceptions are bugs and go on.
    """
    arguments = parser.parse(argv)
    try:
        return body(arguments)
    except BrokenPipeError:
        # Whoever read us has gone. Nothing more can be written, not even at exit, when Python flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (PicoGPTError, KeyboardInterrupt, OSError, MemoryError, RuntimeError) as error:
        message, code = _explain(error, parser)
        notice(f"{parser.prog}: {message}")
        return code


def check_picture(path: Path | None) -> None:
    """Refuse to begin the work for a picture that could not be written to `path`; None is a place of our own choosing.

    Raises:
        ConfigError: it is no name of a JPG, or its folder is not there.
    """
    if path is not None and path.suffix.lower() not in {".jpg", ".jpeg"}:
        raise ConfigError(f"output must end in .jpg, got {str(path)!r}", "output")
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"output: there is no folder {path.parent}; make it first", "output")


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
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}{error.strerror or error}; check the disk and its permissions, then start again", 1
    # torch has no exception of its own for an allocation that was refused.
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "not enough memory; close other programs, or take a smaller --batch-size or model", 1
    raise error


class StopRequest:
    """Whether a signal has asked the work to end. Calling it says so; use it within `listen`.

    Args:
        names: the signals that count, where the system has them.
    """

    def __init__(self, names: Sequence[str] = ("SIGINT", "SIGTERM", "SIGHUP")) -> None:
        self._signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self.signal_number: int | None = None

    def __call__(self) -> bool:
        """Whether one has."""
        return self.signal_number is not None

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Take note of the signals instead of dying of them; the second one ends the process at once."""
        # What the process was started to ignore, by nohup for instance, it goes on ignoring.
        self._signals = [number for number in self._signals if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._take_note) for number in self._signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take_note(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = number
        for each in self._signals:
            signal.signal(each, signal.SIG_DFL)
