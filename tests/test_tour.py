"""The notebook docs/tour.ipynb: it runs from top to bottom, and stores nothing that no run has produced."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from picogpt.runs.folder import RunFolder
from tests.programs import program

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "docs" / "tour.ipynb"


def read_cells() -> list[dict[str, Any]]:
    """The cells of the notebook."""
    notebook = json.loads(TOUR.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells: list[dict[str, Any]] = notebook["cells"]
    return cells


def test_cells() -> None:
    """The format is nbformat's, with text before code and names for all cells."""
    cells = read_cells()

    assert 10 <= len(cells) <= 14
    assert {cell["cell_type"] for cell in cells} == {"markdown", "code"}
    assert cells[0]["cell_type"] == cells[-1]["cell_type"] == "markdown"
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert all("".join(cell["source"]).strip() for cell in cells)


def test_no_stored_outputs() -> None:
    """No figure or number stands in the file: whoever opens it runs it."""
    code = [cell for cell in read_cells() if cell["cell_type"] == "code"]

    assert {cell["execution_count"] for cell in code} == {None}
    assert all(cell["outputs"] == [] for cell in code)


def test_is_listed() -> None:
    """README and the page about Python lead to it."""
    assert "docs/tour.ipynb" in (ROOT / "README.md").read_text()
    assert "tour.ipynb" in (ROOT / "docs" / "python.md").read_text()


def run_notebook(notebook: Path, line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a notebook in `folder` without a display, with `line` for its minutes."""
    command = program("run_notebook", str(notebook), "MINUTES = 3", line)
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)


@pytest.mark.slow
def test_runs_from_top_to_bottom(tmp_path: Path) -> None:
    """With a few seconds instead of three minutes, every cell runs in an empty folder and prints its results."""
    done = run_notebook(TOUR, "MINUTES = 0.2", tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    run = RunFolder(tmp_path / "logs" / "tour")
    assert f"best validation loss: {run.read_log().best_loss:.3f} nats per character" in done.stdout
    assert {path.name for path in run.path.iterdir()} > {"log.csv", "log.html", "eval.jpg", "model.safetensors"}
    for printed in ("--- temperature 0.1", "the ten likeliest characters", "wikipedia 1.", "the largest surprise", "lzma"):
        assert printed in done.stdout


@pytest.mark.slow
def test_a_command_that_fails_ends_the_notebook(tmp_path: Path) -> None:
    """A wrong flag is shown, and is an error of its cell."""
    done = run_notebook(TOUR, "MINUTES = -1", tmp_path)

    assert done.returncode == 1
    assert "picogpt-train: --minutes must be a number above 0, got -1.0" in done.stdout
    assert done.stderr.endswith("RuntimeError: picogpt-train failed; its last line says why\n")
