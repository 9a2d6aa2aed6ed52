"""Show an evaluation's bar to its end, with a line printed at half of it."""

from picogpt.cli.common import notice
from picogpt.cli.eval import _progress

with _progress(100) as advance:
    advance(50)
    notice("half")
    advance(50)
notice("all")
