"""The exported page in each browser that is there: characters a second and memory."""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import kilobytes
from picogpt.cli import export
from tests.browser import Browser, Tab
from tests.chromium import CHROMIUM, Chromium
from tests.firefox import FIREFOX, Firefox

__all__ = ["add_arguments", "memory_of", "page_speed"]

WAYS = {
    "WebAssembly in a worker": "",
    "plain JavaScript on the page's own thread": "delete window.Worker; delete window.WebAssembly;",
}
"""What a page finds before its scripts run."""
CHARS = 300
PAUSE = 15
"""Seconds in which a browser frees what it no longer needs."""
IDLE = "document.getElementById('state').textContent === 'Ready.' && !model.busy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model and the number of rounds."""
    parser.add_argument("--model", metavar="RUN", default="wikipedia", help="the model to export (default wikipedia)")
    parser.add_argument("--rounds", metavar="N", type=int, default=5, help="texts and memories in each way (default 5)")


def page_speed(arguments: argparse.Namespace) -> None:
    """Export a model, and write with it in each browser; the ways take turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        page = folder / "page.html"
        with contextlib.redirect_stdout(sys.stderr):  # the name of a temporary file is no result
            export.main(["-m", arguments.model, str(page)])
        print(f"{page.stat().st_size:,} bytes, texts of {CHARS} characters; memory is what the page needs beyond an empty one\n")
        print(f"| browser | computed by | characters/s, best | MB once loaded (range) | MB after a text and {PAUSE} s (range) |")
        print("|---|---|---|---|---|")
        for kind, there in ((Chromium, CHROMIUM), (Firefox, FIREFOX)):
            if there:
                with kind(folder / kind.__name__) as browser:
                    report(browser, page, arguments.rounds)
            else:
                print(f"| {kind.__name__} is missing | | | | |")


def report(browser: Browser, page: Path, rounds: int) -> None:
    """Print a row of the table for each way in one browser."""
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, script in WAYS.items():
            with browser.tab(script=script) as tab:
                tab.open(page)
                tab.wait_for(IDLE)
                speeds[way].append(write(tab))
                agent = tab.evaluate("navigator.userAgent")
    version = re.findall(r"(?:Chrome|Firefox)/\d+", agent)[0]
    for way, found in speeds.items():
        loaded, rested = zip(*(memory_in(browser, way, page) for _ in range(rounds)), strict=True)
        speed = f"{statistics.median(found):.0f}, {max(found):.0f}"
        print(f"| {version} | {way} | {speed} | {spread(loaded)} | {spread(rested)} |", flush=True)


def spread(amounts: Sequence[float]) -> str:
    """Return the median and the range."""
    return f"{statistics.median(amounts):.0f} ({min(amounts):.0f} to {max(amounts):.0f})"


def memory_in(browser: Browser, way: str, page: Path) -> tuple[float, float]:
    """Return the megabytes that the page needs beyond an empty one: after loading, and after writing and a pause."""
    empty = page.with_name("empty.html")
    empty.write_text("<!DOCTYPE html>")
    with browser.tab(script=WAYS[way]) as tab:
        tab.open(empty)
        time.sleep(PAUSE)
        before = memory_of(browser.process.pid)
        tab.open(page)
        tab.wait_for(IDLE)
        loaded = memory_of(browser.process.pid) - before
        write(tab)
        time.sleep(PAUSE)
        settled = memory_of(browser.process.pid) - before
    return loaded / 1e6, settled / 1e6


def write(tab: Tab) -> float:
    """Write a text as a reader would, twice as the first one is compiled meanwhile; return characters a second."""
    tab.set_value("#count", str(CHARS))
    for _ in range(2):
        tab.click("#clear")
        tab.click("#go")
        tab.wait_for(f"{IDLE} && model.text.length > {CHARS}", seconds=300)
    (found,) = re.findall(r"Wrote (\d+) characters in ([\d.]+) seconds", tab.text("#live"))
    return float(found[0]) / float(found[1])


def memory_of(pid: int) -> int:
    """Return the bytes that a process and its descendants hold, shared pages divided among those that share them."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(1024 * kilobytes(member, "smaps_rollup", "Pss") for member in family)
