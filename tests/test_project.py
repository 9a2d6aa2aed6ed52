"""The files around the code: one version everywhere, and commands that are what the documents say."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import picogpt

ROOT = Path(__file__).parents[1]


def read_yaml(name: str) -> Any:
    """The content of a YAML file of the project."""
    return yaml.safe_load((ROOT / name).read_text())


def python_versions() -> list[str]:
    """The Pythons that the package says it is tested with."""
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())


def test_one_version() -> None:
    """The package, the citation and the newest release of the changelog have one version, and the latter two one date."""
    citation = read_yaml("CITATION.cff")
    released = re.findall(r"^## \[([\d.]+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)

    assert released[0] == (picogpt.__version__, str(citation["date-released"]))
    assert citation["version"] == picogpt.__version__


def test_workflow_calls_the_script() -> None:
    """The workflow does what `.ci/run` does, with each Python that the package claims, and may change nothing."""
    workflow = read_yaml(".github/workflows/ci.yml")
    job = workflow["jobs"]["check"]

    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert job["strategy"]["matrix"]["python"] == python_versions()
    assert job["timeout-minutes"] == 45
    assert workflow["permissions"] == {"contents": "read"}


def test_script_runs_every_test() -> None:
    """`.ci/run` leaves out no marker, and checks what `make check` does."""
    lines = (ROOT / ".ci" / "run").read_text().splitlines()

    assert "pytest -m ''" in lines
    assert {"ruff check .", "ruff format --check .", "mypy"} < set(lines)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("target", "commands"),
    [
        ("check", ["ruff check .", "ruff format --check .", "mypy", "clang-format --dry-run --Werror"]),
        ("test", ["pytest"]),
        ("bench", ["python scripts/benchmark.py train", "python scripts/benchmark.py generate"]),
        ("", ["make check", "make test", "make bench", "make measure"]),
    ],
    ids=["check", "test", "bench", "default"],
)
def test_make(target: str, commands: list[str]) -> None:
    """Each target exists and has its commands; without one the targets are shown."""
    command = ["make", "--dry-run", *target.split()]
    recipe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert [part for part in commands if part not in recipe] == []


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_forms_have_what_a_form_needs(name: str) -> None:
    """Name, description and fields, of which a bug's ask for version, command, output and the line about the machine."""
    form = read_yaml(f".github/ISSUE_TEMPLATE/{name}.yml")

    assert form["name"]
    assert form["description"]
    assert "version" in [field["id"] for field in form["body"]]
    if name == "bug_report":
        assert {"version", "command", "output", "machine"} < {field["id"] for field in form["body"]}
