"""What stands on the terminal's screen while a bar is shown: every line whole, and no remains of the bar."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY_FLAGS
from tests.programs import program
from tests.terminal import look

BAR = re.compile(r"^(\w+:)? *\d+%\||char/s|B/s|\.\.\.\]")
"""Something that only a bar has."""
WIDTHS = pytest.mark.parametrize("columns", [120, 80, 20, 0])


def run_program(name: str, columns: int) -> list[str]:
    """Lines of the screen after a program has ended without error."""
    exit_code, lines = look(program(name), columns=columns)

    assert exit_code == 0, "\n".join(lines)
    return lines


@WIDTHS
def test_lines_while_a_bar_is_shown(columns: int) -> None:
    """Lines of two threads, to stdout and stderr, stand whole above the one bar, which comes last."""
    *lines, bar, end = run_program("lines_above_a_bar", columns)

    assert sorted(lines) == sorted([f"notice {i}" for i in range(20)] + [f"result {i}" for i in range(0, 100, 10)])
    assert bar.startswith("100%|")
    assert len(bar) <= (columns or 80)
    assert end == "end"


@WIDTHS
def test_download_that_fails(columns: int) -> None:
    """The bar is left as it stands when the download breaks off, and what is said then has lines of its own."""
    said, bar, gone, whole, fetched = run_program("download_twice", columns)

    assert (said, gone, fetched) == ("half of it", "gone", "fetched")
    assert re.match(r"text: +50%\|", bar)
    assert re.match(r"text: +100%\|", whole)


@pytest.mark.parametrize("columns", [80, pytest.param(20, marks=pytest.mark.slow)])
def test_training(columns: int, text_file: Path, tmp_path: Path) -> None:
    """Forecast, epochs and samples stand whole above the bar; Ctrl-C leaves no ^C in it."""
    flags = ["--text", str(text_file), "--logs-dir", str(tmp_path / "logs"), *TINY_FLAGS, "--steps-per-epoch", "20"]
    command = [sys.executable, "-m", "picogpt.cli.train", *flags, "--epochs", "999"]

    exit_code, lines = look(command, columns=columns, type_at=(b"epoch 2 ", b"\x03"))

    assert exit_code == 130
    bars = [number for number, line in enumerate(lines) if BAR.search(line)]
    end = next(number for number, line in enumerate(lines) if line.startswith("picogpt-train: stop"))
    assert bars == [end - 1]
    assert any(line.startswith("forecast: ") for line in lines)
    assert any(line.startswith("epoch 1 of 999") for line in lines)
    assert not any("^C" in line for line in lines)


@WIDTHS
def test_evaluation(columns: int) -> None:
    """A line that is printed while an evaluation shows its bar stands above it."""
    half, bar, whole = run_program("evaluation_bar", columns)

    assert (half, whole) == ("half", "all")
    assert bar.startswith("100%|")
