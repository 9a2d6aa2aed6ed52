"""A real browser without a window, where there is one: it opens a page from its file and gives back what the page became."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def open_page(page: Path, tmp_path: Path, *, fragment: str = "", script_milliseconds: int = 2000) -> tuple[str, list[str]]:
    """Open a page from `file://` with the network cut off.

    Returns:
        The document as it stands after so long, and what came to the console.
    """
    assert CHROMIUM is not None
    flags = [
        "--headless=new",
        "--disable-gpu",
        "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("--no-sandbox")  # the sandbox refuses to run as root
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'browser'}", f"--virtual-time-budget={script_milliseconds}"]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri() + fragment], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
