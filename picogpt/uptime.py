"""Age of this process, so that a budget of minutes includes the time of importing torch."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

__all__ = ["process_seconds"]

# The age is read at the start of a command. A larger value comes from a system with another clock, such as some containers.
_LIKELY = 600.0


def process_seconds(stat: Path = Path("/proc/self/stat")) -> float:
    """Return the seconds since this process was started; 0 if the system does not tell. Call it early.

    Args:
        stat: Linux's status file of the process.
    """
    # Only Linux has a file for it; elsewhere a budget counts from the first line of the command.
    if sys.platform != "linux":
        return 0.0
    try:
        # Field 2, the program's name in parentheses, may contain spaces and parentheses, so split after the last one. Field 22 is
        # the start, in clock ticks since boot.
        ticks = int(stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
    return age if 0 <= age < _LIKELY else 0.0
