"""All figures of one machine on one page: the comparisons, one after the other, with the machine and its load beside them."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import ROOT, machine
from picogpt.files import atomic_write
from picogpt.kernels.processor import identity

__all__ = ["SECTIONS", "add_arguments", "measure", "page"]

SECTIONS = {
    "training": "train --profile both",
    "training, two sequences of ten windows": "train --profile both --windows 10",
    "generation": "generate --profile both",
    "commands": "commands",
    "exported page": "page --rounds 3",
}
"""Arguments of `scripts/benchmark.py` for each section, by its heading."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("page", metavar="PAGE.md", type=Path, help="file to write")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure (default: all)")


def measure(arguments: argparse.Namespace) -> None:
    """Run the sections and write the page; the page so far is written after each, so that an interrupted run keeps it."""
    texts: dict[str, str] = {}
    for heading in arguments.sections:
        print(f"{heading} ...", flush=True)
        texts[heading] = _section(SECTIONS[heading])
        atomic_write(arguments.page, page(texts).encode())
    print(f"{arguments.page} is written")


def page(sections: dict[str, str]) -> str:
    """Return the page in Markdown: the machine, then the output of each section."""
    rows = {
        "measured": f"{datetime.date.today().isoformat()}, commit {_commit()}",
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_memory()} of memory, {platform.system()}",
        "instruction set, libraries": machine(),
        "Python, C compiler": f"{platform.python_version()}, {_compiler()}",
        "command": "`make measure`; the command of each section is above its tables",
    }
    lines = [f"# Figures of {datetime.date.today().isoformat()}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    for heading, text in sections.items():
        lines += ["", f"## {heading[0].upper()}{heading[1:]}", "", text]
    return "\n".join(lines) + "\n"


def _section(flags: str) -> str:
    """Return what a comparison printed, with its command, its duration and the machine's load before it.

    Raises:
        CalledProcessError: the comparison fails.
    """
    # The load of the minute before: nobody else should have been computing. What the section itself adds is no disturbance.
    load, start = os.getloadavg()[0], time.perf_counter()
    command = [sys.executable, "scripts/benchmark.py", *shlex.split(flags)]
    # Its first line describes the machine, which the page has said.
    _, _, text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout.partition("\n")
    minutes = (time.perf_counter() - start) / 60
    return f"`python scripts/benchmark.py {flags}`, {minutes:.0f} minutes; load before it {load:.2f}.\n\n{text.strip()}"


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()

    try:
        # The page so far is itself a change, of no consequence for what is measured.
        changed = " with changes" if git("status", "--porcelain", "--untracked-files=no", "--", ":!docs") else ""
        return git("rev-parse", "--short", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a clone)"


def _processor() -> str:
    entries = dict(line.partition("=")[::2] for line in identity().splitlines())
    return entries.get("model name") or platform.processor() or platform.machine()


def _compiler() -> str:
    command = [*shlex.split(os.environ.get("CC") or "cc"), "--version"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.partition("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
