"""`picogpt-eval` from a clone, without installing picogpt itself."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from picogpt.cli.eval import command

command()
