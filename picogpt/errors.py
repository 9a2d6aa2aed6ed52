"""Exceptions for errors that a user can fix.

Every exception that this package raises for something that a user gave it is a `PicoGPTError`. The command line turns it into one
line on stderr and an exit code; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import os


class PicoGPTError(Exception):
    """A failure caused by a file, a text, the network or the machine. The message says what, where and what to do."""

    exit_code = 1  # of the command line


class ConfigError(PicoGPTError):
    """A setting is out of its range or contradicts another one."""

    exit_code = 2  # wrong usage, as in argparse

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        """Name of the invalid setting, which the command line replaces by its flag."""


class DataError(PicoGPTError):
    """A text is unavailable, unreadable or too short."""


class RunError(PicoGPTError):
    """A run folder or a file in it is missing, damaged, in use, or was written with other settings."""


class TrainingError(PicoGPTError):
    """Training cannot continue, for example because the loss is not finite."""


class BuildError(PicoGPTError):
    """Native code cannot be compiled or loaded on this machine. With `auto`, callers fall back to torch or numpy."""


class RanksError(PicoGPTError):
    """A rank of a distributed run was lost."""


# Not a KeyboardInterrupt: by now the work has stopped where it could, and the command ends like any other.
class Interrupted(PicoGPTError):
    """A signal ended the work; the run is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number  # as shells report a process that a signal ended


def file_of_error(error: OSError) -> str | None:
    """Return the file that an OSError is about, if it names one."""
    # A rename has two: the target is the file that the user knows, the source a temporary one.
    name = error.filename2 or error.filename
    return os.fsdecode(name) if name else None
