"""Programs that tests start as processes of their own, one a file."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["program"]


def program(name: str, *arguments: str) -> list[str]:
    """The command that runs `tests/programs/NAME.py`."""
    return [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *arguments]
