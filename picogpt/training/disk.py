"""Check before a run starts that its files fit on the disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from picogpt.errors import RunError
from picogpt.files import existing_folder
from picogpt.wording import format_bytes

__all__ = ["DiskNeed", "check_disk"]

SMALL_FILES = 700_000  # config, loss log, plot, page, and a stream's validation text, two bytes a character at most
MARGIN = 50_000_000  # bytes that should stay free for other programs; less is a warning


@dataclass(frozen=True)
class DiskNeed:
    """Disk space of a run's files, in bytes.

    Args:
        model: size of the weights.
        checkpoint: size of everything that is needed to resume.
    """

    model: int
    checkpoint: int

    @property
    def kept(self) -> int:
        """Bytes of a run's folder: two checkpoints, the model, and small files."""
        return self.model + 2 * self.checkpoint + SMALL_FILES

    @property
    def peak(self) -> int:
        """Bytes while a third checkpoint is being written, before the oldest is removed."""
        return self.kept + self.checkpoint


def check_disk(run: Path, need: DiskNeed) -> str | None:
    """Return a warning if the run will nearly fill its disk, or None.

    Args:
        run: the run's folder, which need not exist; its files count as free space, as new ones replace them.
        need: size of the run's files.

    Raises:
        RunError: the disk has not enough free space to save the run.
    """
    # A full disk is found now rather than after hours, at the first checkpoint.
    folder = existing_folder(run)
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None  # unknown to the file system: a full disk raises when a file is written
    # Some network file systems report zeros.
    if not usage.total:
        return None
    held = sum(path.stat().st_size for path in run.iterdir() if path.is_file()) if run.is_dir() else 0
    missing = need.peak - held  # bytes by which the run grows
    prefix = f"{run}: its files take {format_bytes(need.kept)}, {format_bytes(need.peak)} while they are saved"
    here = f", {format_bytes(held)} of it there already" if held else ""
    if missing > usage.free:
        raise RunError(
            f"{prefix}{here}, and {format_bytes(usage.free)} are free in {folder}; free some, or choose another --logs-dir"
        )
    if missing + MARGIN > usage.free:
        return f"warning: {prefix}{here}, and only {format_bytes(usage.free)} are free in {folder}"
    return None
