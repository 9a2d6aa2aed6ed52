"""Whole commands, as users start them: seconds from start to end, and peak memory."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.common import ROOT, interleave, kilobytes

__all__ = ["COMMANDS", "Command", "Usage", "add_arguments", "compare_commands", "run_once"]

# Both without a compiler fall back to torch or numpy, as on a laptop without one.
_NO_COMPILER = {"CC": "false"}


@dataclass(frozen=True)
class Command:
    """A command, its arguments behind `python`, and the environment variables that it changes."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Usage:
    """What one run of a command took."""

    seconds: float
    peak: float
    """Most memory that the process held, in MB."""


def _command(name: str, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Command:
    return Command(name, ("-m", f"picogpt.cli.{module}", *arguments), environment or {})


_EVALUATE = ("-m", "wikipedia", "--text", "dataset/sample.txt", "--chars", "50000")
COMMANDS = (
    Command("python that does nothing", ("-c", ""), {}),
    Command("import picogpt", ("-c", "import picogpt"), {}),
    _command("picogpt-generate --help", "generate", "--help"),
    _command("picogpt-train --help", "train", "--help"),
    _command("picogpt-generate, one character", "generate", "-m", "wikipedia", "-p", "a", "-n", "1"),
    _command("the same without a compiler", "generate", "-m", "wikipedia", "-p", "a", "-n", "1", environment=_NO_COMPILER),
    _command("picogpt-train --dry-run", "train", "--dataset", "sample", "--dry-run", "--chars", "1M"),
    _command("picogpt-eval over 50,000 characters", "eval", *_EVALUATE),
    _command("the same without a compiler", "eval", *_EVALUATE, environment=_NO_COMPILER),
)
"""Commands in the order of the table; all of them leave the clone as it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this comparison."""
    parser.add_argument("--quick", action="store_true", help="leave the evaluations out, which take minutes")


def compare_commands(arguments: argparse.Namespace) -> None:
    """Print the table; the commands take turns, so that a first start with cold caches does not count in a median."""
    chosen = [command for command in COMMANDS if not (arguments.quick and "picogpt.cli.eval" in command.arguments)]
    most = [0.0] * len(chosen)

    def seconds(index: int) -> float:
        usage = run_once(chosen[index])
        most[index] = max(most[index], usage.peak)
        return usage.seconds

    times = interleave(*(partial(seconds, index) for index in range(len(chosen))))
    print("\n| command | seconds from start to end | lowest | peak memory, MB |\n|---|---|---|---|")
    for command, found, peak in zip(chosen, times, most, strict=True):
        print(f"| {command.name} | {statistics.median(found):.2f} | {min(found):.2f} | {peak:,.0f} |", flush=True)


def run_once(command: Command) -> Usage:
    """Run a command from the root of the clone, its pictures and runs going to a temporary folder.

    Raises:
        CalledProcessError: the command fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Evaluation draws a picture beside the model, unless it is told where.
        where = []
        if "picogpt.cli.eval" in command.arguments:
            where = ["--output", f"{folder}/eval.jpg"]
        elif "--dry-run" in command.arguments:
            where = ["--logs-dir", folder]
        return _measure([sys.executable, *command.arguments, *where], {**os.environ, **command.environment})


def _measure(arguments: Sequence[str], environment: Mapping[str, str]) -> Usage:
    start, peak = time.perf_counter(), 0
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, cwd=ROOT, env=environment
        ) as process,
    ):
        while process.poll() is None:
            # Read again and again, as it is gone with the process. What wait4 reports would begin at this process's own memory.
            peak = max(peak, kilobytes(process.pid, "status", "VmHWM"))
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        if process.returncode:
            said.seek(0)
            raise subprocess.CalledProcessError(process.returncode, arguments, stderr=said.read())
    return Usage(seconds, peak / 1000)
