"""A terminal to look at: runs a command in a pseudo-terminal and shows what stands on its screen."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence

import pyte

__all__ = ["look", "set_size"]

LINES = 400
"""Lines of the screen: so many that nothing scrolls away."""


def set_size(descriptor: int, columns: int) -> None:
    """Give a pseudo-terminal that many columns."""
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", LINES if columns else 0, columns, 0, 0))


def look(
    command: Sequence[str],
    *,
    columns: int,
    environment: Mapping[str, str] | None = None,
    type_at: tuple[bytes, bytes] | None = None,
) -> tuple[int, list[str]]:
    """Run `command` with its input, output and errors on a terminal of `columns` columns; 0 is a terminal that tells none.

    Args:
        command: program and arguments.
        columns: width of the terminal.
        environment: variables instead of this process's.
        type_at: what to wait for on the screen, and the keys to press then.

    Returns:
        The exit code, and the screen's lines without trailing blanks when the command has ended.
    """
    primary, secondary = os.openpty()
    set_size(secondary, columns)
    screen = pyte.Screen(columns or 80, LINES)
    stream = pyte.ByteStream(screen)
    shown = b""
    with subprocess.Popen(
        command,
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        env=environment,
        preexec_fn=_take_terminal,  # noqa: PLW1509 (no other threads when the tests fork)
    ) as process:
        os.close(secondary)
        while True:
            try:
                chunk = os.read(primary, 4096)
            except OSError:  # the terminal is closed at the other end
                break
            shown += chunk
            stream.feed(chunk)
            if type_at is not None and type_at[0] in shown:
                os.write(primary, type_at[1])
                type_at = None
    os.close(primary)
    lines = [line.rstrip() for line in screen.display]
    while lines and not lines[-1]:
        lines.pop()
    return process.returncode, lines


def _take_terminal() -> None:
    """Make the terminal the process's own, so that its keys send signals."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
