"""What can go wrong and a user can put right.

Every error of this package is a `PicoGPTError`. The command line turns it into one line on stderr and its exit code;
anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import os


class PicoGPTError(Exception):
    """The work failed: a file, a text, the network or the machine. The message says what, where and what to do."""

    exit_code = 1


class ConfigError(PicoGPTError):
    """A setting is out of its range or contradicts another one: wrong usage."""

    exit_code = 2

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        """Name of the setting at fault, so that the command line can name its flag."""


class DataError(PicoGPTError):
    """A text cannot be had, cannot be read or is too short."""


class RunError(PicoGPTError):
    """A run folder or a file in it is missing, damaged, in use or made by other settings."""


class TrainingError(PicoGPTError):
    """Training cannot go on, for instance because the loss is no longer finite."""


class BuildError(PicoGPTError):
    """Native code cannot be compiled or loaded on this machine; what it was for is done by torch or numpy, or not at all."""


class RanksError(PicoGPTError):
    """The processes that train together have lost one of them."""


class Interrupted(PicoGPTError):
    """A signal asked the work to end; everything worth keeping is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def file_of_error(error: OSError) -> str | None:
    """The file that an error of the system is about, if it names one: of a rename the target, not the temporary file."""
    name = error.filename2 or error.filename
    return os.fsdecode(name) if name else None
