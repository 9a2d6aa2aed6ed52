"""How long this process has run, as far as the system tells it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

__all__ = ["process_seconds"]

_LIKELY = 600.0
"""A process that is asked when it has just begun is no older; a larger age comes from a system that counts otherwise."""


def process_seconds(stat: Path = Path("/proc/self/stat")) -> float:
    """Seconds since this process was started; 0 where the system does not say. To be asked early.

    Args:
        stat: what Linux tells of the process.
    """
    if sys.platform != "linux":
        return 0.0
    try:
        # The second field, the program's name in parentheses, can hold anything; the start is the 22nd, in ticks since boot.
        ticks = int(stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
    return age if 0 <= age < _LIKELY else 0.0
