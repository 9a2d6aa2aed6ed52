"""Names of the files in a run folder, and which of them resume it; `picogpt.runs.folder` says what each contains.

A module of its own that imports nothing of picogpt: finding a model then does not load what training needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = [
    "CHECKPOINT_FILE",
    "CHECKPOINT_FILES",
    "CONFIG_FILE",
    "CSV_FILE",
    "DAMAGED_FILE",
    "EPOCHS_FILE",
    "LOG_FILE",
    "MODEL_FILE",
    "PAGE_FILE",
    "PLOT_FILE",
    "PREVIOUS_FILE",
    "VALIDATION_FILE",
    "has_checkpoint",
]

CONFIG_FILE: Final = "config.json"
MODEL_FILE: Final = "model.safetensors"
CHECKPOINT_FILE: Final = "checkpoint.safetensors"
PREVIOUS_FILE: Final = "checkpoint.previous.safetensors"
"""Fallback if the newest checkpoint is damaged."""
CHECKPOINT_FILES: Final = (CHECKPOINT_FILE, PREVIOUS_FILE)
"""A run has a checkpoint if it has either: a crash between the two renames of `RunFolder.save_checkpoint` leaves the second."""
DAMAGED_FILE: Final = "checkpoint.damaged.safetensors"
"""Kept for inspection, never read."""
VALIDATION_FILE: Final = "validation.safetensors"
LOG_FILE: Final = "log.pkl"
CSV_FILE: Final = "log.csv"
PLOT_FILE: Final = "log.jpg"
PAGE_FILE: Final = "log.html"
EPOCHS_FILE: Final = "epochs.json"


def has_checkpoint(run: Path) -> bool:
    """Whether the folder has a checkpoint, intact or damaged."""
    return any((run / name).exists() for name in CHECKPOINT_FILES)
