"""Programs that tests start as processes of their own, one a file."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import AnyStr

__all__ = ["kill_at_exit", "program"]


def program(name: str, *arguments: str) -> list[str]:
    """The command that runs `tests/programs/NAME.py`."""
    return [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *arguments]


@contextlib.contextmanager
def kill_at_exit(process: subprocess.Popen[AnyStr]) -> Iterator[subprocess.Popen[AnyStr]]:
    """Kill a process that is still there at the end of the block, which a failed test leaves early."""
    with process:  # closes its pipes and waits for it
        try:
            yield process
        finally:
            process.kill()
