"""What the tests of the run folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from picogpt.runs.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A new folder."""
    folder = RunFolder(tmp_path / "logs" / "a")
    folder.create()
    return folder
