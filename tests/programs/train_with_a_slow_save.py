"""picogpt-train that prints `saving` at its third save, and takes half a minute for each from then on."""

import itertools
import sys
import time

from picogpt.cli.train import main
from picogpt.runs.checkpoint import Checkpoint
from picogpt.runs.folder import RunFolder

save = RunFolder.save_checkpoint
saves = itertools.count()


def save_slowly(self: RunFolder, checkpoint: Checkpoint) -> None:
    """Save; those of a rehearsal are not counted."""
    if not self.path.name.startswith(".pace-") and next(saves) >= 2:
        print("saving", flush=True)
        time.sleep(30)
    save(self, checkpoint)


RunFolder.save_checkpoint = save_slowly  # type: ignore[method-assign]
sys.exit(main())
