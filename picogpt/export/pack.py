"""A run small enough to be given away: what made it, its log, and its best weights in bfloat16.

No checkpoint comes along, so only `picogpt-train --init-from` trains on from it.
"""

from __future__ import annotations

from pathlib import Path

from picogpt.files import atomic_write
from picogpt.inference.tensors import to_bfloat16
from picogpt.inference.weights import check_weights
from picogpt.runs.folder import RunFolder
from picogpt.runs.loss_log import LossLog
from picogpt.runs.model_file import load_model, model_metadata
from picogpt.runs.names import MODEL_FILE
from picogpt.runs.tensor_file import serialize_tensors

__all__ = ["write_pack"]

_REMEDY = "only a run can be packed, and its config.json is part of it"


def write_pack(model: Path, folder: Path) -> LossLog:
    """Write what is worth giving away of a run into `folder`, which exists.

    Args:
        model: the run's model; its settings and its log lie beside it.
        folder: where to.

    Returns:
        The loss log, to be drawn.

    Raises:
        RunError: something of the run is missing or damaged.
        OSError: something cannot be written.
    """
    source, target = RunFolder(model.parent), RunFolder(folder)
    source.read_settings(_REMEDY)  # raises where they are not valid
    settings, log = source.read_config(_REMEDY), source.read_log()
    stored = load_model(model)
    check_weights(stored.config, stored.weights)
    rounded = {name: to_bfloat16(array) for name, array in stored.weights.items()}
    metadata = model_metadata(stored.config, stored.text)
    atomic_write(folder / MODEL_FILE, serialize_tensors(rounded, metadata, bfloat16=True))
    target.write_config(settings)
    target.write_log(log)
    return log
