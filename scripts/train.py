"""`picogpt-train` from a clone, without installing picogpt itself."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from picogpt.cli.train import command

command()
