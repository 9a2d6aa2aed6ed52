"""Whether a run's files fit on its disk, said before it begins."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from picogpt.errors import RunError
from picogpt.files import existing_folder
from picogpt.wording import format_bytes

__all__ = ["DiskNeed", "check_disk"]

SMALL_FILES = 400_000
"""Bytes for config, loss log, its picture, and the validation text of a stream."""
MARGIN = 50_000_000
"""Bytes that are to be left over, as other programs write too."""


@dataclass(frozen=True)
class DiskNeed:
    """Bytes of a run's files.

    Args:
        model: of the weights.
        checkpoint: of everything that is needed to resume.
    """

    model: int
    checkpoint: int

    @property
    def kept(self) -> int:
        """Bytes of the folder of a run: two checkpoints, the model, and small files."""
        return self.model + 2 * self.checkpoint + SMALL_FILES

    @property
    def peak(self) -> int:
        """Bytes while a checkpoint is written beside the two that are there."""
        return self.kept + self.checkpoint


def check_disk(run: Path, need: DiskNeed) -> str | None:
    """Return a warning where the disk of the run's folder will be nearly full, None where there is enough.

    Args:
        run: the run's folder, which need not exist; the files in it count as place for those that replace them.
        need: what the run's files take.

    Raises:
        RunError: the run could not be saved.
    """
    folder = existing_folder(run)
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None  # the file system does not tell; a full one is met when a file is written
    if not usage.total:
        return None
    held = sum(path.stat().st_size for path in run.iterdir() if path.is_file()) if run.is_dir() else 0
    missing = need.peak - held
    said = f"{run}: its files take {format_bytes(need.kept)}, {format_bytes(need.peak)} while they are saved"
    here = f", {format_bytes(held)} of it there already" if held else ""
    if missing > usage.free:
        raise RunError(
            f"{said}{here}, and {format_bytes(usage.free)} are free in {folder}; free some, or choose another --logs-dir"
        )
    if missing + MARGIN > usage.free:
        return f"warning: {said}{here}, and only {format_bytes(usage.free)} are free in {folder}"
    return None
