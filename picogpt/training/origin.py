"""The model that a new run starts from: another run's weights, or those of a log of the original project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from picogpt.alphabet import PICOGPT, Alphabet
from picogpt.config import GPTConfig
from picogpt.errors import RunError
from picogpt.runs.find import find_model
from picogpt.runs.folder import LossLog, RunFolder, load_alphabet, load_model
from picogpt.runs.import_original import read_original
from picogpt.runs.settings import RunSettings
from picogpt.training.request import TrainRequest

__all__ = ["InitFrom", "find_origin", "initial_alphabet"]


@dataclass(frozen=True)
class InitFrom:
    """The model whose weights a new run starts from."""

    path: Path
    config: GPTConfig
    weights: Mapping[str, npt.NDArray[np.generic]]
    log: LossLog | None
    """The loss log of an imported run of the original project; None for a model of ours."""
    alphabet: Alphabet = PICOGPT
    """Characters of the model."""

    @classmethod
    def find(cls, request: TrainRequest) -> InitFrom | None:
        """Read the requested model or log, or return None.

        Raises:
            RunError: the model or log is missing, damaged or of another kind.
        """
        if request.init_from is not None:
            path, _ = find_model(request.init_from, request.logs_dir)  # by name, like --model of the other commands
            return cls(path.absolute(), *load_model(path), None, load_alphabet(path))
        if request.import_original is not None:
            # Heads share one matrix, so their number cannot be read from the weights.
            original = read_original(request.import_original, request.model.get("n_head", GPTConfig().n_head))
            return cls(request.import_original.absolute(), original.config, original.weights, original.log)
        return None


def find_origin(request: TrainRequest, folder: RunFolder, stored: RunSettings | None) -> InitFrom | None:
    """Return the model that the run starts from, or None once the run has a checkpoint.

    Raises:
        RunError: the model is missing or damaged, or the run started from another one, or from none.
    """
    asked = InitFrom.find(request)
    if stored is None:
        return asked
    if asked is not None and str(asked.path) != stored.origin:
        began = stored.origin or "nothing"
        raise RunError(f"the run began from {began}, not {asked.path}; choose another --run, or --fresh to start over")
    # With a checkpoint, the initial weights are no longer needed, and the flag is accepted again.
    if folder.has_checkpoint():
        return None
    if stored.origin is not None and asked is None:
        raise RunError(f"{folder.path}: the run is to start from {stored.origin} and has not begun; give that flag again")
    return asked


def initial_alphabet(request: TrainRequest) -> Alphabet:
    """Return the alphabet of the model that a new run starts from, or the original project's.

    Raises:
        RunError: the model is missing or damaged.
    """
    if request.init_from is None:
        return PICOGPT
    path, _ = find_model(request.init_from, request.logs_dir)
    return load_alphabet(path)
