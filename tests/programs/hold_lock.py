"""Hold the lock of the run in a folder, and say so, until stdin ends."""

import sys
from pathlib import Path

from picogpt.runs.folder import RunFolder

with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
